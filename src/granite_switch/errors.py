"""What goes wrong for a user: one small tree of exceptions.

Each says all that is wrong at once, and in `hint` what mends it. The command line prints them without a traceback
and exits with 1; Python callers catch `SwitchError`.
"""

from collections.abc import Sequence


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

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


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
