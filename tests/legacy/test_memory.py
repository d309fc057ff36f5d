"""Loading a legacy checkpoint takes the memory of its weights plus at most one layer."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from artefacts import make_adapter, make_base
from layouts import write_old

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 24
SLACK = 6_000_000  # overhead of Python and the allocator


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of about 100 MB, and a folder with an adapter."""
    folder = tmp_path_factory.mktemp("large")
    base = make_base(folder / "base", hidden=256, mlp=1024, heads=8, kv_heads=8, layers=LAYERS)
    make_adapter(folder / "adapters" / "citations", base, seed=1, rank=8, targets=ALL)
    return base, folder / "adapters"


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3])
def test_peak(
    version: int, ingredients: tuple[Path, Path], old: Callable[..., Path], tmp_path: Path, record_property
) -> None:
    base, adapters = ingredients
    folder = write_old(tmp_path / "old", version, base, adapters, ["citations"])
    worker = [sys.executable, str(Path(__file__).with_name("memory_worker.py")), str(old(version)), str(folder)]
    seen = json.loads(subprocess.run(worker, capture_output=True, text=True, check=True).stdout)
    record_property("memory", seen)
    assert seen["samples"] > 20
    assert seen["peak"] <= seen["weights"] + seen["weights"] / LAYERS + SLACK
