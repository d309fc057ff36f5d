"""What every command has beside its own options: `--quiet`, and an example in its help."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

from granite_switch.cli import console

START = """\
One checkpoint, many LoRA and aLoRA adapters, switched per token. To begin with:

  granite-switch compose BASE --adapters SOURCE --output MODEL     put a base model and adapters into one checkpoint
  granite-switch inspect MODEL                                     see what is in it
  granite-switch generate MODEL --message TEXT --adapter NAME      ask one of its adapters

BASE and SOURCE are folders or hub ids: ibm-granite/granite-4.0-micro, ibm-granite/granitelib-rag-r1.0.
All commands: granite-switch --help. One of them, with an example: granite-switch COMMAND --help."""

EXAMPLES: Mapping[str, str] = {
    "compose": "compose ibm-granite/granite-4.0-micro --adapters ibm-granite/granitelib-rag-r1.0 --output my-model",
    "gguf": "export gguf my-model --output my-model.gguf --outtype q8_0",
    "generate": "generate my-model --message 'Where does Ada live?' --document notes.txt --adapter answerability",
    "inspect": "inspect my-model --plot strengths.svg",
    "verify": "verify my-model --deep --against ibm-granite/granitelib-rag-r1.0",
    "add": "add my-model ibm-granite/granitelib-core-r1.0 --include uncertainty",
    "update": "update my-model ./answerability",
    "remove": "remove my-model citations",
    "rename": "rename my-model query_rewrite rewrite",
    "extract": "extract my-model citations --output citations",
    "push": "push my-model me/my-model --private",
    "serve": "serve my-model --max-model-len 8192",
    "check": "check my-model",
    "play": "play my-model",
    "upgrade": "upgrade old-model new-model --dry-run",
}
_Quiet = Annotated[
    bool, typer.Option("--quiet", help="Errors and what was asked for only: no progress, warnings or tables.")
]
_PASSES_ON = ("serve",)  # its options are another program's


def dress(app: typer.Typer) -> None:
    """Give every command that is registered `--quiet` and its example."""
    for info in app.registered_commands:
        assert info.callback
        name = info.name or info.callback.__name__
        if name in EXAMPLES:
            info.epilog = f"Example: granite-switch {EXAMPLES[name]}"
        if name not in _PASSES_ON:
            info.callback = _with_quiet(info.callback)
    for group in app.registered_groups:
        if group.typer_instance:
            dress(group.typer_instance)


def _with_quiet(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with one more option, which it does not see."""

    @wraps(command)
    def run(*args: Any, quiet: bool, **kwargs: Any) -> Any:
        if quiet:
            console.be_quiet()
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=False)
    more = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), more])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "quiet": _Quiet}
    return run
