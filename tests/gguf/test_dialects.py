"""Every dialect in llama.cpp computes what transformers and PEFT compute, and every other base is refused."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dialect_models import DIALECTS, Reference, make_dialect
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from granite_switch.errors import SwitchError
from granite_switch.gguf import export


@pytest.fixture(scope="module", params=DIALECTS.values(), ids=DIALECTS.keys())
def dialect(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, config = request.param
    return make_dialect(tmp_path_factory.mktemp("dialect"), model_type, **config)


@pytest.fixture(scope="module")
def engine(dialect: Path) -> Iterator[Any]:
    pytest.importorskip("llama_cpp", reason="needs the llama.cpp build: make test-gguf")
    from llama_engine import Engine

    export(dialect, dialect.parent / "model.gguf")
    loaded = Engine(dialect.parent / "model.gguf")
    yield loaded
    loaded.close()


@pytest.mark.engine
def test_logits(dialect: Path, engine: Any) -> None:
    reference = Reference(dialect)
    base = reference.logits("")
    for name in ("", "check", "cite", "first"):
        wanted = reference.logits(name)
        found = engine.logits(reference.switched(name))[:, : reference.vocabulary]
        assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max()), name
        assert not name or np.abs(wanted - base).max() > 0.1


def mutations(model_type: str) -> Iterator[dict[str, Any]]:
    """Each field of transformers' config class with other values, and keys that other classes read."""
    config = CONFIG_MAPPING[model_type]()
    for field in dataclasses.fields(config):
        if field.name.startswith(("_", "mamba_")) or field.name in NO_ARITHMETIC:
            continue
        for changed in others(getattr(config, field.name, None)):
            with contextlib.suppress(Exception):  # the class takes no such value
                CONFIG_MAPPING[model_type](**{field.name: changed})
                yield {field.name: changed}
                break
    for parameters in ROPES:
        yield {"rope_parameters": parameters, "max_position_embeddings": 128}
        yield {"rope_parameters": None, "rope_scaling": parameters, "rope_theta": 300.0}
    yield from KEYS


def others(value: Any) -> list[Any]:
    """Values that a field may have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2]
    return [4, True] if value is None else [{"silu": "gelu"}.get(value, "x")] if isinstance(value, str) else []


NO_ARITHMETIC = (
    *("model_type", "architectures", "dtype", "transformers_version", "return_dict", "torchscript"),
    "output_router_logits",
)
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 77.0},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 50.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 2.0, "mscale_all_dim": 1.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0},
]  # fmt: skip
KEYS: list[dict[str, Any]] = [
    {"rope_theta": 77.0},
    {"rope_parameters": None, "rope_theta": 77.0},
    {"partial_rotary_factor": 0.5},
    {"sliding_window": 8},
    {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
    {"layer_types": ["mamba", "attention"]},
    {"num_local_experts": 4},
    {"num_local_experts": None},
    {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0},
    {"logits_scaling": 3.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.7, "residual_multiplier": 0.3},
    {"embedding_multiplier": 0.0},
    {"residual_multiplier": 0.0},
    {"hidden_act": "relu"},
    {"num_key_value_heads": None},
    {"max_position_embeddings": 16},
]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("which", ["granite", "hybrid", "llama", "mistral"])
def test_any_other_config_is_computed_or_refused(which: str, tmp_path: Path) -> None:
    from llama_engine import Engine

    model_type, settings = DIALECTS[which]
    folder = make_dialect(tmp_path / "made", model_type, **settings)
    computed, refused = set(), set()
    for i, mutation in enumerate(mutations(model_type)):
        base, model = tmp_path / f"{i}" / "base", tmp_path / f"{i}" / "model"
        shutil.copytree(folder.parent / "base", base)
        shutil.copytree(folder, model)
        for changed in (base, model):
            edit(changed / "config.json", mutation)
        try:
            export(model, model / "out.gguf")
        except SwitchError:
            refused.add(next(iter(mutation)))
            continue
        reference = Reference(folder)
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            wanted = loaded(torch.tensor([reference.tokens("")])).logits[0].numpy()
        engine = Engine(model / "out.gguf")
        found = engine.logits(reference.tokens(""))[:, : wanted.shape[1]]
        engine.close()
        np.testing.assert_allclose(found[:, : wanted.shape[1]], wanted, atol=1e-4, err_msg=str(mutation))
        computed.add(next(iter(mutation)))
    assert {"rope_parameters", "max_position_embeddings"} < computed
    assert {"hidden_act", "rope_parameters", "hidden_size", "tie_word_embeddings"} < refused


def edit(path: Path, mutation: dict[str, Any]) -> None:
    """Change keys; None is written as null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **mutation}))
