"""Stand-ins for the hub repositories and the other projects' programs on the pages."""

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from artefacts import ASSISTANT, ROOT, edit_json, make_adapter
from families import make_decoder
from stand_ins import BASES, LIBRARIES, TARGETS, Reader

from hub import hub  # isort: skip


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The repositories' files."""
    folder = tmp_path_factory.mktemp("published")
    for repository, family in BASES.items():
        make_decoder(folder / repository, family)
        edit_json(folder / repository / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    for repository, adapters in LIBRARIES.items():
        for seed, (name, technologies) in enumerate(adapters.items()):
            for base in BASES:
                for technology in technologies:
                    leaf = folder / repository / name / base.split("/")[1] / technology
                    invocation = ASSISTANT if technology == "alora" else None
                    make_adapter(leaf, folder / base, seed=seed, targets=TARGETS, invocation=invocation)
    return {
        repository: {str(p.relative_to(folder / repository)): p.read_bytes() for p in files(folder / repository)}
        for repository in (*BASES, *LIBRARIES)
    }


@pytest.fixture
def reader(published: dict[str, dict[str, bytes]], tmp_path: Path) -> Iterator[Reader]:
    """A checkout to work in, with `granite-switch` on the path; other projects' programs only record their calls."""
    programs, here = tmp_path / "bin", tmp_path / "checkout"
    programs.mkdir()
    here.mkdir()
    for name in ("sample", "pyproject.toml", "examples", "src"):
        (here / name).symlink_to(ROOT / name)
    notes = f'printf "%s\\n" "granite-switch $*" >> {tmp_path}/noted'
    ours = f'exec {sys.executable} -m granite_switch.cli "$@"'
    script(programs / "granite-switch", f'case "$1" in serve|play|check) {notes};; *) {ours};; esac')
    for name in ("pip", "vllm", "llama-server"):
        script(programs / name, f'printf "%s\\n" "{name} $*" >> {tmp_path}/noted')
    with hub() as server:
        server.repos |= {repository: dict(content) for repository, content in published.items()}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PATH": f"{programs}:{environment['PATH']}", "HF_TOKEN": "hf_test"}
        environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "0"}
        yield Reader(here, environment, server)
    shutil.rmtree(tmp_path, ignore_errors=True)


def script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
