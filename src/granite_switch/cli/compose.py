"""`granite-switch compose`."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from granite_switch.cli.console import console, notes, progress, say, say_json, size, warn
from granite_switch.errors import AdapterError

if TYPE_CHECKING:
    from granite_switch.composition.compose import Plan


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compose")(compose)


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
    base_name: Annotated[str, typer.Option(help="The base's folder name in libraries; by default its own name.")] = "",
    include: Annotated[list[str] | None, typer.Option(help="Glob of adapter names to include; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of adapter names to exclude; repeatable.")] = None,
    technology: Annotated[str, typer.Option(help="Only adapters of this kind: alora or lora.")] = "",
    revision: Annotated[str | None, typer.Option(help="Revision of hub ids without one (ID@REVISION).")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="The same, only for adapters.")] = None,
    generatable: Annotated[bool, typer.Option(help="Allow the model to generate control tokens.")] = False,
    create_io_yaml: Annotated[bool, typer.Option(help="Write a minimal io.yaml for adapters without one.")] = False,
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=prefix|suffix", help="Where to add a missing invocation text; repeatable."),
    ] = None,
    push: Annotated[str, typer.Option(help="Hub repository to upload to; --output is then optional.")] = "",
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and exit.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the adapters in the sources and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the plan, the list, or the error.")] = False,
) -> None:
    """Compose a base model and adapters into one checkpoint."""
    from granite_switch.composition.compose import prepare
    from granite_switch.core.staging import check_target

    if technology not in ("", "lora", "alora"):
        raise typer.BadParameter("must be alora or lora", param_hint="--technology")
    places = _places(place or ())
    sources = [*adapters, *(more or ())]
    if list_:
        selection = (base, base_name, tuple(include or ()), tuple(exclude or ()), technology)
        show_sources(sources, adapter_revision or revision, selection, as_json)
        return
    if output is None and not push and not dry_run:
        output = _default_output(base)
    if output and not dry_run:
        check_target(output, force=force)
    plan = prepare(
        base,
        sources,
        revision=revision,
        adapter_revision=adapter_revision,
        base_name=base_name,
        include=include or (),
        exclude=exclude or (),
        technology=technology,
        generatable=generatable,
        create_io_yaml=create_io_yaml,
        place=places,
    )
    _finish(plan, output, force, dry_run, as_json, push, private)


def _finish(
    plan: "Plan", output: Path | None, force: bool, dry_run: bool, as_json: bool, push: str, private: bool
) -> None:
    """Write, report and push a plan; with `dry_run` only report it."""
    notes(plan.notes)
    for warning in plan.warnings:
        warn(warning)
    if output and not dry_run:
        _write(plan, output, force)
    written = f"{'would be written' if dry_run else 'written'}: {output or ''} ({size(total_bytes(plan))})"
    report(plan, written if output or dry_run else "", as_json)
    if push and not dry_run:
        _push(plan, output, push, private)


def _places(options: Sequence[str]) -> dict[str, str]:
    """The values of `--place`, as a mapping."""
    if unclear := [option for option in options if "=" not in option]:
        raise typer.BadParameter(f"{unclear[0]} must be NAME=prefix or NAME=suffix", param_hint="--place")
    return {name: where for name, _, where in (option.partition("=") for option in options)}


def _default_output(base: str) -> Path:
    """BASE-switch, in the current folder."""
    from granite_switch.composition.hub import parse_ref

    name = Path(base).resolve().name if os.path.exists(base) else parse_ref(base).repo.split("/")[-1]
    return Path(f"{name}-switch")


def report(plan: "Plan", written: str, as_json: bool) -> None:
    """Print a plan: as JSON, or as a table and a line on what was written."""
    if as_json:
        record = {"switch": plan.spec.to_dict(), "vocab_size": plan.vocab_size, "bytes": total_bytes(plan)}
        say_json({**record, "warnings": list(plan.warnings), "notes": list(plan.notes)})
        return
    say(_summary(plan))
    if written:
        say(written)


def _push(plan: "Plan", output: Path | None, repository: str, private: bool) -> None:
    """Upload the model; without an output folder, write it to a temporary one first."""
    from granite_switch.composition.push import push

    with TemporaryDirectory() as temporary:
        model = output or Path(temporary) / "model"
        if not output:
            _write(plan, model, False)
        say(f"pushed: {push(model, repository, private=private)}")


def _write(plan: "Plan", output: Path, force: bool) -> None:
    from granite_switch.composition.write import write_model
    from granite_switch.core.staging import staged

    with staged(output, force=force) as folder, progress("composing", total_bytes(plan)) as advance:
        write_model(plan, folder, advance)


def _summary(plan: "Plan") -> Table:
    """The plan as a table, with a row per adapter."""
    title = f"{plan.spec.base_model}: {size(plan.checkpoint.nbytes)}, vocabulary {plan.vocab_size:,}"
    table = Table(title=title, title_justify="left")
    for heading in ("slot", "adapter", "kind", "rank", "targets", "size", "control token", "acts from"):
        justify: Literal["right", "left"] = "right" if heading in ("slot", "rank", "size") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for slot, spec in enumerate(plan.spec.adapters, 1):
        if spec.retired:
            table.add_row(str(slot), spec.name, "removed", "", "", "", f"{spec.token} = {spec.token_id}", "")
            continue
        adapter = plan.adapters[spec.name]
        ranks = sorted(set(spec.ranks.values()))
        where = repr(spec.invocation_text) if spec.technology == "alora" else "the first token"
        table.add_row(
            str(slot),
            spec.name,
            spec.technology,
            "-".join(str(r) for r in (ranks[0], ranks[-1])) if len(ranks) > 1 else str(ranks[0]),
            " ".join(spec.modules).replace("_proj", ""),
            size(adapter.nbytes),
            f"{spec.token} = {spec.token_id}",
            where,
        )
    return table


def show_sources(sources: list[str], revision: str | None, selection: tuple[Any, ...], as_json: bool) -> None:
    """Print the adapters in the sources, for every base and technology, and why some would be left out.

    Args:
        sources: of adapters.
        revision: of hub ids.
        selection: the base, and the fields of `Selection`.
        as_json: print JSON.
    """
    from granite_switch.composition.sources import Selection, own_name, scan

    base, base_name, *rest = selection
    found = scan(sources, revision, Selection(base_name or own_name(base, Path(base)), *rest))
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
        return
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


def total_bytes(plan: "Plan") -> int:
    """Of the weights that are written: the base's with its new rows, and the adapters'."""
    new_rows = sum(t.nbytes // t.shape[0] * (plan.vocab_size - t.shape[0]) for t in plan.grown.values())
    return plan.checkpoint.nbytes + plan.adapter_bytes + new_rows
