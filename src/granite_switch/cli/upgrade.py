"""`granite-switch upgrade`."""

from pathlib import Path
from typing import Annotated

import typer

from granite_switch.cli import options
from granite_switch.cli.compose import report
from granite_switch.cli.console import progress, size


def upgrade(
    old: Annotated[str, typer.Argument(help="Checkpoint in a legacy format: local folder or hub id.", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="Folder to create.", metavar="NEW")],
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint from a legacy format to format 1."""
    from granite_switch.composition.sources import model_folder
    from granite_switch.composition.upgrade import prepare
    from granite_switch.composition.upgrade import upgrade as write

    if dry_run:
        plan = prepare(model_folder(old))
    else:
        with progress("upgrading") as advance:
            plan = write(old, new, force=force, progress=advance)
    report(plan, f"{'would be written' if dry_run else 'written'}: {new} ({size(plan.nbytes)})", as_json)
