"""`granite-switch compose`."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from granite_switch.cli import options
from granite_switch.cli.console import console, notes, progress, say, say_json, size, table, warn
from granite_switch.errors import AdapterError

if TYPE_CHECKING:
    from granite_switch.composition.plan import Plan
    from granite_switch.composition.sources import Selection


def compose(
    base: Annotated[str, typer.Argument(help="Base model: local folder or hub id.", metavar="BASE")],
    adapters: Annotated[
        list[str],
        typer.Option("--adapters", "-a", help="PEFT adapter, library, YAML manifest or hub id; repeatable."),
    ],
    more: Annotated[list[str] | None, typer.Argument(help="More adapter sources.", metavar="SOURCE")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to create; by default BASE-switch.")
    ] = None,
    base_name: options.BaseName = "",
    include: options.Include = None,
    exclude: options.Exclude = None,
    technology: options.Technology = "",
    revision: Annotated[str | None, typer.Option(help="Revision of hub ids without one (ID@REVISION).")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The same, only for adapters.")] = None,
    generatable: Annotated[bool, typer.Option(help="Allow the model to generate control tokens.")] = False,
    create_io_yaml: options.CreateIoYaml = False,
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=prefix|suffix", help="Where to add a missing invocation text; repeatable."),
    ] = None,
    push: Annotated[str, typer.Option(help="Hub repository to upload to; --output is then optional.")] = "",
    private: options.Private = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the adapters in the sources and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the plan, the list, or the error.")] = False,
) -> None:
    """Compose a base model and adapters into one checkpoint."""
    from granite_switch.composition.compose import compose as write
    from granite_switch.composition.compose import prepare
    from granite_switch.composition.push import push as upload
    from granite_switch.composition.sources import Selection, own_name

    sources = [*adapters, *(more or ())]
    chosen = options.selection(base_name, include, exclude, technology)
    settings = {**chosen, "revision": revision, "adapter_revision": adapter_revision}
    settings |= {"generatable": generatable, "create_io_yaml": create_io_yaml, "place": _places(place or ())}
    own = own_name(base, Path(base))
    if list_:
        chosen["base_name"] = base_name or own
        show_sources(sources, adapter_revision or revision, Selection(**chosen), as_json)
        return
    if dry_run:
        plan = prepare(base, sources, **settings)
        report(plan, f"would be written: {output or ''} ({size(plan.nbytes)})", as_json)
        return
    if output is None and not push:
        output = Path(f"{own}-switch")
    with TemporaryDirectory() as temporary:
        model = output or Path(temporary) / "model"
        with progress("composing") as advance:
            plan = write(base, sources, model, force=force, progress=advance, **settings)
        report(plan, f"written: {output} ({size(plan.nbytes)})" if output else "", as_json)
        if push:
            say(f"pushed: {upload(model, push, private=private)}")


def _places(values: Sequence[str]) -> dict[str, str]:
    """The values of `--place`, as a mapping."""
    if unclear := [value for value in values if "=" not in value]:
        raise typer.BadParameter(f"{unclear[0]} must be NAME=prefix or NAME=suffix", param_hint="--place")
    return {name: where for name, _, where in (value.partition("=") for value in values)}


def report(plan: "Plan", written: str, as_json: bool) -> None:
    """Print a plan: its notes and warnings, then JSON, or a table and a line on what was written."""
    notes(plan.notes)
    for warning in plan.warnings:
        warn(warning)
    if as_json:
        record = {"switch": plan.spec.to_dict(), "vocab_size": plan.spec.rows, "bytes": plan.nbytes}
        say_json({**record, "warnings": list(plan.warnings), "notes": list(plan.notes)})
        return
    say(summary(plan))
    if written:
        say(written)


def summary(plan: "Plan") -> Table:
    """The plan as a table, with a row per adapter."""
    rows = []
    for slot, spec in enumerate(plan.spec.adapters, 1):
        if spec.retired:
            rows.append([str(slot), spec.name, "removed", "", "", "", f"{spec.token} = {spec.token_id}", ""])
            continue
        ranks = sorted(set(spec.ranks.values()))
        rows.append(
            [
                str(slot),
                spec.name,
                spec.technology,
                str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
                " ".join(spec.modules).replace("_proj", ""),
                size(plan.adapters[spec.name].nbytes),
                f"{spec.token} = {spec.token_id}",
                repr(spec.invocation_text) if spec.technology == "alora" else "the first token",
            ]
        )
    title = f"{plan.spec.base_model}: {size(plan.checkpoint.nbytes)}, vocabulary {plan.spec.rows:,}"
    headings = ("slot", "adapter", "kind", "rank", "targets", "size", "control token", "acts from")
    return table(headings, rows, title, right=("slot", "rank", "size"))


def show_sources(sources: Sequence[str], revision: str | None, selection: "Selection", as_json: bool) -> None:
    """Print the adapters in the sources, for every base and technology, and why some would be left out."""
    from granite_switch.composition.sources import scan

    found = scan(sources, revision, selection)
    if not found:
        raise AdapterError("the sources contain no adapters")
    rows = [
        {
            "adapter": one.name,
            "base": one.base_name or "any",
            "kind": "retired" if one.retired else one.technology or "as its config says",
            "source": one.source,
            "left out": one.aside,
        }
        for one in found
    ]
    if as_json:
        say_json(rows)
    else:
        console.print(table(list(rows[0]), [list(row.values()) for row in rows]))
