"""Common to all commands: `--quiet`, an example in the help, and the check for optional packages."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from granite_switch.cli import console
from granite_switch.errors import SwitchError

START = """\
One checkpoint, many LoRA and aLoRA adapters, switched per token. To get started:

  granite-switch compose BASE --adapters SOURCE --output MODEL     combine a base model and adapters in one checkpoint
  granite-switch inspect MODEL                                     show its contents
  granite-switch generate MODEL --message TEXT --adapter NAME      ask one of its adapters

BASE and SOURCE are folders or hub ids, such as ibm-granite/granite-4.0-micro, ibm-granite/granitelib-rag-r1.0.
For all commands: granite-switch --help. For one command, with an example: granite-switch COMMAND --help."""

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
    bool, typer.Option("--quiet", help="Print only errors and requested output: no progress, warnings or reports.")
]
_PASSES_ON = ("serve",)  # passes all options to another program


def dress(app: typer.Typer) -> None:
    """Add `--quiet` and the example to every registered command."""
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


def require(*modules: str, extra: str) -> None:
    """Check that an extra's modules are installed.

    Raises:
        SwitchError: some are not.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise SwitchError(f"not installed: {', '.join(missing)}", hint=f"pip install 'granite-switch[{extra}]'")


def _with_quiet(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the option `--quiet`, which is handled here."""

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
