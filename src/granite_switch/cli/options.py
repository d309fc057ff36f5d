"""Options that several commands have."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

SOURCES = "PEFT adapter folder, library folder, YAML manifest or hub id."


def one_of(*values: str) -> Callable[[str], str]:
    """Return the callback of an option that takes these values only."""

    def check(value: str) -> str:
        if value and value not in values:
            raise typer.BadParameter(f"must be {', '.join(values[:-1])} or {values[-1]}")
        return value

    return check


Model: TypeAlias = Annotated[str, typer.Argument(help="Composed model: local folder or hub id.", metavar="MODEL")]
Local: TypeAlias = Annotated[Path, typer.Argument(help="Composed model: local folder.", metavar="MODEL")]
Sources: TypeAlias = Annotated[list[str], typer.Argument(help=SOURCES, metavar="SOURCE")]
Output: TypeAlias = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to create; by default the model is changed in place.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace an existing folder.")]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.")]
BaseName: TypeAlias = Annotated[str, typer.Option(help="The base's folder name in libraries; by default its own name.")]
Include: TypeAlias = Annotated[list[str] | None, typer.Option(help="Glob of adapter names to include; repeatable.")]
Exclude: TypeAlias = Annotated[list[str] | None, typer.Option(help="Glob of adapter names to exclude; repeatable.")]
Technology: TypeAlias = Annotated[
    str, typer.Option(help="Only adapters of this technology: alora or lora.", callback=one_of("alora", "lora"))
]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Revision of the hub repositories.")]
CreateIoYaml: TypeAlias = Annotated[bool, typer.Option(help="Write a minimal io.yaml for adapters without one.")]
Private: TypeAlias = Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON: the plan, or the error.")]
DeviceMap: TypeAlias = Annotated[str, typer.Option(help="transformers' device_map.")]


def selection(
    base_name: str, include: Sequence[str] | None, exclude: Sequence[str] | None, technology: str
) -> dict[str, Any]:
    """Return the options that select adapters, as arguments of `compose`, `add` and `update`."""
    return {"base_name": base_name, "include": include or (), "exclude": exclude or (), "technology": technology}
