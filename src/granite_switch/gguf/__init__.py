"""Export to llama.cpp: one GGUF file of the `graniteswitch` architecture, with the base and every adapter."""

from os import PathLike
from pathlib import Path

from granite_switch.core.progress import Progress
from granite_switch.core.staging import check_file, staged_file
from granite_switch.errors import SwitchError

try:
    import gguf  # noqa: F401
except ModuleNotFoundError:
    raise SwitchError("the package gguf is not installed", hint="pip install 'granite-switch[gguf]'") from None

from granite_switch.gguf.plan import OUTTYPES, Plan, prepare
from granite_switch.gguf.write import write

__all__ = ["OUTTYPES", "Plan", "export", "prepare", "write"]


def export(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    outtype: str = "",
    pre: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Write a composed model as one GGUF file and return the plan that was written.

    Args:
        model: folder of a composed model, or of one in legacy format 2 or 3.
        output: the file; it appears only when it is complete.
        outtype: f32, f16, bf16 or q8_0; the model's own dtype by default.
        pre: llama.cpp's name of the pre-tokenizer; detected by default.
        force: replace an existing file.
        progress: called for each piece that is written.

    Raises:
        CheckpointError: the model cannot be exported; lists all reasons.
    """
    check_file(Path(output), force=force)
    plan = prepare(model, outtype=outtype, pre=pre)
    with staged_file(Path(output), force=force) as path:
        write(plan, path, progress)
    return plan
