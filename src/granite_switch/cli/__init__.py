"""The command line, `granite-switch COMMAND`: one module per group of commands; engines are imported on demand.

Results go to stdout, progress and errors to stderr. Exit codes: 0, 1 (failed), 2 (usage).
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from granite_switch.cli import compose, export, generate, maintain, play, serve, upgrade
from granite_switch.cli.command import START, dress
from granite_switch.cli.console import calm_libraries, console, error, say_json
from granite_switch.errors import SwitchError
from granite_switch.vllm.check import check

app = typer.Typer(
    name="granite-switch",
    help="One Granite checkpoint, many LoRA and aLoRA adapters, switched per token.",
    pretty_exceptions_enable=False,
)
for command in (
    compose.compose,
    generate.generate,
    maintain.inspect,
    maintain.verify,
    maintain.add,
    maintain.remove,
    maintain.update,
    maintain.rename,
    maintain.extract,
    maintain.push,
    play.play,
    serve.serve,
    check,
    upgrade.upgrade,
):
    app.command(context_settings=serve.PASSES_ON if command is serve.serve else None)(command)
app.add_typer(export.group, name="export")
dress(app)


def _version(show: bool) -> None:
    if show:
        from granite_switch import __version__

        console.print(f"granite-switch {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        console.print(START, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with a message and exit code 1, not a traceback.

    Args:
        arguments: those of the process by default.
    """
    calm_libraries()
    try:
        app(arguments)
    except SwitchError as problem:
        error(problem)
        if "--json" in (sys.argv if arguments is None else arguments):
            say_json(problem.to_dict())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
