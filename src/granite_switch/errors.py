"""Exceptions for user errors.

Each lists every problem found, and its `hint` says how to fix them. The command line prints them without a traceback
and exits with 1; Python callers catch `SwitchError`.
"""

from collections.abc import Sequence
from itertools import groupby


class SwitchError(Exception):
    """Base class of all errors that this package raises deliberately.

    Args:
        message: what is wrong, naming the file, tensor or option.
        problems: one line per problem, if there are several.
        hint: how to fix it.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.message, self.hint = printable(message), printable(hint)
        self.problems = tuple(map(printable, problems))
        super().__init__(self.message, self.problems, self.hint)

    def to_dict(self) -> dict[str, object]:
        """Return the error as a JSON object, with every problem."""
        return {"error": self.message, "problems": list(self.problems), "hint": self.hint}

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in shortened(self.problems))]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


def printable(text: str) -> str:
    """Return text with surrogates, which JSON files can contain and no stream can write, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(lines: Sequence[str], limit: int = 10) -> list[str]:
    """Return the first `limit` lines and the number of the rest. Each run of indented lines is shortened separately."""
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
    """The base model cannot carry adapters: it is incomplete, or of a kind that is not supported."""


class AdapterError(SwitchError):
    """An adapter, or a combination of adapters, cannot be composed."""


class CheckpointError(SwitchError):
    """A checkpoint's files contradict each other or the format."""


class TemplateError(SwitchError):
    """The chat template cannot place a control token."""


class OutputError(SwitchError):
    """The output cannot be written: it exists, is locked, or the disk is full."""


class RoutingError(SwitchError, ValueError):
    """The arguments of a forward call do not determine which adapter is active."""


class ServingError(SwitchError, ValueError):
    """A switch model cannot do what an engine was asked for."""
