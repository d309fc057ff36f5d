"""A base, adapters, and old checkpoints of them, one of each generation."""

from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import make_adapter, make_base
from layouts import write_old

from granite_switch import compose

# what the old composer could take: one rank in all modules, no rslora
NAMES = ("answerability", "citations", "guardian-core")
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Granite whose widths 4-bit kernels take."""
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
    """The same as format 1."""
    output = tmp_path_factory.mktemp("legacy-composed") / "model"
    compose(base, [adapters], output)
    return output


@pytest.fixture(scope="session")
def old(base: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of an old checkpoint; the same arguments give the same."""
    made: dict[str, Path] = {}

    def get(generation: int, **options: object) -> Path:
        key = f"{generation}-{sorted(options.items(), key=str)}"
        if key not in made:
            folder = tmp_path_factory.mktemp("old") / f"generation-{generation}"
            made[key] = write_old(folder, generation, base, adapters, NAMES, **options)
        return made[key]

    return get
