"""The bases that llama.cpp's `graniteswitch` can run, and their names for the parts of Granite's decoder.

The engine implements one decoder, Granite's. A base can be exported if its `model_type` is listed here, because it
computes the same under other names. Every config key that changes the computation is read here and refused by name if
the engine does not support its value.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from granite_switch.core.border import LIMIT, Count, Number, Record, checked
from granite_switch.core.records import DenseConfig
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


class Dialect(DenseConfig):
    """config.json of a base that computes what Granite's decoder does: every key that an export reads.

    A subclass is one `model_type`; keys that only some types have are declared there, all with transformers' defaults.
    """

    rows: ClassVar[tuple[Row, ...]] = _PLAIN
    mlp: ClassVar[str] = "intermediate_size"  # the key of the MLP's width
    scales: ClassVar[Mapping[str, str]] = {}  # key of a multiplier -> field of `Decoder`
    types: ClassVar[tuple[str, ...]] = ()  # of layers, if config.json does not say

    hidden_size: Count
    num_attention_heads: Count
    hidden_act: str | None = "silu"
    max_position_embeddings: Count = 2048
    rms_norm_eps: Number = 1e-6
    tie_word_embeddings: bool | None = False
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layers_block_type: list[str] | None = None
    rope_theta: Number | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: Number | None = None
    original_max_position_embeddings: Count | None = None

    @property
    def positions(self) -> bool:
        """Whether it has rotary embeddings."""
        return True


class _Multiplied(Dialect):
    scales: ClassVar[Mapping[str, str]] = {
        "embedding_multiplier": "embedding_scale",
        "logits_scaling": "logit_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention_scale",
    }

    attention_bias: bool | None = False
    embedding_multiplier: _Factor = 1.0
    logits_scaling: _Factor = 1.0
    residual_multiplier: _Factor = 1.0
    attention_multiplier: _Factor = 1.0


class Granite(_Multiplied):
    """IBM's dense Granite."""

    mlp_bias: bool | None = False


class GraniteMoeHybrid(_Multiplied):
    """Granite 4: can be exported if it has attention layers only and no experts."""

    rows: ClassVar[tuple[Row, ...]] = _SHARED
    mlp: ClassVar[str] = "shared_intermediate_size"
    types: ClassVar[tuple[str, ...]] = ("linear_attention",)

    num_local_experts: int | None = 8
    position_embedding_type: str | None = None
    shared_intermediate_size: Count | None = 1024

    @property
    def positions(self) -> bool:
        return self.position_embedding_type == "rope"


class Llama(Dialect):
    """Llama and bases that are stored as Llama."""

    attention_bias: bool | None = False
    mlp_bias: bool | None = False


class Mistral(Dialect):
    """Mistral without its sliding window."""

    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: int | None = 4096


DIALECTS: Mapping[str, type[Dialect]] = {
    "granite": Granite,
    "granitemoehybrid": GraniteMoeHybrid,
    "llama": Llama,
    "mistral": Mistral,
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
    read = checked(dialect, config, "config.json")
    heads, mlp = read.num_attention_heads, getattr(read, dialect.mlp)
    head = read.head_dim or read.hidden_size // heads
    if not mlp or not head:
        raise CheckpointError(f"config.json: {dialect.mlp} is missing" if not mlp else "config.json: heads of size 0")
    problems = [*_problems(read, config), *([f"head_dim: {head} is odd"] if head % 2 else [])]
    scaling: Mapping[str, Any] = {}
    try:
        scaling = rope_scaling(config, read.max_position_embeddings) if read.positions else {}
    except ValueError as error:
        problems.append(f"{'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'}: {error}")
    decoder = Decoder(
        rows=dialect.rows,
        layers=read.num_hidden_layers,
        vocab_size=read.vocab_size,
        hidden=read.hidden_size,
        mlp=mlp,
        heads=heads,
        kv_heads=read.num_key_value_heads or heads,
        head=head,
        context=read.max_position_embeddings,
        epsilon=read.rms_norm_eps,
        tied=bool(read.tie_word_embeddings),
        positions=read.positions,
        rope_theta=float(_rope(config).get("rope_theta") or read.rope_theta or 10000.0),
        rope_scaling=scaling,
        attention_scale=head**-0.5,
    )
    return replace(decoder, **{field: getattr(read, key) for key, field in dialect.scales.items()}), problems


def _problems(read: Dialect, config: Mapping[str, Any]) -> Iterator[str]:
    """Config values that the engine does not support."""
    for key, value in read:
        allowed, reason = _FIXED.get(key, ((value,), ""))
        if value not in allowed:
            yield f"{key} {value!r}: {reason}"
        if key in read.scales and not value:
            yield f"{key} {value!r}: llama.cpp treats it as 1"
    if config.get("quantization_config"):
        yield (
            "quantization_config: the base is quantised; compose with the unquantised base and export with "
            "--outtype q8_0"
        )
    if other := sorted({*(read.layer_types or read.layers_block_type or read.types)} - _ATTENTION_LAYERS):
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
