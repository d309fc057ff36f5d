"""How the commands speak: results on stdout, progress and errors on stderr."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from granite_switch.errors import SwitchError, shortened

# what is piped into a file or another program is not folded at the width of a terminal
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def error(problem: SwitchError) -> None:
    """Print what is wrong, line by line, and the hint."""
    stderr.print(f"[bold red]error:[/] {escape(problem.message)}")
    for line in shortened(problem.problems):
        stderr.print(f"  - {escape(line)}")
    if problem.hint:
        stderr.print(f"[bold cyan]hint:[/] {escape(problem.hint)}")


def warn(text: str) -> None:
    """Print a warning to stderr."""
    stderr.print(f"[bold yellow]warning:[/] {escape(text)}")


def notes(lines: Sequence[str]) -> None:
    """Print what was done otherwise than a user may expect."""
    for line in shortened(lines):
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
    """A bar on stderr, in bytes. Gives the function that advances it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
