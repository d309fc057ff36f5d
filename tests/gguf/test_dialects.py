"""Every dialect in llama.cpp computes what transformers and PEFT compute, and every other base is refused."""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import GRANITE_TEMPLATE, ROLES
from dialect_models import DIALECTS, Reference, make_dialect
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from granite_switch import compose
from granite_switch.core.records import DenseConfig
from granite_switch.errors import CheckpointError, SwitchError
from granite_switch.gguf import dialects, export, prepare
from granite_switch.gguf.tensors import Target
from granite_switch.gguf.write import write


@pytest.fixture(scope="module", params=DIALECTS.values(), ids=DIALECTS.keys())
def dialect(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, config = request.param
    return make_dialect(tmp_path_factory.mktemp("dialect"), model_type, **config)


@pytest.fixture(scope="module")
def engine(dialect: Path) -> Iterator[Any]:
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
            with contextlib.suppress(Exception):  # the class rejects the value
                CONFIG_MAPPING[model_type](**{field.name: changed})
                yield {field.name: changed}
                break
    for parameters in ROPES:
        yield {"rope_parameters": parameters, "max_position_embeddings": 128}
        yield {"rope_parameters": None, "rope_scaling": parameters, "rope_theta": 300.0}
    yield from KEYS


def others(value: Any) -> list[Any]:
    """Other values for a field."""
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


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias True"),
    ("llama", {"mlp_bias": True}, "mlp_bias True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"rope_parameters": ROPES[-2]}, "rope_parameters: type 'llama3' .* rope_freqs.weight.* vLLM"),
    ("llama", {"rope_scaling": ROPES[-2]}, "rope_scaling: type 'llama3'"),
    ("llama", {"rope_parameters": ROPES[-1]}, "type 'longrope' .* rope_factors_long.weight"),
    ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic' .* graniteswitch; use"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "type 'default': full_attention"),
    ("llama", {"sliding_window": 8}, "sliding_window 8"),
    ("mistral", {"sliding_window": 4096}, "sliding_window 4096"),
    ("mistral", {"sliding_window": ...}, "sliding_window 4096"),
    ("mistral", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}}, "llama_4"),
    ("hybrid", {"num_local_experts": 4}, "num_local_experts 4"),
    ("hybrid", {"num_local_experts": ...}, "num_local_experts 8"),
    ("hybrid", {"layer_types": ["mamba", "attention"]}, "layer_types mamba"),
    ("hybrid", {"layer_types": None}, "layer_types linear_attention"),
    ("hybrid", {"layer_types": ...}, "layer_types linear_attention"),
    ("hybrid", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
    ("hybrid", {"shared_intermediate_size": 40}, "but config.json says"),
    ("granite", {"logits_scaling": 0}, "logits_scaling 0"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("granite", "hybrid", "llama", "mistral")
    return {name: make_dialect(folder / name, DIALECTS[name][0], **DIALECTS[name][1]) for name in names}


@pytest.mark.parametrize(("which", "changes", "message"), REFUSED)
def test_the_key_that_rules_a_base_out(
    models: dict[str, Path], which: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(models[which], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(CheckpointError) as caught:
        prepare(tmp_path / "model")
    assert re.search(message, str(caught.value))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
def test_the_engine_takes_no_factors_of_frequencies(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Why rope types llama3 and longrope are refused. An engine that loads this file can be given them."""
    from llama_engine import Engine

    plan = prepare(models["llama"])
    factors = np.ones(plan.decoder.head // 2, np.float32)
    more = Target(name, factors.shape, GGMLQuantizationType.F32, lambda: [factors])
    write(dataclasses.replace(plan, targets=(*plan.targets, more)), tmp_path / "model.gguf")
    with pytest.raises(RuntimeError, match="wrong number of tensors"):
        Engine(tmp_path / "model.gguf")


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "granite_swa", "granitemoe", "unheard_of"])
def test_other_bases_are_refused(models: dict[str, Path], model_type: str, tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "switch": {**config["switch"], "base_model_type": model_type}}))
    with pytest.raises(CheckpointError, match=f"model_type '{model_type}'") as caught:
        prepare(tmp_path / "model")
    assert "granite, granitemoehybrid, llama, mistral" in caught.value.hint


def test_a_head_beside_a_tied_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    edit(tmp_path / "model" / "config.json", {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings: .* differs from the embedding"):
        prepare(tmp_path / "model")


def test_the_defaults_are_those_of_transformers() -> None:
    elsewhere = {*DenseConfig.model_fields} - {"max_position_embeddings", "tie_word_embeddings"}  # depend on others
    elsewhere |= {"layers_block_type", "rope_parameters", "rope_scaling", "rope_theta"}
    for model_type, dialect in dialects.DIALECTS.items():
        config = CONFIG_MAPPING[model_type]()
        own = {*dialect.model_fields} - elsewhere
        assert {"hidden_act", "max_position_embeddings", "sliding_window", "tie_word_embeddings"} < own
        for key in own:
            assert getattr(config, key, None) == dialect.model_fields[key].default, (model_type, key)
    assert {*CONFIG_MAPPING["granitemoehybrid"]().layer_types} == {*dialects.GraniteMoeHybrid.types}
    mistral = dialects.Mistral.model_fields["num_key_value_heads"]
    assert CONFIG_MAPPING["mistral"]().num_key_value_heads == mistral.default


@pytest.mark.engine
def test_a_template_that_writes_the_first_token(models: dict[str, Path], tmp_path: Path) -> None:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    from llama_engine import Engine
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(models["llama"].parent, tmp_path / "llama")
    base = tmp_path / "llama" / "base"
    words = Tokenizer.from_file(str(base / "tokenizer.json"))
    words.post_processor = TemplateProcessing(single=f"{ROLES[0]} $A", special_tokens=[(ROLES[0], 0)])
    words.save(str(base / "tokenizer.json"))
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + GRANITE_TEMPLATE)
    model = tmp_path / "composed"
    compose(base, [tmp_path / "llama" / "adapters"], model)
    plan = export(model, tmp_path / "model.gguf")
    assert not plan.vocabulary.add_bos
    assert "other prompts must begin" in plan.warnings[0]
    engine, tokenizer = Engine(tmp_path / "model.gguf"), PreTrainedTokenizerFast.from_pretrained(model)
    llm = Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False, vocab_only=True)
    template = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos_token=ROLES[0], bos_token=ROLES[0])
    messages = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
    for name in ("base", "check", "cite"):
        options = {"adapter_name": name, "add_generation_prompt": True}
        wanted = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert wanted[0] == (plan.spec.adapter("check").token_id if name == "check" else 0)
        assert engine.tokenize(text, around=True) == wanted
        assert template(messages=messages, adapter_name=name).prompt == text
    engine.close()
    llm.close()
