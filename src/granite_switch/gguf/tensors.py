"""Every tensor of the GGUF file: its name, type and shape, and how its rows come from the checkpoint's.

llama.cpp wants q, k and v fused, their rows ordered for interleaved rotary embeddings, and one stack of adapters for
each projection: slot 0 all zeros, then each adapter padded to the largest rank, with its scaling in B.
Rows pass in pieces, so memory is that of a piece, and of a whole matrix only for q and k.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from granite_switch.core.checkpoint import Tensor, to_float32
from granite_switch.core.layout import EMBEDDING, GRANITE, HEAD, AdapterTensor, Projection, shapes, widths
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError

Array = npt.NDArray[np.float32]

PIECE = 32 << 20  # bytes of float32
TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_ROTARY = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]  # as torch has it: the reverse of ggml's
    type: GGMLQuantizationType
    pieces: Callable[[], Iterable[Array]]  # its values as matrices of whole rows, in order

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size

    def encoded(self) -> Iterator[bytes]:
        """Its bytes, piece by piece.

        Raises:
            CheckpointError: a value is too large for float16.
        """
        for piece in self.pieces():
            with np.errstate(over="ignore"):
                data = quantize(piece, self.type)
            if self.type is GGMLQuantizationType.F16 and np.isinf(data).any():
                raise CheckpointError(f"{self.name}: values above 65,504, float16's largest", hint="use --outtype bf16")
            yield data.tobytes()


def targets(
    config: Mapping[str, Any], spec: SwitchSpec, tensors: Mapping[str, Tensor], outtype: str
) -> Iterator[Target]:
    """Every tensor of the file, in its order.

    Args:
        config: config.json.
        spec: its `switch`.
        tensors: the checkpoint's, by name.
        outtype: a key of `TYPES`, for all that is not a norm.
    """
    quiet = spec.silent
    tied = bool(config.get("tie_word_embeddings"))
    shape = tensors[EMBEDDING].shape
    kind = _type(outtype, shape[-1])
    # llama.cpp embeds substitutes, so control tokens' own rows are free where the embedding is the head as well
    yield Target("token_embd.weight", shape, kind, partial(_silenced, tensors[EMBEDDING], quiet if tied else ()))
    if not tied:
        yield Target("output.weight", shape, kind, partial(_silenced, tensors[HEAD], quiet))
    yield _vector("output_norm", tensors["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        source, name = f"model.layers.{layer}", f"blk.{layer}"
        yield _vector(f"{name}.attn_norm", tensors[f"{source}.input_layernorm.weight"])
        yield _vector(f"{name}.ffn_norm", tensors[f"{source}.post_attention_layernorm.weight"])
        weights = {row.name: tensors[f"{source}.{row.path}.weight"] for row in GRANITE}
        yield _qkv(f"{name}.attn_qkv.weight", weights, config, outtype)
        for row in GRANITE:
            if row.group != "qkv_lora":
                weight = weights[row.name]
                kind = _type(outtype, weight.shape[-1])
                yield Target(f"{name}.{row.gguf}.weight", weight.shape, kind, partial(_rows, weight))
            yield from _adapters(f"{name}.{row.gguf}", row, layer, config, spec, tensors, outtype)


def expected(config: Mapping[str, Any], spec: SwitchSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint that the file holds."""
    hidden, layers, sizes = config["hidden_size"], config["num_hidden_layers"], shapes(config)
    result: dict[str, tuple[int, ...]] = {EMBEDDING: (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        result[HEAD] = result[EMBEDDING]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        result |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        result |= {f"{prefix}.{row.path}.weight": sizes[row.name] for row in GRANITE}
    for adapter in spec.active:
        result |= {tensor.key: shape for tensor, shape in adapter.tensors(layers, sizes).items()}
    return result


def max_rank(spec: SwitchSpec, layers: int) -> int:
    """The rank to which every adapter is padded."""
    return max((a.rank_of(row.name, i) for a in spec.active for row in GRANITE for i in range(layers)), default=0)


def interleaved(rows: Array, heads: int) -> Array:
    """The rows of a q or k projection for llama.cpp's rotary embeddings, which pair neighbours and not halves.

    Args:
        rows: [heads * head_dim, ...], each head's as transformers has them.
        heads: of this projection.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _type(outtype: str, width: int) -> GGMLQuantizationType:
    """Rows that are no whole number of blocks stay float16, as llama.cpp's own converter has it."""
    kind = TYPES[outtype]
    return kind if width % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _vector(name: str, tensor: Tensor) -> Target:
    return Target(f"{name}.weight", tensor.shape, GGMLQuantizationType.F32, lambda: [_whole(tensor)])


def _qkv(name: str, weights: Mapping[str, Tensor], config: Mapping[str, Any], outtype: str) -> Target:
    rows = [row.name for row in GRANITE if row.group == "qkv_lora"]
    width = config["hidden_size"]
    height = sum(weights[row].shape[0] for row in rows)

    def pieces() -> Iterator[Array]:
        for row in rows:
            yield _for_rotary(row, _whole(weights[row]), config)

    return Target(name, (height, width), _type(outtype, width), pieces)


def _adapters(
    name: str,
    row: Projection,
    layer: int,
    config: Mapping[str, Any],
    spec: SwitchSpec,
    tensors: Mapping[str, Tensor],
    outtype: str,
) -> Iterator[Target]:
    """The stacks A [slots, rank, in] and B [slots, out, rank] of one projection."""
    out, width = shapes(config)[row.name]
    rank, slots = max_rank(spec, config["num_hidden_layers"]), len(spec.active) + 1

    def stack(matrix: str, shape: tuple[int, int]) -> Iterator[Array]:
        yield np.zeros(shape, np.float32)
        for adapter in spec.active:
            padded = np.zeros(shape, np.float32)
            if adapter.rank_of(row.name, layer):
                values = _whole(tensors[AdapterTensor(adapter.name, layer, row.name, matrix).key])
                if matrix == "B":
                    values = _for_rotary(row.name, values * np.float32(adapter.scale_of(row.name, layer)), config)
                padded[: values.shape[0], : values.shape[1]] = values
            yield padded

    for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
        kind = _type(outtype, shape[-1])
        yield Target(f"{name}.lora_{matrix.lower()}", (slots, *shape), kind, partial(stack, matrix, shape))


def _for_rotary(projection: str, rows: Array, config: Mapping[str, Any]) -> Array:
    if projection not in _ROTARY:
        return rows
    head = widths(config)["query"] // config["num_attention_heads"]
    return interleaved(rows, rows.shape[0] // head)


def _silenced(tensor: Tensor, tokens: Iterable[int]) -> Iterator[Array]:
    """The rows with zeros for some tokens: as the head, their logits are 0, and not those of the substitutes."""
    start = 0
    for piece in _rows(tensor):
        for token in tokens:
            if start <= token < start + len(piece):
                piece[token - start] = 0
        start += len(piece)
        yield piece


def _rows(tensor: Tensor) -> Iterator[Array]:
    """A matrix in pieces of whole rows."""
    rows, width = tensor.shape
    step, size = max(1, PIECE // (4 * width)), tensor.nbytes // rows
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield to_float32(tensor.read(start * size, count * size), tensor.dtype).reshape(count, width)


def _whole(tensor: Tensor) -> Array:
    return to_float32(tensor.read(), tensor.dtype).reshape(tensor.shape)
