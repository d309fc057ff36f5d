"""The linears of a base model, read from its files: what adapters can target.

A linear is a 2-D weight below a numbered layer, or the same in one of the packed forms that quantisers write.
Embeddings, heads, convolutions (3-D) and experts' stacked weights (3-D) are not linears.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from granite_switch.core.checkpoint import Tensor
from granite_switch.core.layout import parse_key

Shape = tuple[int, int]


def linears(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Shape]:
    """(out, in) of each linear, by the path of its module.

    Args:
        tensors: the base's, by name.
        config: its config.json; `quantization_config` says how GPTQ and AWQ pack.
    """
    result: dict[str, Shape] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if not any(part.isdecimal() for part in path.split(".")) or parse_key(name):
            continue
        shape = _shape(path, kind, tensor, tensors, config.get("quantization_config") or {})
        if shape:
            result[path] = shape
    return result


def _shape(
    path: str, kind: str, tensor: Tensor, tensors: Mapping[str, Tensor], quantisation: Mapping[str, Any]
) -> Shape | None:
    """(out, in) of the linear that a tensor is the weight of; None if it is no linear's weight."""
    if kind == "weight":
        states = [n for n in (f"{path}.weight.quant_state.bitsandbytes__{t}" for t in ("nf4", "fp4")) if n in tensors]
        if states:
            out, width = json.loads(tensors[states[0]].read())["shape"]
            return int(out), int(width)
        return (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 2 else None
    if len(tensor.shape) != 2:
        return None
    if kind == "weight_packed":
        if shape := tensors.get(f"{path}.weight_shape"):
            out, width = np.frombuffer(shape.read(), "<i8" if shape.dtype == "I64" else "<i4").tolist()
            return out, width
        return tensor.shape[0], 2 * tensor.shape[1]  # two 4-bit values to a byte
    if kind == "qweight":
        packed = 32 // int(quantisation.get("bits") or quantisation.get("w_bit") or 4)
        if quantisation.get("quant_method") == "awq":
            return tensor.shape[1] * packed, tensor.shape[0]
        return tensor.shape[1], tensor.shape[0] * packed
    return None
