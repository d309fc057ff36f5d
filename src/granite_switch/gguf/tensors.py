"""Every tensor of the GGUF file: its name, type and shape, and how its rows are computed from the checkpoint's.

llama.cpp expects q, k and v fused, with rows ordered for interleaved rotary embeddings, and one stack of adapters for
each matrix: slot 0 is zero, then each adapter is padded to the largest rank and scaled in B. Rows are streamed in
pieces, so peak memory is one piece, or one matrix for q, k and v.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from granite_switch.core.checkpoint import Tensor, to_float32
from granite_switch.core.layout import AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError
from granite_switch.gguf.dialects import FUSED, ROTARY, Decoder, Row, linear

Array = npt.NDArray[np.float32]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECE = 32 << 20  # bytes of float32
TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]  # in torch's order, the reverse of ggml's
    type: GGMLQuantizationType
    pieces: Callable[[], Iterable[Array]]  # its values as blocks of whole rows, in order

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size

    def encoded(self) -> Iterator[bytes]:
        """The tensor's bytes, piece by piece.

        Raises:
            CheckpointError: a value is not finite, or overflows float16.
        """
        for piece in self.pieces():
            if not np.isfinite(piece).all():
                raise CheckpointError(f"{self.name}: has NaN or infinite values", hint="granite-switch verify --deep")
            with np.errstate(over="ignore"):
                data = quantize(piece, self.type)
            if self.type is GGMLQuantizationType.F16 and np.isinf(data).any():
                raise CheckpointError(f"{self.name}: values overflow float16 (65,504)", hint="use --outtype bf16")
            yield data.tobytes()


def targets(decoder: Decoder, spec: SwitchSpec, tensors: Mapping[str, Tensor], outtype: str) -> Iterator[Target]:
    """Every tensor of the file, in file order.

    Args:
        decoder: the base's.
        spec: config.json's `switch`.
        tensors: the checkpoint's, by name.
        outtype: a key of `TYPES`, for all tensors except norms.
    """
    shape = tensors[EMBEDDING].shape
    kind = _type(outtype, shape[-1])
    # llama.cpp embeds substitutes, so in a tied embedding the control tokens' rows serve only as the head's
    suppressed = spec.suppressed if decoder.tied else ()
    yield Target("token_embd.weight", shape, kind, partial(_suppressed, tensors[EMBEDDING], suppressed))
    if not decoder.tied:
        yield Target("output.weight", shape, kind, partial(_suppressed, tensors[HEAD], spec.suppressed))
    yield _vector("output_norm", tensors["model.norm.weight"])
    for layer in range(decoder.layers):
        source, name = f"model.layers.{layer}", f"blk.{layer}"
        yield _vector(f"{name}.attn_norm", tensors[f"{source}.input_layernorm.weight"])
        yield _vector(f"{name}.ffn_norm", tensors[f"{source}.post_attention_layernorm.weight"])
        yield _qkv(f"{name}.attn_qkv.weight", layer, decoder, tensors, outtype)
        for row in decoder.rows:
            if row.stem not in FUSED:
                weight = _cut(tensors[f"{linear(layer, row)}.weight"], row, decoder)
                kind = _type(outtype, weight.shape[-1])
                yield Target(f"{name}.{row.stem}.weight", weight.shape, kind, partial(_rows, weight))
            yield from _adapters(f"{name}.{row.stem}", row, layer, decoder, spec, tensors, outtype)


def expected(decoder: Decoder, spec: SwitchSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every checkpoint tensor that the export needs."""
    hidden, linears = decoder.hidden, decoder.linears()
    result: dict[str, tuple[int, ...]] = {EMBEDDING: (decoder.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not decoder.tied:
        result[HEAD] = result[EMBEDDING]
    for layer in range(decoder.layers):
        norms = ("input_layernorm", "post_attention_layernorm")
        result |= {f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in norms}
    result |= {f"{path}.weight": shape for path, shape in linears.items()}
    for adapter in spec.active:
        result |= {tensor.key: shape for tensor, shape in adapter.tensors(linears).items()}
    return result


def max_rank(spec: SwitchSpec) -> int:
    """The rank to which every adapter is padded."""
    return max((rank for adapter in spec.active for rank in adapter.ranks.values()), default=0)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices hold the same values."""
    return one.shape == other.shape and all(map(np.array_equal, _rows(one), _rows(other)))


def interleaved(rows: Array, heads: int) -> Array:
    """The rows of a q or k projection, reordered for llama.cpp's RoPE, which pairs neighbouring rows instead of halves.

    Args:
        rows: [heads * head_dim, ...], each head in transformers' order.
        heads: the projection's number of heads.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _type(outtype: str, width: int) -> GGMLQuantizationType:
    """The type of a tensor: float16 if its rows are not a whole number of blocks, as in llama.cpp's own converter."""
    kind = TYPES[outtype]
    return kind if width % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _vector(name: str, tensor: Tensor) -> Target:
    return Target(f"{name}.weight", tensor.shape, GGMLQuantizationType.F32, lambda: [tensor.float32()])


def _qkv(name: str, layer: int, decoder: Decoder, tensors: Mapping[str, Tensor], outtype: str) -> Target:
    rows = [row for row in decoder.rows if row.stem in FUSED]

    def pieces() -> Iterator[Array]:
        for row in rows:
            yield _for_rotary(row, tensors[f"{linear(layer, row)}.weight"].float32(), decoder)

    height, width = sum(decoder.shape(row)[0] for row in rows), decoder.hidden
    return Target(name, (height, width), _type(outtype, width), pieces)


def _adapters(
    name: str,
    row: Row,
    layer: int,
    decoder: Decoder,
    spec: SwitchSpec,
    tensors: Mapping[str, Tensor],
    outtype: str,
) -> Iterator[Target]:
    """The stacks A [slots, rank, in] and B [slots, out, rank] of one matrix.

    Matrices that share a linear each get all of A and their own rows of B.
    """
    out, width = decoder.shape(row)
    rank, slots, path, start = max_rank(spec), len(spec.active) + 1, linear(layer, row), decoder.start(row)

    def stack(matrix: str, shape: tuple[int, int]) -> Iterator[Array]:
        yield np.zeros(shape, np.float32)
        for adapter in spec.active:
            padded = np.zeros(shape, np.float32)
            if path in adapter.ranks:
                values = tensors[AdapterTensor(adapter.name, path, matrix).key].float32()
                if matrix == "B":
                    with np.errstate(all="ignore"):  # what is not finite is refused when it is written
                        scaled = values[start : start + out] * np.float32(adapter.scale_of(path))
                    values = _for_rotary(row, scaled, decoder)
                padded[: values.shape[0], : values.shape[1]] = values
            yield padded

    for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
        kind = _type(outtype, shape[-1])
        yield Target(f"{name}.lora_{matrix.lower()}", (slots, *shape), kind, partial(stack, matrix, shape))


def _for_rotary(row: Row, values: Array, decoder: Decoder) -> Array:
    return interleaved(values, values.shape[0] // decoder.head) if row.stem in ROTARY else values


def _suppressed(tensor: Tensor, tokens: Iterable[int]) -> Iterator[Array]:
    """The rows, with zeros for some tokens, so that their logits are 0 instead of their substitutes'."""
    start = 0
    for piece in _rows(tensor):
        for token in tokens:
            if start <= token < start + len(piece):
                piece[token - start] = 0
        start += len(piece)
        yield piece


def _rows(tensor: Tensor) -> Iterator[Array]:
    """A matrix as float32, in pieces of whole rows."""
    rows, width = tensor.shape
    step, size = max(1, PIECE // (4 * width)), tensor.nbytes // rows
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield to_float32(tensor.read(start * size, count * size), tensor.dtype).reshape(count, width)


def _cut(tensor: Tensor, row: Row, decoder: Decoder) -> Tensor:
    """The rows of a linear's weight that belong to one matrix."""
    start = decoder.start(row)
    return tensor[(slice(start, start + decoder.shape(row)[0]),)]
