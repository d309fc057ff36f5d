"""`granite-switch serve`: vLLM's server with every adapter as a model."""

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

import typer

from granite_switch.cli.command import require
from granite_switch.errors import ServingError

_MIDDLEWARE = "granite_switch.vllm.AdapterModels"
PASSES_ON = {"ignore_unknown_options": True, "allow_interspersed_args": True}


def serve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="Composed model (local folder or hub id), then vLLM's options.", metavar="MODEL [OPTION]..."
        ),
    ],
) -> None:
    """Start vLLM's OpenAI server, with every adapter as a model, MODEL:ADAPTER.

    All options are passed to vLLM; `vllm serve --help` lists them.
    """
    model, *options = arguments
    if model.startswith("-"):
        raise typer.BadParameter("put the model before vLLM's options", param_hint="MODEL")
    require("vllm", extra="vllm")
    _check(model, options)
    command = command_line(model, options)
    sys.stdout.flush()
    os.execv(command[0], command)


def command_line(model: str, options: list[str]) -> list[str]:
    """The command that starts the server. Our middleware is the innermost, so that others see what clients see."""
    try:
        distribution("vllm")
    except PackageNotFoundError:  # vLLM's command needs this distribution's metadata; the CPU build has another name
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    else:
        start = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    return [sys.executable, *start, "--middleware", _MIDDLEWARE, *options]


def _check(model: str, options: list[str]) -> None:
    """Raise the errors that the middleware would raise, before the engine starts."""
    from granite_switch.core.files import inside
    from granite_switch.core.legacy import UPGRADE, legacy_format
    from granite_switch.core.records import read_config
    from granite_switch.vllm.serve import template_problem, template_text

    if os.path.isdir(model):
        config = read_config(inside(Path(model), "config.json"))
        if legacy_format(config):
            raise ServingError(
                f"{model} has a legacy format, which this command does not serve (`vllm serve` takes formats 2 and 3)",
                hint=UPGRADE,
            )
        if "switch" not in config:
            raise ServingError(f"{model} is not a composed model", hint="make one with granite-switch compose")
    if (value := _option(options, "--chat-template")) and (problem := template_problem(template_text(value))):
        raise ServingError(f"--chat-template {problem}")


def _option(options: list[str], name: str) -> str:
    """The value of one of vLLM's options; empty if it is not given."""
    for word, following in zip(options, [*options, ""][1:], strict=True):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == name:
            return value if equals else following
    return ""
