"""Output of the commands: results to stdout, progress and errors to stderr."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from granite_switch.core.progress import Progress
from granite_switch.errors import SwitchError, shortened

# output to a file or pipe is not wrapped at the width of a terminal
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
size = decimal  # a number of bytes as text: 1.5 MB
_state = {"quiet": False}


def be_quiet() -> None:
    """Print only errors and requested results from now on."""
    _state["quiet"] = True
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def calm_libraries() -> None:
    """Suppress libraries' import warnings (failed extensions, deprecations), and without a terminal progress bars."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # transformers imports them if installed
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not shows_progress():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def shows_progress() -> bool:
    """Whether bars are drawn: on a terminal, which FORCE_COLOR does not make of a file."""
    return sys.stderr.isatty() and not _state["quiet"]


def say(what: RenderableType) -> None:
    """Print a table, or a line about what was done; nothing with `--quiet`."""
    if not _state["quiet"]:
        console.print(what, markup=False)


def say_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    console.print(json.dumps(value, indent=2, ensure_ascii=False), markup=False)


def error(problem: SwitchError) -> None:
    """Print an error, its problems and its hint."""
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
    """Print notes on results that a user may not expect."""
    for line in shortened(lines if not _state["quiet"] else ()):
        stderr.print(f"[bold]note:[/] {escape(line)}")


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Collection[str] = ()
) -> Table:
    """Return a table of plain text; the columns named in `right` are aligned right."""
    result = Table(title=escape(title) or None, title_justify="left")
    for heading in headings:
        result.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(Text, row))
    return result


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Yield a callback that shows a progress bar in bytes on stderr, from its first call on."""
    import rich.progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    bar = rich.Progress(*columns, console=stderr, transient=True, disable=not shows_progress())

    def advance(count: int, total: int) -> None:
        if not bar.tasks:
            bar.start()
            bar.add_task(label, total=total)
        bar.advance(bar.tasks[0].id, count)

    try:
        yield advance
    finally:
        bar.stop()
