"""Composed models as GGUF files."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from artefacts import make_adapter, make_base

from granite_switch import compose
from granite_switch.gguf import export

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IO_YAML = "model: null\nresponse_format: null\ntransformations: null\n"
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
Make = Callable[..., Path]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `engine` where llama.cpp has not been built."""
    if item.get_closest_marker("engine") and not find_spec("llama_cpp"):
        pytest.skip("needs the llama.cpp build: make test-gguf")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Compose a small base with a LoRA and an aLoRA on every projection, and an aLoRA on few, ranks all different."""

    def make(seed: int = 11, invocation: str = ASSISTANT, **base: object) -> Path:
        folder = tmp_path_factory.mktemp("gguf")
        make_base(folder / "base", seed=seed, **base)  # type: ignore[arg-type]
        everywhere = {"targets": ALL, "alpha": 8, "strength": 0.15}
        make_adapter(folder / "adapters" / "check", folder / "base", seed=1, rank=8, **everywhere)
        make_adapter(
            folder / "adapters" / "cite", folder / "base", seed=2, rank=3, use_rslora=True,
            invocation=invocation, **everywhere,
        )  # fmt: skip
        make_adapter(
            folder / "adapters" / "rewrite", folder / "base", seed=3, rank=2, targets=("k_proj", "down_proj"),
            rank_pattern={"layers.0.self_attn.k_proj": 5}, invocation="<rewrite>",
        )  # fmt: skip
        (folder / "adapters" / "check" / "io.yaml").write_text(IO_YAML)
        compose(folder / "base", [folder / "adapters"], folder / "model")
        return folder / "model"

    return make


@pytest.fixture(scope="session")
def model(make_model: Make) -> Path:
    """Tied embeddings, float32, a vocabulary longer than the tokenizer."""
    return make_model(pad_vocab=7)


@pytest.fixture(scope="session")
def wide(make_model: Make) -> Path:
    """Head and embedding apart, heads wider than hidden size over heads, in several shards."""
    return make_model(tied=False, head_dim=32, kv_heads=1, max_shard_size="100KB")


@pytest.fixture(scope="session")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` in float32."""
    output = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export(model, output)
    return output
