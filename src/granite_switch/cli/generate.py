"""`granite-switch generate`."""

import typer


def register(app: typer.Typer) -> None:
    """Nothing yet."""
