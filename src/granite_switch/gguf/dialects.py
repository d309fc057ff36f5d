"""The bases that llama.cpp's `graniteswitch` can run, and their names for the parts of Granite's decoder.

The engine implements one decoder, Granite's. A base can be exported if its `model_type` is listed here, because it
computes the same under other names. Every config key that changes the computation is read here, with transformers'
default, and refused by name if the engine does not support its value.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from granite_switch.core.border import LIMIT, Count, Number, Record, checked
from granite_switch.errors import CheckpointError

_Factor = Annotated[int | float, Field(gt=-LIMIT, lt=LIMIT, allow_inf_nan=False)] | None


class Rope(Record):
    """`rope_scaling` or `rope_parameters` of config.json."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Number | None = None
    factor: Number | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    attention_factor: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool | None = None


class EngineConfig(Record):
    """config.json: every key that an export reads, of any dialect."""

    hidden_size: Count
    num_attention_heads: Count
    intermediate_size: Count | None = None
    shared_intermediate_size: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str | None = None
    max_position_embeddings: Count = 1
    rms_norm_eps: Number = 1
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    num_local_experts: int | None = None
    position_embedding_type: str | None = None
    layers_block_type: list[str] | None = None
    embedding_multiplier: _Factor = None
    logits_scaling: _Factor = None
    residual_multiplier: _Factor = None
    attention_multiplier: _Factor = None
    rope_theta: Number | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: Number | None = None
    original_max_position_embeddings: Count | None = None


@dataclass(frozen=True)
class Row:
    """One of the engine's matrices and its linear in the base. Entries with the same linear split its rows in order."""

    stem: str  # llama.cpp's tensor name for the adapters: `attn_q`
    path: str  # the linear's path within its decoder layer: `self_attn.q_proj`
    outputs: str  # a key of `Decoder.sizes`
    inputs: str  # likewise


_ATTENTION = (
    Row("attn_q", "self_attn.q_proj", "query", "hidden"),
    Row("attn_k", "self_attn.k_proj", "key", "hidden"),
    Row("attn_v", "self_attn.v_proj", "key", "hidden"),
    Row("attn_output", "self_attn.o_proj", "hidden", "query"),
)
_PLAIN = (
    *_ATTENTION,
    Row("ffn_gate", "mlp.gate_proj", "mlp", "hidden"),
    Row("ffn_up", "mlp.up_proj", "mlp", "hidden"),
    Row("ffn_down", "mlp.down_proj", "hidden", "mlp"),
)
_SHARED = (
    *_ATTENTION,
    Row("ffn_gate", "shared_mlp.input_linear", "mlp", "hidden"),
    Row("ffn_up", "shared_mlp.input_linear", "mlp", "hidden"),
    Row("ffn_down", "shared_mlp.output_linear", "hidden", "mlp"),
)
FUSED = ("attn_q", "attn_k", "attn_v")  # one matrix in the engine, `attn_qkv`
ROTARY = ("attn_q", "attn_k")

# key -> transformers' default if config.json omits it
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": None,
    "attention_chunk_size": None,
    "layer_types": None,
}
_MULTIPLIERS: Mapping[str, Any] = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
# key -> (supported values, reason)
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "llama.cpp's architecture supports only silu"),
    "attention_bias": ((False, None), "llama.cpp's architecture has no biases"),
    "mlp_bias": ((False, None), "llama.cpp's architecture has no biases"),
    "sliding_window": ((None,), "llama.cpp's architecture has no sliding window (Mistral's default is 4096)"),
    "attention_chunk_size": ((None,), "llama.cpp's architecture has no chunked attention"),
    "num_local_experts": ((0,), "llama.cpp's architecture has no experts (the default is 8)"),
    "position_embedding_type": (("rope", "nope", None), "llama.cpp's architecture supports only rope and nope"),
}


@dataclass(frozen=True)
class Dialect:
    """One `model_type`'s names for Granite's decoder."""

    rows: tuple[Row, ...] = _PLAIN
    defaults: Mapping[str, Any] = field(default_factory=dict)  # every key that is read -> transformers' default
    mlp: str = "intermediate_size"  # the key of the MLP's width


