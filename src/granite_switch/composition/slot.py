"""Add an empty slot for training: a PEFT adapter whose B is zero, so that it has no effect until it is trained.

It is written as the two files that PEFT would write before the first training step, and composed like any other.
"""

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from granite_switch.composition import edit
from granite_switch.composition.base import Base
from granite_switch.composition.composed import read_composed
from granite_switch.composition.names import PEFT
from granite_switch.composition.plan import Plan
from granite_switch.core.border import check_name, write_json
from granite_switch.core.checkpoint import Entry, write
from granite_switch.errors import AdapterError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MAX_RANK = 4096


def add_empty(
    model: str | PathLike[str],
    name: str,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    invocation: str = "",
    output: str | PathLike[str] | None = None,
    force: bool = False,
) -> Plan:
    """Add an adapter to a composed model that has no effect until it is trained.

    Args:
        model, output, force: as for `add`.
        name: the adapter's name.
        rank: the rank of A and B.
        alpha: the scale is alpha / rank; twice the rank by default.
        targets: paths of linears, or their last parts; the attention projections by default.
        invocation: the text from which an aLoRA acts; by default the adapter is a LoRA and acts from the first token.

    Returns:
        The plan of the changed model.

    Raises:
        SwitchError: lists everything that is wrong; the model is then unchanged.
    """
    check_name(name)
    base = read_composed(edit.folder_of(model, output)).base
    with TemporaryDirectory() as temporary:
        folder = write_empty(
            base, Path(temporary) / name, rank=rank, alpha=alpha, targets=targets, invocation=invocation
        )
        return edit.add(model, [folder], output=output, force=force)


def write_empty(
    base: Base, folder: Path, *, rank: int, alpha: float | None, targets: Sequence[str], invocation: str = ""
) -> Path:
    """Write the adapter's folder and return it. A is initialised as in PEFT, with the name as seed.

    Args, raises: as for `add_empty`.
    """
    if not 0 < rank <= _MAX_RANK or (alpha is not None and not 0 < alpha < 2**31):
        raise AdapterError(f"rank {rank} and alpha {alpha} must be positive, rank at most {_MAX_RANK}")
    linears = _linears(base, targets or ATTENTION, bool(targets))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "target_modules": linears,
    }
    if invocation:
        library = base.tokenizer.library
        ids = library.encode(invocation, add_special_tokens=False).ids
        if library.decode(ids, skip_special_tokens=False) != invocation:
            raise AdapterError(f"the base's tokenizer cannot represent the invocation {invocation!r}")
        config["alora_invocation_tokens"] = ids
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(folder.name.encode()).digest()[:8], "little"))
    entries = []
    for linear in linears:
        out, width = base.linears[linear]
        bound = width**-0.5  # PEFT: kaiming_uniform_(a=sqrt(5))
        values = {
            "A": random.uniform(-bound, bound, (rank, width)).astype("<f4"),
            "B": np.zeros((out, rank), "<f4"),
        }
        entries += [
            Entry(f"{PEFT}{linear}.lora_{matrix}.weight", "F32", value.shape, (value.tobytes(),))
            for matrix, value in values.items()
        ]
    folder.mkdir(parents=True)
    write(folder / "adapter_model.safetensors", entries)
    write_json(folder / "adapter_config.json", config)
    return folder


def _linears(base: Base, targets: Sequence[str], asked_for: bool) -> list[str]:
    """Return the base's linears that the targets name; if the user asked for them, each must name at least one."""
    found = {target: [p for p in base.linears if p == target or p.endswith(f".{target}")] for target in targets}
    absent = [target for target, paths in found.items() if not paths]
    if (absent and asked_for) or not any(found.values()):
        there = ", ".join(sorted({path.rpartition(".")[2] for path in base.linears}))
        raise AdapterError(
            f"targets: the base has no linear {', '.join(absent)}", hint=f"choose with --targets from {there}"
        )
    chosen = {path for paths in found.values() for path in paths}
    return [path for path in base.linears if path in chosen]
