"""`granite-switch upgrade`."""

from pathlib import Path
from typing import Annotated

import typer

from granite_switch.cli.compose import report, total_bytes
from granite_switch.cli.console import progress, size


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("upgrade")(upgrade)


def upgrade(
    old: Annotated[str, typer.Argument(help="Checkpoint in a legacy format: local folder or hub id.", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="Folder to create.", metavar="NEW")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the plan, or the error.")] = False,
) -> None:
    """Convert a checkpoint from a legacy format to format 1."""
    from granite_switch.composition.sources import model_folder
    from granite_switch.composition.upgrade import prepare
    from granite_switch.composition.write import write_model
    from granite_switch.core.staging import check_target, staged

    if not dry_run:
        check_target(new, force=force)
    plan = prepare(model_folder(old))
    total = total_bytes(plan)
    if not dry_run:
        with staged(new, force=force) as folder, progress("upgrading", total) as advance:
            write_model(plan, folder, advance)
    report(plan, f"{'would be written' if dry_run else 'written'}: {new} ({size(total)})", as_json)
