"""Find the linears of a base model that adapters can target, in its files.

A linear is a 2-D weight in a numbered layer, or the same in one of the packed forms that quantisers write
(`core.packed`). Embeddings, heads, convolutions (3-D) and stacked expert weights (3-D) are not linears.
"""

from collections.abc import Mapping
from typing import Any

from granite_switch.core.checkpoint import Tensor
from granite_switch.core.layout import at_layer, parse_key
from granite_switch.core.packed import FORMS, Packed, Shape


def linears(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape (out, in) of each linear, by its module's path.

    Args:
        tensors: the base's tensors, by name.
        config: the base's config.json; `quantization_config` says how its weights are packed.

    Raises:
        CheckpointError: the shape of a quantised weight cannot be determined.
    """
    result: dict[str, Shape] = {}
    quantisation = config.get("quantization_config") or {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind not in FORMS or not at_layer(path)[1] or parse_key(name):
            continue
        if kind != "weight" and len(tensor.shape) != 2:
            continue
        shape = FORMS[kind](Packed(path, tensors, quantisation), tensor)
        if shape:
            result[path] = shape
    return result
