"""Bases that name, nest or store things in their own way equal PEFT, and the base bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import GRANITE_TEMPLATE, ROLES, make_adapter, save_tokenizer, tokenizer_file
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.errors import AdapterError, RoutingError
from granite_switch.hf import models

N_LAYER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}  # config.json has no num_hidden_layers
PLAIN = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}

# what is unusual; the config; the adapter's targets
BASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "phi": ("the head has a bias", GROUPED, ["q_proj", "dense", "fc1"]),
    "gptj": ("n_layer; the head has a bias", {**N_LAYER, "rotary_dim": 8}, ["q_proj", "out_proj", "fc_in"]),
    "bloom": ("n_layer", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, ["query_key_value", "dense_4h_to_h"]),
    "ctrl": ("linears in nn.Sequential", {**N_LAYER, "dff": 96}, ["Wq", "ff.0", "ff.2"]),
    "opt": (
        "the head's class calls an inner decoder",
        {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64},
        ["q_proj", "fc1"],
    ),
    "internlm3": ("its class is Llama's", GROUPED, ["q_proj", "down_proj"]),
    "nanochat": ("norms without weights", GROUPED, ["q_proj", "o_proj"]),
    "mamba2": (
        "a cache with only states",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        ["in_proj"],
    ),
    "minicpm3": (
        "kv_b_proj runs on all cached positions",
        {**PLAIN, **MLA, "num_key_value_heads": 4},
        ["kv_b_proj", "o_proj"],
    ),
    "rwkv": (
        "no transformers cache",
        {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 4},
        ["attention.key", "feed_forward.value"],
    ),
}


def make(folder: Path, kind: str, **saving: Any) -> Any:
    """Write a random base with its tokenizer, and load it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    tokenizer = tokenizer_file(ROLES)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    settings = BASES[kind][1] if kind in BASES else GROUPED
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=tokenizer.get_vocab_size(), **settings, **ends)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **saving)
    save_tokenizer(folder, tokenizer, ROLES, GRANITE_TEMPLATE)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1, **options
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", BASES)
def test_equals_peft(kind: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=BASES[kind][2], strength=0.2)
    compose(tmp_path / "base", [adapter], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(10, 300, (2, 21))
    switched = torch.cat([torch.full((2, 1), model.config.switch_spec.adapters[0].token_id), ids[:, 1:]], 1)
    ids[:, 0] = model.config.switch_spec.substitutes[int(switched[0, 0])]
    way = {"use_cache": False} if kind == "rwkv" else {}
    with torch.no_grad():
        plain, got = base(ids).logits, model(switched).logits
        rows = plain.shape[-1]
        assert torch.equal(model(ids).logits[..., :rows], plain)
        assert text(model, ids, **way) == text(base, ids, **way)
        mixed = torch.cat([switched[:1], ids[1:]])
        together = model(mixed).logits[..., :rows]
        peft: Any = PeftModel.from_pretrained(base, adapter).eval()
        expected = peft(input_ids=ids).logits
    assert (expected - plain).abs().max() > 1e-2, "the adapter does nothing"
    assert (got[..., :rows] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    torch.testing.assert_close(together, torch.cat([expected[:1], plain[1:]]), rtol=1e-4, atol=1e-4)
    assert text(model, switched, **way) == text(peft, ids, **way)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    for other in (again, copy.deepcopy(model)):
        with torch.no_grad():
            assert torch.equal(other(switched).logits, got)


def test_cached_positions_keep_their_adapters(tmp_path: Path) -> None:
    """After a return to the base, the cached positions of latent attention still have the adapter."""
    make(tmp_path / "base", "minicpm3")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=["kv_b_proj"], strength=0.5)
    compose(tmp_path / "base", [adapter], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    spec, ids = model.config.switch_spec, torch.randint(10, 300, (2, 21))
    ids[0, 0], ids[0, 9] = spec.adapters[0].token_id, spec.base_token_id
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :9]).past_key_values
        parts = [model(part, past_key_values=cache).logits for part in (ids[:, 9:15], *ids[:, 15:].split(1, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 9:], rtol=1e-4, atol=1e-4)


def test_layers_of_two_towers(tmp_path: Path) -> None:
    """Gemma 3's files have other names than its modules, and its image tower has layers of the same names."""
    tokenizer = tokenizer_file(ROLES)
    sizes = {**GROUPED, "head_dim": 16, "vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 1}
    tower = {**PLAIN, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=sizes, vision_config=tower, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", tokenizer, ROLES, GRANITE_TEMPLATE)
    targets = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=targets)
    compose(tmp_path / "base", [adapter], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert [site.path for site in model.model.switch_sites] == [path.removeprefix("model.") for path in targets]


def test_a_state_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "base", "rwkv")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=["attention.key"])
    compose(tmp_path / "base", [adapter], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with pytest.raises(RoutingError, match="`state`") as caught:
        text(model, torch.randint(10, 300, (1, 5)))
    assert "use_cache=False" in str(caught.value)


def test_renamed_tensors(tmp_path: Path) -> None:
    """EXAONE's files have other names than its modules; the refusal says how to save them with the modules' names."""
    make(tmp_path / "base", "exaone")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", targets=["q_proj", "down_proj"])
    with pytest.raises(AdapterError, match="save_original_format=False"):
        compose(tmp_path / "base", [adapter], tmp_path / "model")
    make(tmp_path / "plain", "exaone", save_original_format=False)
    compose(tmp_path / "plain", [adapter], tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_the_cache_of_models_with_only_states() -> None:
    """Up to 5.23 mamba's forward calls it `cache_params`."""
    name: Callable[..., str] = models.cache_name
    assert name(["input_ids", "cache_params"]) == "cache_params"
    assert name(["input_ids"]) == "past_key_values"
