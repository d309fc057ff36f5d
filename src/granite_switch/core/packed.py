"""Shapes of linears in the packed forms that quantisers write, for the supported methods.

The shape is derived from the packed tensor and checked against its scales, because a wrong shape would accept an
adapter that does not fit. Methods, formats and packings that are not listed are refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from granite_switch.core.border import Count, Record, checked
from granite_switch.core.checkpoint import Tensor
from granite_switch.errors import CheckpointError

Shape = tuple[int, int]
FLOATS = ("F64", "F32", "F16", "BF16")
WORKS = (
    "bitsandbytes (nf4, fp4, int8), compressed-tensors (int-quantized, float-quantized, pack-quantized, "
    "nvfp4-pack-quantized), fp8 in blocks, gptq and awq in 4 bits"
)
WAY_OUT = f"compose from the base in full precision and quantise it on loading, or from a base in one of: {WORKS}"
_PARTS = re.compile(r"\.(weight[._].+|input_\w+|qweight|qzeros|scales|g_idx|SCB)$")
_CT_FORMATS = ("int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized")


@dataclass(frozen=True)
class Packed:
    """The tensors of one quantised linear."""

    path: str
    tensors: Mapping[str, Tensor]
    quantisation: Mapping[str, Any]

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Return the shape of one tensor, given the last part of its name.

        Raises:
            CheckpointError: the linear lacks it.
        """
        tensor = self.tensors.get(f"{self.path}.{kind}")
        if tensor is None:
            raise CheckpointError(f"{self.path}: the base's quantised weight lacks its {kind}", hint=WAY_OUT)
        return tensor.shape

    def check(self, shape: Shape, fits: bool) -> Shape:
        """Return `shape`.

        Raises:
            CheckpointError: `fits` is false; lists the tensors' shapes.
        """
        if fits and min(shape) > 0:
            return shape
        kinds = {name[len(self.path) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{self.path}.")}
        raise CheckpointError(
            f"{self.path}: its quantised tensors and quantization_config give different shapes",
            problems=[f"{kind}: {tensor.dtype} {list(tensor.shape)}" for kind, tensor in kinds.items()],
            hint=WAY_OUT,
        )


def plain_name(name: str) -> str:
    """Return the name of a linear's weight, given the name of any tensor that quantisers write for it."""
    return _PARTS.sub(".weight", name)


def refused(config: Mapping[str, Any]) -> str:
    """Name the part of a base's quantisation that is not supported; "" if it can carry adapters."""
    decoder = config.get("text_config") or {}
    elsewhere = [key for key in ("compression_config", "quantization") if config.get(key)]
    elsewhere += ["text_config.quantization_config"] if decoder.get("quantization_config") else []
    if elsewhere:
        return f"{elsewhere[0]}: a quantisation that is not in quantization_config"
    settings = config.get("quantization_config")
    if not settings:
        return ""
    method = settings.get("quant_method")
    if method not in _METHODS:
        return f"quantization_config: quant_method {method!r}"
    wrong = [f"{key} {settings.get(key)!r}" for key, fits in _METHODS[method].items() if not fits(settings.get(key))]
    if method == "compressed-tensors":
        groups = (settings.get("config_groups") or {}).values()
        forms = [settings.get("format"), *(group["format"] for group in groups if group.get("format"))]
        wrong += [f"format {form!r}" for form in forms if form not in (*_CT_FORMATS, "mixed-precision")]
    return f"quantization_config: quant_method {method!r}, {', '.join(wrong)}" if wrong else ""


_METHODS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "bitsandbytes": {},
    "compressed-tensors": {"sparsity_config": lambda value: not value or value.get("format") == "dense"},
    "fp8": {"weight_block_size": bool},  # transformers ignores scales of whole tensors
    "gptq": {
        "bits": lambda value: value == 4,
        "checkpoint_format": lambda value: value in (None, "", "gptq"),
        "dynamic": lambda value: not value,  # different bits for some linears
        "is_marlin_format": lambda value: not value,
    },
    "awq": {"bits": lambda value: value == 4, "version": lambda value: value in (None, "gemm", "GEMM")},
}


class QuantState(Record):
    """What bitsandbytes keeps beside a packed weight, as JSON in a tensor."""

    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]


