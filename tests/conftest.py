"""Fixtures for all tests: small real models, created once per session; settings for machines of two cores."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from artefacts import ALL, ASSISTANT, make_adapter, make_base
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Granite of float32 with a vocabulary longer than its tokenizer."""
    return make_base(tmp_path_factory.mktemp("models") / "base", pad_vocab=9)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters of that base: two LoRA, three aLoRA, of different ranks, targets and scalings."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "answerability", base, seed=1, rank=8, targets=ALL, invocation=ASSISTANT)
    make_adapter(folder / "citations", base, seed=2, rank=2, targets=("o_proj", "down_proj"), alpha=4)
    make_adapter(folder / "guardian-core", base, seed=3, targets=("k_proj", "up_proj"), invocation=ASSISTANT)
    make_adapter(folder / "hallucination_detection", base, seed=4, rank=4, targets=ALL, use_rslora=True)
    make_adapter(
        folder / "query_rewrite",
        base,
        seed=5,
        rank=3,
        invocation="<rewrite>",
        rank_pattern={"layers.0.self_attn.q_proj": 5},
        alpha_pattern={"v_proj": 6},
    )
    return folder


@pytest.fixture(scope="session")
def composed(base: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with its five adapters."""
    from granite_switch import compose

    output = tmp_path_factory.mktemp("composed") / "model"
    compose(base, [adapters], output)
    return output
