"""How the commands speak: results on stdout, progress and errors on stderr."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from granite_switch.errors import SwitchError, shortened

# what is piped into a file or another program is not folded at the width of a terminal
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
_state = {"quiet": False}


def be_quiet() -> None:
    """From here on: errors, and results that were asked for."""
    _state["quiet"] = True
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def calm_libraries() -> None:
    """Keep to ourselves what libraries say when they are imported: what they could not load, what will be renamed.

    Their bars of progress, downloads' too, are for a terminal.
    """
    for name in (
        "torchao",
        "torch.utils._pytree",
        "bitsandbytes",
    ):  # transformers imports them where they are installed
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not stderr.is_terminal:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def say(what: RenderableType) -> None:
    """Print a table, or a line that says what was done."""
    if not _state["quiet"]:
        console.print(what, markup=False)


def say_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    console.print(json.dumps(value, indent=2, ensure_ascii=False), markup=False)


def error(problem: SwitchError) -> None:
    """Print what is wrong, line by line, and the hint."""
    stderr.print(f"[bold red]error:[/] {escape(problem.message)}")
    for line in shortened(problem.problems):
        stderr.print(f"  - {escape(line)}")
    if problem.hint:
        stderr.print(f"[bold cyan]hint:[/] {escape(problem.hint)}")


def warn(text: str) -> None:
    """Print a warning to stderr."""
    if not _state["quiet"]:
        stderr.print(f"[bold yellow]warning:[/] {escape(text)}")


def notes(lines: Sequence[str]) -> None:
    """Print what was done otherwise than a user may expect."""
    for line in shortened(lines if not _state["quiet"] else ()):
        stderr.print(f"[bold]note:[/] {escape(line)}")


def size(count: int) -> str:
    """A number of bytes for people: 1.5 MB."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, in bytes, with the rate and the time that is left. Gives the function that advances it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = _state["quiet"] or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