def _quant_state(tensor: Tensor) -> QuantState:
    try:
        data = json.loads(tensor.read())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{tensor.path}: {tensor.name} is not JSON ({str(error)[:200]})") from None
    return checked(QuantState, data, f"{tensor.path}: {tensor.name}")


def weight(one: Packed, tensor: Tensor) -> Shape | None:
    """Return the shape for `*.weight`: floats, or eight bits or fewer for each of the linear's values.

    Raises:
        CheckpointError: the encoding of the values is unknown.
    """
    states = [f"{one.path}.weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    if state := next((name for name in states if name in one.tensors), None):
        out, width = _quant_state(one.tensors[state]).shape
        one.shape_of("weight.absmax"), one.shape_of("weight.quant_map")
        return one.check((out, width), -(-out * width // 2) == tensor.nbytes)
    if len(tensor.shape) != 2:
        return None
    out, width = tensor.shape
    if tensor.dtype in FLOATS:
        return out, width
    method = one.quantisation.get("quant_method")
    if method == "bitsandbytes" and tensor.dtype == "I8":
        return one.check((out, width), one.shape_of("SCB") == (out,))
    if (method, tensor.dtype) == ("fp8", "F8_E4M3"):
        high, wide = one.quantisation.get("weight_block_size") or (1, 1)
        return one.check((out, width), one.shape_of("weight_scale_inv") == (-(-out // high), -(-width // wide)))
    if method == "compressed-tensors" and tensor.dtype in ("I8", "F8_E4M3"):
        scales = one.shape_of("weight_scale")
        return one.check((out, width), scales in ((), (1,), (out,)) or (len(scales) == 2 and scales[0] in (1, out)))
    raise CheckpointError(
        f"{one.path}.weight is {tensor.dtype} {list(tensor.shape)}, and quantization_config (quant_method {method!r}) "
        "does not say how its values are encoded",
        hint=WAY_OUT,
    )


def weight_packed(one: Packed, tensor: Tensor) -> Shape:
    """Return the shape for compressed-tensors: 32-bit words and `weight_shape`, or two 4-bit values per byte."""
    rows, columns = tensor.shape
    groups = (one.quantisation.get("config_groups") or {}).values()
    settings = [group.get("weights") or {} for group in groups]
    if tensor.dtype == "U8":
        sizes = [int(s["group_size"]) for s in settings if s.get("group_size")]
        scales = one.shape_of("weight_scale")
        return one.check((rows, 2 * columns), scales in [(rows, 2 * columns // size) for size in sizes])
    shape = one.tensors[f"{one.path}.weight_shape"] if one.shape_of("weight_shape") == (2,) else None
    if shape is None or shape.dtype not in ("I64", "I32"):
        return one.check((rows, columns), False)
    scales = one.shape_of("weight_scale")
    out, width = np.frombuffer(shape.read(), "<i8" if shape.dtype == "I64" else "<i4").tolist()
    packings = [(int(s.get("num_bits") or 0), int(s.get("group_size") or -1)) for s in settings]
    fits = [
        columns == -(-width // (32 // bits)) and scales == (out, -(-width // size) if size > 0 else 1)
        for bits, size in packings
        if bits in (4, 8)
    ]
    return one.check((out, width), rows == out and any(fits))


def qweight(one: Packed, tensor: Tensor) -> Shape:
    """Return the shape for GPTQ, which packs along the input, or AWQ, along the output; scales are [groups, out]."""
    rows, columns = tensor.shape
    bits = int(one.quantisation.get("bits") or 4)
    out, width = columns, rows * 32 // bits
    if one.quantisation.get("quant_method") == "awq":
        out, width = columns * 32 // bits, rows
    size = int(one.quantisation.get("group_size") or -1)
    groups = 1 if size < 0 else -(-width // size)
    fits = one.shape_of("scales") == (groups, out) and one.shape_of("qzeros") == (groups, -(-out * bits // 32))
    if f"{one.path}.g_idx" in one.tensors:
        fits = fits and one.shape_of("g_idx") == (width,)
    return one.check((out, width), fits and tensor.dtype == "I32")


FORMS: Mapping[str, Callable[[Packed, Tensor], Shape | None]] = {
    "weight": weight,
    "weight_packed": weight_packed,
    "qweight": qweight,
}