DIALECTS: Mapping[str, Dialect] = {
    "granite": Dialect(defaults={**_DEFAULTS, **_MULTIPLIERS, "mlp_bias": False}),
    "granitemoehybrid": Dialect(
        rows=_SHARED,
        defaults={
            **_DEFAULTS,
            **_MULTIPLIERS,
            "num_local_experts": 8,
            "position_embedding_type": None,
            "layer_types": ["linear_attention"],
            "shared_intermediate_size": 1024,
        },
        mlp="shared_intermediate_size",
    ),
    "llama": Dialect(defaults={**_DEFAULTS, "mlp_bias": False}),
    "mistral": Dialect(
        defaults={
            **{key: value for key, value in _DEFAULTS.items() if key != "attention_bias"},
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
}
_ATTENTION_LAYERS = {"attention", "full_attention"}


@dataclass(frozen=True)
class Decoder:
    """A base's decoder, in the engine's terms."""

    rows: tuple[Row, ...]
    layers: int
    vocab_size: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int  # head size
    context: int
    epsilon: float
    tied: bool
    positions: bool  # False: no rotary embeddings
    rope_theta: float
    rope_scaling: Mapping[str, Any]  # llama.cpp's `rope.scaling.*`
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def sizes(self) -> dict[str, int]:
        query, key = self.heads * self.head, self.kv_heads * self.head
        return {"hidden": self.hidden, "query": query, "key": key, "mlp": self.mlp}

    def shape(self, row: Row) -> tuple[int, int]:
        """(out, in) of a matrix."""
        return self.sizes[row.outputs], self.sizes[row.inputs]

    def start(self, row: Row) -> int:
        """The first row of a matrix in its linear."""
        before = self.rows[: self.rows.index(row)]
        return sum(self.shape(other)[0] for other in before if other.path == row.path)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Path -> (out, in) of every linear of the base."""
        result: dict[str, tuple[int, int]] = {}
        for layer in range(self.layers):
            for row in self.rows:
                out, width = self.shape(row)
                path = linear(layer, row)
                result[path] = (result.get(path, (0, 0))[0] + out, width)
        return result


def linear(layer: int, row: Row) -> str:
    """The path of a matrix's linear in one decoder layer."""
    return f"model.layers.{layer}.{row.path}"


def read_decoder(config: Mapping[str, Any], model_type: str) -> tuple[Decoder, list[str]]:
    """The decoder that a config describes, and reasons why the engine cannot run it.

    Args:
        config: config.json.
        model_type: the base's.

    Raises:
        CheckpointError: `model_type` is not in `DIALECTS`, or keys are missing or wrong.
    """
    dialect = DIALECTS.get(model_type)
    if not dialect:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported by llama.cpp's architecture graniteswitch",
            hint=f"it supports {', '.join(DIALECTS)}; run this model in transformers or vLLM",
        )
    checked(EngineConfig, config, "config.json")
    keys = {key: config.get(key, default) for key, default in dialect.defaults.items()}
    heads, mlp = config["num_attention_heads"], config.get(dialect.mlp, keys.get(dialect.mlp))
    if not mlp or (heads > config["hidden_size"] and not keys.get("head_dim")):
        raise CheckpointError(f"config.json: {dialect.mlp} is missing" if not mlp else "config.json: heads of size 0")
    head = keys.get("head_dim") or config["hidden_size"] // heads
    positions = keys.get("position_embedding_type", "rope") == "rope"
    problems = [*_problems(keys, config, dialect), *([f"head_dim: {head} is odd"] if head % 2 else [])]
    scaling: Mapping[str, Any] = {}
    try:
        scaling = rope_scaling(config, keys["max_position_embeddings"]) if positions else {}
    except ValueError as error:
        problems.append(f"{'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'}: {error}")
    decoder = Decoder(
        rows=dialect.rows,
        layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        mlp=mlp,
        heads=heads,
        kv_heads=keys["num_key_value_heads"] or heads,
        head=head,
        context=keys["max_position_embeddings"],
        epsilon=keys["rms_norm_eps"],
        tied=bool(keys["tie_word_embeddings"]),
        positions=positions,
        rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        attention_scale=keys.get("attention_multiplier", head**-0.5),
        embedding_scale=keys.get("embedding_multiplier", 1.0),
        residual_scale=keys.get("residual_multiplier", 1.0),
        logit_scale=keys.get("logits_scaling", 1.0),
    )
    return decoder, problems


def _problems(keys: Mapping[str, Any], config: Mapping[str, Any], dialect: Dialect) -> Iterator[str]:
    """Config values that the engine does not support."""
    for key, (allowed, reason) in _FIXED.items():
        if key in keys and keys[key] not in allowed:
            yield f"{key} {keys[key]!r}: {reason}"
    for key in _MULTIPLIERS:
        if key in keys and not keys[key]:
            yield f"{key} {keys[key]!r}: llama.cpp treats it as 1"
    if config.get("quantization_config"):
        yield (
            "quantization_config: the base is quantised; compose with the unquantised base and export with "
            "--outtype q8_0"
        )
    types = config.get("layer_types") or config.get("layers_block_type") or dialect.defaults["layer_types"] or ()
    if other := sorted({*map(str, types)} - _ATTENTION_LAYERS):
        yield f"layer_types {', '.join(other)}: llama.cpp's architecture has only full attention layers"


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE parameters, from the key that transformers prefers."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
}
_ROPE_TENSORS = {"llama3": "rope_freqs.weight", "longrope": "rope_factors_long.weight"}
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def rope_scaling(config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The `rope.scaling.*` keys for a config's RoPE parameters, as defined in transformers' modeling_rope_utils.

    Raises:
        ValueError: llama.cpp's architecture does not support the parameters.
    """
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        tensor = _ROPE_TENSORS.get(kind)
        why = f": it loads no {tensor}, which carries this scaling in llama.cpp's other architectures" if tensor else ""
        raise ValueError(
            f"type {kind!r} is not in llama.cpp's architecture graniteswitch{why}; use transformers or vLLM"
        )
    if unknown := sorted(
        {key for key, value in rope.items() if value is not None} - {*_ROPE_ALWAYS, *_ROPE_KEYS[kind]}
    ):
        raise ValueError(f"unknown keys for type {kind!r}: {', '.join(unknown)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError("partial_rotary_factor: llama.cpp's architecture rotates whole heads")
    if kind == "default":
        return {}
    if kind == "linear" and not rope.get("factor"):
        raise ValueError("factor is missing")
    if kind == "linear":
        return {"type": "linear", "factor": float(rope["factor"])}
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)) != (32, 1, True):
        raise ValueError(
            "llama.cpp's architecture supports only the defaults of yarn's beta_fast, beta_slow and truncate"
        )
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    factor = float(rope.get("factor") or context / original)
    usual, own = _mscale(factor), rope.get("attention_factor")
    if own is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        own = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    result = {"type": "yarn", "factor": factor, "original_context_length": original}
    return result if own is None else {**result, "attn_factor": own / usual}  # llama.cpp multiplies by the usual one


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
