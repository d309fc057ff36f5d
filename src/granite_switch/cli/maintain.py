"""`granite-switch inspect`, `verify`, `add`, `remove`, `update`, `rename`, `extract` and `push`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from granite_switch.cli import options
from granite_switch.cli.compose import report
from granite_switch.cli.console import console, say, say_json, size, table, warn
from granite_switch.errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from granite_switch.composition.inspect import Report
    from granite_switch.core.spec import SwitchSpec


_DTYPES = ("float32", "bfloat16", "float16")


def inspect(
    model: Annotated[str, typer.Argument(help="Composed model: local folder, hub id or .gguf file.", metavar="MODEL")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Image file: how strongly adapters change each projection.")] = None,
) -> None:
    """Show the contents of a composed model."""
    from granite_switch.composition.inspect import inspect as look
    from granite_switch.composition.inspect import plot as draw
    from granite_switch.composition.inspect import strengths
    from granite_switch.composition.sources import model_folder
    from granite_switch.core.files import inside
    from granite_switch.core.legacy import describe, legacy_format
    from granite_switch.core.records import read_config

    if model.endswith(".gguf"):
        _inspect_gguf(Path(model), as_json)
        return
    folder = model_folder(model)
    if number := legacy_format(read_config(inside(folder, "config.json"))):
        lines = describe(folder)
        if as_json:
            say_json({"legacy_format": number, "notes": lines})
        else:
            console.print("\n".join(lines), markup=False)
        return
    found = look(folder)
    if plot:
        draw(strengths(folder), plot)
    if as_json:
        say_json(found.to_dict())
        return
    _show(found)
    if plot:
        say(f"written: {plot}")


def verify(
    model: options.Model,
    against: Annotated[
        list[str] | None, typer.Option(help="Adapter source or base model for a comparison with PEFT; repeatable.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read all weights: digests, NaN, control tokens' rows.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="With --against: float32, bfloat16 or float16.", callback=options.one_of(*_DTYPES))
    ] = "float32",
    base_name: options.BaseName = "",
    technology: options.Technology = "",
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the comparisons, or the error.")] = False,
) -> None:
    """Check a composed model's files; with --against, also compare its logits with PEFT's."""
    from granite_switch.composition.sources import model_folder
    from granite_switch.composition.verify import verify as check

    folder = model_folder(model, revision)
    spec = check(folder, deep=deep)
    results: list[Any] = []
    if not as_json:
        say(f"{model}: {len(spec.active)} adapters, no problems found")
    if against:
        base, adapters = _matched(spec, against, base_name, technology, revision)
        results = _compare(folder, adapters, base, dtype)
        if not as_json:
            say(_comparison(results, dtype))
        if wrong := [one.name for one in results if not one.within]:
            raise CheckpointError(
                f"{folder} differs from PEFT in {', '.join(wrong)}",
                hint="pass the sources that the model was composed from",
            )
    if as_json:
        say_json({"adapters": list(spec.names), "compared": [asdict(one) for one in results]})


def add(
    model: options.Model,
    sources: Annotated[list[str] | None, typer.Argument(help=options.SOURCES, metavar="SOURCE")] = None,
    new: Annotated[str, typer.Option(help="Instead of sources: name of a new, zero adapter to train.")] = "",
    rank: Annotated[int, typer.Option(help="With --new: the rank.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="With --new: lora_alpha; by default twice the rank.")] = None,
    targets: Annotated[str, typer.Option(help="With --new: linears (q_proj,v_proj); by default attention's.")] = "",
    invocation: Annotated[str, typer.Option(help="With --new: invocation text, for an aLoRA.")] = "",
    output: options.Output = None,
    base_name: options.BaseName = "",
    include: options.Include = None,
    exclude: options.Exclude = None,
    technology: options.Technology = "",
    revision: options.Revision = None,
    create_io_yaml: options.CreateIoYaml = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Add adapters. The others keep their slots and token ids."""
    from granite_switch.composition import edit, slot

    if bool(new) == bool(sources):
        raise typer.BadParameter("give either adapter sources or --new NAME", param_hint="SOURCE")
    if new:
        names = [name.strip() for name in targets.split(",") if name.strip()]
        settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": names, "invocation": invocation}
        plan = slot.add_empty(model, new, output=output, force=force, **settings)
    else:
        settings = {"revision": revision, **options.selection(base_name, include, exclude, technology)}
        plan = edit.add(model, sources or [], output=output, force=force, create_io_yaml=create_io_yaml, **settings)
    report(plan, f"written: {output or model}", as_json)


