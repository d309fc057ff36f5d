"""`granite-switch export`: write the model in another engine's format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granite_switch.cli import options
from granite_switch.cli.console import notes, progress, say, size, warn

if TYPE_CHECKING:
    from granite_switch.gguf import Plan

_LIMITS = (
    "llama.cpp supports one adapter per sequence, from its control token to the end; "
    "start a new sequence for another adapter or the base"
)


group = typer.Typer(no_args_is_help=True, help="Write the model in another engine's format.")


@group.command()
def gguf(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to create.")],
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0; by default the model's own dtype.")] = "",
    pre: Annotated[str, typer.Option(help="llama.cpp's pre-tokenizer, if it cannot be detected.")] = "",
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Also write Ollama Modelfiles.")] = False,
    revision: options.Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write one GGUF file for llama.cpp, with all adapters."""
    from granite_switch.composition.sources import model_folder
    from granite_switch.core.staging import check_file
    from granite_switch.gguf import OUTTYPES, export, prepare

    if outtype not in ("", *OUTTYPES):
        raise typer.BadParameter(f"must be one of {', '.join(OUTTYPES)}", param_hint="--outtype")
    check_file(output, force=force)
    folder = model_folder(model, revision)
    texts = _modelfiles(prepare(folder, outtype=outtype, pre=pre), output) if modelfile else {}
    for path in texts:
        check_file(path, force=force)
    with progress("exporting") as advance:
        plan = export(folder, output, outtype=outtype, pre=pre, force=force, progress=advance)
    for warning in plan.warnings:
        warn(warning)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    adapters = ", ".join(plan.spec.names)
    say(f"written: {output} ({size(output.stat().st_size)}, {plan.outtype}, {plan.pre}): {adapters}")
    for path in texts:
        say(f"written: {path}")
    notes([_LIMITS])


def _modelfiles(plan: "Plan", output: Path) -> dict[Path, str]:
    """Path -> text of the Ollama files next to the output: `model.Modelfile`, `model.<adapter>.Modelfile`."""
    from granite_switch.gguf.modelfile import modelfiles

    words = plan.vocabulary
    if "default" not in words.templates:
        warn("no Modelfile: the model has no chat template")
        return {}
    special = {f"{name}_token": words.tokens[index] for name, index in words.special.items()}
    texts = modelfiles(output.name, words.templates["default"], plan.spec.names, special, plan.decoder.context)
    for name in plan.spec.names:
        if name not in texts:
            warn(f"no Modelfile for {name}: the user has to write its invocation text")
    return {output.with_suffix(f".{name}.Modelfile" if name else ".Modelfile"): text for name, text in texts.items()}
