"""Uploading a model to a stand-in for the hub, in its own process because the endpoint is read on import."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, hub

from granite_switch.composition.edit import remove


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as running:
        yield running


def command(server: Hub, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    line = [sys.executable, "-m", "granite_switch.cli", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_pushed_model_is_the_folder_and_a_later_one_replaces_it(server: Hub, composed: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(composed, tmp_path / "model"))
    done = command(server, "push", model, "me/switch", "--private")
    assert done.returncode == 0, done.stderr
    assert "me/switch" in done.stdout
    assert server.repos["me/switch"] == contents(model)
    assert server.private["me/switch"]
    assert "citations" in server.messages[-1]

    remove(model, ["citations"])
    assert command(server, "push", model, "me/switch").returncode == 0
    assert server.repos["me/switch"] == contents(model)
    assert "adapter-citations.safetensors" not in server.repos["me/switch"]


def test_composing_straight_to_the_hub(server: Hub, base: Path, adapters: Path, composed: Path) -> None:
    done = command(server, "compose", base, "--adapters", adapters, "--push", "me/new")
    assert done.returncode == 0, done.stderr
    assert server.repos["me/new"] == contents(composed)


@pytest.mark.slow
def test_verifying_against_a_base_on_the_hub(server: Hub, base: Path, adapters: Path, tmp_path: Path) -> None:
    server.repos["me/base"] = contents(base)
    source = adapters / "citations"
    assert command(server, "compose", "me/base", "--adapters", source, "--output", tmp_path / "o").returncode == 0
    done = command(server, "verify", tmp_path / "o", "--against", source, "--against", "me/base")
    assert done.returncode == 0, done.stderr
    assert "citations" in done.stdout


def test_a_broken_model_is_not_uploaded(server: Hub, composed: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(composed, tmp_path / "model"))
    (model / "adapter-citations.safetensors").unlink()
    done = command(server, "push", model, "me/switch")
    assert done.returncode == 1
    assert "adapter-citations.safetensors" in done.stderr
    assert server.repos == {}


def test_a_refusal_is_an_error_without_a_traceback(server: Hub, composed: Path) -> None:
    server.refuse = True
    done = command(server, "push", composed, "me/switch")
    assert done.returncode == 1
    assert "me/switch: cannot be pushed" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_files_of_the_format_are_uploaded(server: Hub, composed: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(composed, tmp_path / "model"))
    (tmp_path / "secret").write_text("x")
    for name in (
        ".env",
        "notes.txt",
        "run.py",
        "secret.json",
        "checkpoint-5/optimizer.pt",
        "io_configs/citations/me.txt",
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("mine")
    (model / "link.md").symlink_to(tmp_path / "secret")
    assert command(server, "push", model, "me/switch").returncode == 0
    assert server.repos["me/switch"] == contents(composed)


def test_a_private_push_to_a_public_repository_is_refused(server: Hub, composed: Path) -> None:
    server.repos["me/open"], server.private["me/open"] = {"README.md": b"old"}, False
    done = command(server, "push", composed, "me/open", "--private")
    assert done.returncode == 1
    assert "me/open: is already public" in done.stderr
    assert server.repos["me/open"] == {"README.md": b"old"}
    assert command(server, "push", composed, "me/open").returncode == 0