def update(
    model: options.Model,
    sources: options.Sources,
    output: options.Output = None,
    base_name: options.BaseName = "",
    include: options.Include = None,
    exclude: options.Exclude = None,
    technology: options.Technology = "",
    revision: options.Revision = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Replace adapters by others of the same name. They keep their slots and token ids."""
    from granite_switch.composition import edit

    chosen = options.selection(base_name, include, exclude, technology)
    plan = edit.update(model, sources, output=output, force=force, revision=revision, **chosen)
    report(plan, f"written: {output or model}", as_json)


def remove(
    model: options.Model,
    names: Annotated[list[str], typer.Argument(help="Names of adapters.", metavar="NAME")],
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Remove adapters. Their slots and token ids are not reused."""
    from granite_switch.composition import edit

    report(edit.remove(model, names, output=output, force=force), f"written: {output or model}", as_json)


def rename(
    model: options.Model,
    old: Annotated[str, typer.Argument(help="The adapter's name.", metavar="OLD")],
    new: Annotated[str, typer.Argument(help="Its new name.", metavar="NEW")],
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Rename an adapter. It keeps its slot and token id."""
    from granite_switch.composition import edit

    report(edit.rename(model, old, new, output=output, force=force), f"written: {output or model}", as_json)


def extract(
    model: options.Model,
    name: Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    force: options.Force = False,
) -> None:
    """Write an adapter as a PEFT adapter folder."""
    from granite_switch.composition.extract import extract as take

    say(f"written: {take(model, name, output, force=force)}")


def push(
    model: options.Local,
    repo: Annotated[str, typer.Argument(help="Hub repository: owner/name.", metavar="REPO")],
    private: options.Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Commit message.")] = "",
) -> None:
    """Verify a composed model and upload it to the hub."""
    from granite_switch.composition.push import push as upload

    url = upload(model, repo, private=private, revision=revision, message=message)
    say(f"pushed: {url}")


def _show(report: "Report") -> None:
    console.print(
        f"{report.model}: {report.base_model}, {report.parameters:,} parameters ({size(report.nbytes)}, "
        f"{', '.join(report.dtypes)}), {report.layers} layers, vocabulary {report.vocab_size:,}\n"
        f"format {report.format_version}; return to base: {report.return_to_base} = {report.return_to_base_id}"
        f"{'; control tokens can be generated' if report.generatable else ''}",
        markup=False,
    )
    headings = ["slot", "adapter", "kind", "rank", "alpha", "targets", "parameters", "size", "share"]
    headings += ["control token", "substitute", "acts from", "source", "sha256"]
    rows = [
        [
            str(one.slot),
            one.name,
            one.technology,
            str(one.ranks[0]) if one.ranks[0] == one.ranks[1] else f"{one.ranks[0]}-{one.ranks[1]}",
            f"{one.alpha:g}{' (rs)' if one.use_rslora else ''}",
            " ".join(one.target_modules).replace("_proj", ""),
            f"{one.parameters:,}",
            size(one.nbytes),
            f"{one.share:.1%}",
            f"{one.token} = {one.token_id}",
            f"{one.substitute} = {one.substitute_token_id}",
            repr(one.invocation_text) if one.invocation_text else "the first token",
            one.source,
            one.sha256[:16],
        ]
        for one in report.adapters
    ]
    console.print(table(headings, rows))
    if report.retired:
        console.print(f"removed adapters, whose slots are not reused: {', '.join(report.retired)}", markup=False)


def _inspect_gguf(path: Path, as_json: bool) -> None:
    from granite_switch.gguf.inspect import describe

    record = describe(path)
    if as_json:
        say_json(record)
        return
    for key, value in record.items():
        if key != "adapters":
            console.print(f"{key}: {size(value) if key.endswith('bytes') else value}", markup=False)
    keys = list(dict.fromkeys(key for adapter in record["adapters"] for key in adapter if key != "io_config"))
    console.print(table(keys, [[_cell(adapter.get(key, "")) for key in keys] for adapter in record["adapters"]]))


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _matched(
    spec: "SwitchSpec", sources: list[str], base_name: str, technology: str, revision: str | None
) -> tuple[Path | None, dict[str, Path]]:
    """The base among the sources, and adapter -> folder, matched by name, or by hash if it was renamed."""
    from granite_switch.composition.hub import parse_ref
    from granite_switch.composition.sources import base_folder, discover_for
    from granite_switch.core.checkpoint import sha256

    bases = [s for s in sources if (Path(s) / "config.json").is_file() or parse_ref(s).repo == spec.base_model]
    rest = [source for source in sources if source not in bases]
    if not rest:
        raise AdapterError("--against names no adapters", hint="pass the sources that the model was composed from")
    wanted = discover_for(spec, rest, base_name=base_name, technology=technology, revision=revision)
    found = {one.name: one.folder for one in wanted.found}
    hashes = {sha256(folder / "adapter_model.safetensors"): folder for folder in found.values()}
    matched = {a.name: found.get(a.name) or hashes.get(a.sha256) for a in spec.active}
    if missing := [name for name, folder in matched.items() if folder is None]:
        warn(f"not compared, because no source has them: {', '.join(missing)}")
    result = {name: folder for name, folder in matched.items() if folder}
    if not result:
        raise AdapterError("--against has none of the model's adapters", hint=f"it has {', '.join(found)}")
    return (base_folder(bases[0]) if bases else None), result


def _compare(folder: Path, adapters: dict[str, Path], base: Path | None, dtype: str) -> list[Any]:
    try:
        import granite_switch.hf  # noqa: F401  (registers the Auto classes)
        from granite_switch.composition.proof import differences
        from granite_switch.hf.verify import compare
    except ImportError as error:
        raise CheckpointError(
            f"--against needs torch, transformers and peft ({error.name} is missing)",
            hint="pip install 'granite-switch[hf]' peft",
        ) from None
    if problems := differences(folder, base):
        raise CheckpointError(
            f"{folder}: the tokenizer gives other results in transformers than the base's",
            problems=problems[:8],
            hint="compose the model again",
        )
    return list(compare(folder, adapters, base, dtype))


def _comparison(results: list[Any], dtype: str) -> Table:
    rows = [
        [
            one.name,
            f"{one.difference:.3g}",
            f"{one.largest:.3g}",
            f"{one.effect:.3g}" if one.name != "base" else "",
            "equal" if one.within else "DIFFERS",
        ]
        for one in results
    ]
    headings = ("adapter", "largest difference", "largest logit", "adapter's effect on logits", "")
    return table(headings, rows, f"composed model against PEFT, {dtype}")
