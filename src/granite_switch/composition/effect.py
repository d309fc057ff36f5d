"""Estimate how strongly an adapter changes its base from norms, without loading the model.

The norm of s B A follows from two r x r matrices. The norm of W is estimated from a few of its rows, so that composing
links shards without reading them; an estimate is enough to tell a ratio of 0.01 from 10.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from granite_switch.core.checkpoint import Checkpoint, Tensor, to_float32
from granite_switch.core.layout import AdapterTensor, fold
from granite_switch.core.packed import FLOATS
from granite_switch.core.spec import AdapterSpec

_ROWS = 8  # rows of a weight that are read
SANE = 10.0  # trained adapters have 0.001 to 0.5; a larger ratio means a wrong scale or a random matrix


def update_norm(spec: AdapterSpec, tensors: Mapping[AdapterTensor, Tensor], linear: str) -> float:
    """Return the Frobenius norm of s B A for one linear: |B A|^2 = trace((B^T B) (A A^T))."""
    with np.errstate(all="ignore"):  # the norm of weights that are not finite is NaN or infinite
        a, b = (tensors[AdapterTensor("", linear, matrix)].float32().astype(np.float64) for matrix in "AB")
        return abs(spec.scale_of(linear)) * math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))


@lru_cache(maxsize=8192)
def weight_norm(weight: Tensor) -> float:
    """Estimate the Frobenius norm of a matrix in a file; NaN if its values are packed."""
    if weight.dtype not in FLOATS:
        return math.nan
    rows = range(0, weight.shape[0], max(1, weight.shape[0] // _ROWS))
    squares = [float(np.square(to_float32(weight.row(i), weight.dtype)).sum(dtype=np.float64)) for i in rows]
    return math.sqrt(sum(squares) / len(squares) * weight.shape[0])


def effect_warnings(spec: AdapterSpec, tensors: Mapping[AdapterTensor, Tensor], base: Checkpoint) -> list[str]:
    """Return warnings about updates that are zero or far too large."""
    norms = {linear: update_norm(spec, tensors, linear) for linear in spec.targets}
    zero = [linear for linear, norm in norms.items() if norm == 0]
    if len(zero) == len(norms):
        return ["every B (or A) is zero: the adapter has no effect until it is trained"]
    result = []
    if zero:
        kinds = list(fold(dict.fromkeys(zero)))
        more = f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""
        result.append(f"B (or A) is zero in {', '.join(kinds[:4])}{more}: no effect there")
    ratios = {
        linear: norm / of_base
        for linear, norm in norms.items()
        if f"{linear}.weight" in base and (of_base := weight_norm(base[f"{linear}.weight"])) > 0
    }
    worst = max(ratios, key=lambda linear: ratios[linear], default="")
    if worst and ratios[worst] > SANE:
        result.append(
            f"its update is {ratios[worst]:.1g} times as large as the weight of {worst}: "
            "lora_alpha, r or use_rslora may be wrong"
        )
    return result
