"""What goes wrong for a user: one small tree of exceptions.

Each says all that is wrong at once, and in `hint` what mends it. The command line prints them without a traceback
and exits with 1; Python callers catch `SwitchError`.
"""

from collections.abc import Sequence
from itertools import groupby


class SwitchError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        message: what is wrong, naming the file, tensor or option.
        problems: one line for each thing found, when there are several.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.message, self.problems, self.hint = message, tuple(problems), hint
        super().__init__(message, tuple(problems), hint)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it, with every problem."""
        return {"error": self.message, "problems": list(self.problems), "hint": self.hint}

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in shortened(self.problems))]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


def shortened(lines: Sequence[str], limit: int = 10) -> list[str]:
    """A list for people: its first lines and how many more there are. Indented lines are lists of their own."""
    result: list[str] = []
    for inner, run in groupby(lines, lambda line: line.startswith(" ")):
        part = list(run)
        more = len(part) - limit
        result += part if more <= 0 or not inner else [*part[:limit], f"  and {more} more (--json shows all)"]
    outer = [i for i, line in enumerate(result) if not line.startswith(" ")]
    if len(outer) > limit:
        result[outer[limit] :] = [f"and {len(outer) - limit} more (--json shows all)"]
    return result


class BaseModelError(SwitchError):
    """The base model cannot carry adapters: not Granite, incomplete, or without what composing needs."""


class AdapterError(SwitchError):
    """An adapter, or the set of them, cannot be composed."""


class CheckpointError(SwitchError):
    """A checkpoint's files contradict each other or the format."""


class TemplateError(SwitchError):
    """The chat template cannot place a control token."""


class OutputError(SwitchError):
    """The output cannot be written: it exists, is locked, or the disk is full."""


class RoutingError(SwitchError, ValueError):
    """A forward call from which no adapter can be told."""


class ServingError(SwitchError, ValueError):
    """An engine was asked for what a switch model cannot do."""
