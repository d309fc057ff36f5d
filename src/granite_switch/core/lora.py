"""The switched linear as a plain loop in float32: y = W x + s_a * B_a (A_a x) for a token in slot a.

This is the definition that every fast path is tested against.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Pair(NamedTuple):
    """One adapter's low-rank update of one linear."""

    a: Array  # [r, in]
    b: Array  # [out, r]
    scale: float


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (PEFT `LoraLayer.update_layer`)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def switched_linear(x: Array, weight: Array, slots: Sequence[int], pairs: Mapping[int, Pair]) -> Array:
    """Apply a linear whose low-rank update depends on each token's slot.

    Args:
        x: [T, in] float32, one row for each token.
        weight: [out, in] float32.
        slots: T slots; slot 0, and slots without a pair, use the base alone.
        pairs: slot -> its update of this linear.

    Returns:
        [T, out] float32.
    """
    rows = []
    for token, slot in zip(x, slots, strict=True):
        y = weight @ token
        if slot in pairs:
            pair = pairs[slot]
            y = y + pair.scale * (pair.b @ (pair.a @ token))
        rows.append(y)
    return np.stack(rows)
