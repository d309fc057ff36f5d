"""Stand-ins for what the pages name: hub repositories, and the programs of other projects."""

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from artefacts import ASSISTANT, ROOT, edit_json, make_adapter
from families import make_decoder

sys.path.insert(0, str(ROOT / "tests" / "maintain"))
from hub import Hub, hub

# published bases: model_type and layers as the table of real ones has them, everything else tiny
BASES = {
    "ibm-granite/granite-4.0-micro": "granitemoehybrid",
    "ibm-granite/granite-4.0-h-micro": "granitemoehybrid_mamba",
    "ibm-granite/granite-4.1-3b": "granite",
}
# published libraries: adapters, and the technologies in which each is there
LIBRARIES = {
    "ibm-granite/granitelib-rag-r1.0": {
        "answerability": ("alora", "lora"),
        "citations": ("lora",),
        "hallucination_detection": ("lora",),
        "query_rewrite": ("alora", "lora"),
    },
    "ibm-granite/granitelib-core-r1.0": {"requirement_check": ("alora", "lora"), "uncertainty": ("alora",)},
}
TARGETS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Reader:
    """Somebody who follows the pages: a folder to be in, and the environment of their shell."""

    folder: Path
    environment: dict[str, str]
    hub: Hub


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
    """A checkout's root to be in, `granite-switch` on the path, other projects' programs that only take notes."""
    programs, here = tmp_path / "bin", tmp_path / "checkout"
    programs.mkdir()
    here.mkdir()
    for name in ("sample", "pyproject.toml", "examples", "src"):
        (here / name).symlink_to(ROOT / name)
    script(programs / "granite-switch", f'exec {sys.executable} -m granite_switch.cli "$@"')
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
