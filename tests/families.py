"""Tiny random decoders of every tested family, created by transformers, with their PEFT targets.

A new family is one row. Heads have 32 dimensions, the smallest that vLLM's CPU attention takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from artefacts import GRANITE_TEMPLATE, ROLES, save_tokenizer, tokenizer_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SHARED_MLP = ("shared_mlp.input_linear", "shared_mlp.output_linear")
MAMBA = ("mamba.in_proj", "mamba.out_proj")


@dataclass(frozen=True)
class Family:
    """A kind of decoder."""

    config: str  # the config class in transformers
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = (*ATTENTION, *MLP)  # PEFT targets: every linear that an adapter can update

    @property
    def model(self) -> str:
        """The class with a language-model head."""
        stem = self.config.removesuffix("Config").removesuffix("Text")
        return f"{stem}ForCausalLM"


COMMON: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GRANITE: Mapping[str, Any] = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_HYBRID: Mapping[str, Any] = {
    **_GRANITE,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
    "layer_types": ["attention", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 64,
}
_MAMBA: Mapping[str, Any] = {
    **_HYBRID,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "position_embedding_type": None,
}
_EXPERTS: Mapping[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
_WINDOWS = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]

FAMILIES: Mapping[str, Family] = {
    "granite": Family("GraniteConfig", _GRANITE),
    "granite_swa": Family(
        "GraniteSWAConfig",
        {**_GRANITE, "num_hidden_layers": 4, "sliding_window": 16, "layer_rope_theta": [0.0, 1e4, 1e4, 1e4]},
    ),
    "granitemoe": Family("GraniteMoeConfig", {**_GRANITE, **_EXPERTS}, ATTENTION),
    "granitemoehybrid": Family("GraniteMoeHybridConfig", _HYBRID, (*ATTENTION, *SHARED_MLP)),
    "granitemoehybrid_mamba": Family("GraniteMoeHybridConfig", _MAMBA, (*ATTENTION, *SHARED_MLP, *MAMBA)),
    "granitemoehybrid_experts": Family(
        "GraniteMoeHybridConfig", {**_MAMBA, **_EXPERTS}, (*ATTENTION, *SHARED_MLP, *MAMBA)
    ),
    "llama": Family("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 64}),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": [*_WINDOWS[1:], "full_attention"],
        },
    ),
    "phi3": Family("Phi3Config", {"tie_word_embeddings": False}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    # one linear in the files that vLLM's class calls a pack of two
    "glm4": Family(
        "Glm4Config", {"head_dim": 32, "tie_word_embeddings": False}, (*ATTENTION, "gate_up_proj", "down_proj")
    ),
    # a head that the files call by another name
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
        ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "helium": Family("HeliumConfig", {"head_dim": 32}),  # vLLM does not list it
    "olmo2": Family("Olmo2Config", {"tie_word_embeddings": False}),
    "mistral": Family("MistralConfig", {"sliding_window": 16, "tie_word_embeddings": False, "head_dim": 32}),
}


def make_decoder(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    pad_vocab: int = 0,
    template: str | None = GRANITE_TEMPLATE,
    specials: Sequence[str] = ROLES,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a small random decoder with its tokenizer.

    Weights are larger than by default, so that attention is sharp and texts vary.

    Args:
        family: a key of `FAMILIES`.
        pad_vocab: rows of the embedding beyond the tokenizer's end.
        template: chat template; None for a base without one.
        overrides: keys of the config.
    """
    row, tokenizer = FAMILIES[family], tokenizer_file(specials)
    settings = {**COMMON, "vocab_size": tokenizer.get_vocab_size() + pad_vocab, **row.settings, **overrides}
    torch.manual_seed(seed)
    model = getattr(transformers, row.model)(getattr(transformers, row.config)(**settings))
    _enlarge(model, settings["initializer_range"])
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder, tokenizer, specials, template)
    return folder


def load_decoder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base in transformers' own class, without an end-of-text token."""
    model = getattr(transformers, FAMILIES[family].model).from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def _enlarge(model: torch.nn.Module, std: float) -> None:
    """Randomise parameters that transformers initialises to zeros or ones, so that a loader that skips them is noticed.

    The norm before the head gets weights of both signs; otherwise a model with a tied head would repeat its input.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            last = not any(part.isdecimal() for part in name.split("."))
            parameter.add_(torch.randn_like(parameter) - 1 if last else torch.randn_like(parameter) * 0.1)
        elif name.endswith((".bias", ".sinks")):
            torch.nn.init.normal_(parameter, std=std)
