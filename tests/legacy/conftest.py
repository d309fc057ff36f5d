"""A base, adapters, and a checkpoint of them in each legacy format."""

from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import make_adapter, make_base
from layouts import write_old

from granite_switch import compose

# what the old composer supported: one rank in all modules, no rslora
NAMES = ("answerability", "citations", "guardian-core")
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Granite with widths that 4-bit kernels support."""
    return make_base(tmp_path_factory.mktemp("legacy") / "base", mlp=128)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA and two aLoRA of different ranks and targets."""
    folder = tmp_path_factory.mktemp("legacy-adapters")
    make_adapter(folder / "answerability", base, seed=1, rank=8, targets=ALL, invocation=ASSISTANT)
    make_adapter(folder / "citations", base, seed=2, rank=2, targets=("o_proj", "down_proj"), alpha=4)
    make_adapter(folder / "guardian-core", base, seed=3, targets=("k_proj", "up_proj"), invocation=ASSISTANT)
    return folder


@pytest.fixture(scope="session")
def composed(base: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in format 1."""
    output = tmp_path_factory.mktemp("legacy-composed") / "model"
    compose(base, [adapters], output)
    return output


@pytest.fixture(scope="session")
def old(base: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that returns the folder of an old checkpoint; equal arguments give the same folder."""
    made: dict[str, Path] = {}

    def get(version: int, **options: object) -> Path:
        key = f"{version}-{sorted(options.items(), key=str)}"
        if key not in made:
            folder = tmp_path_factory.mktemp("old") / f"version-{version}"
            made[key] = write_old(folder, version, base, adapters, NAMES, **options)
        return made[key]

    return get
