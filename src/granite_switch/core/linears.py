"""The linears of a base model, read from its files: what adapters can target.

A linear is a 2-D weight below a numbered layer, or the same in one of the packed forms that quantisers write
(`core.packed`). Embeddings, heads, convolutions (3-D) and experts' stacked weights (3-D) are not linears.
"""

from collections.abc import Mapping
from typing import Any

from granite_switch.core.checkpoint import Tensor
from granite_switch.core.layout import parse_key
from granite_switch.core.packed import FORMS, Packed, Shape


def linears(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Shape]:
    """(out, in) of each linear, by the path of its module.

    Args:
        tensors: the base's, by name.
        config: its config.json; `quantization_config` says how its weights are packed.

    Raises:
        CheckpointError: a quantised weight's shape is not certain.
    """
    result: dict[str, Shape] = {}
    quantisation = config.get("quantization_config") or {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind not in FORMS or not any(part.isdecimal() for part in path.split(".")) or parse_key(name):
            continue
        if kind != "weight" and len(tensor.shape) != 2:
            continue
        shape = FORMS[kind](Packed(path, tensors, quantisation), tensor)
        if shape:
            result[path] = shape
    return result
