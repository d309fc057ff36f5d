"""`granite-switch play`: a page on this machine to try a model on."""

from importlib.util import find_spec
from typing import Annotated

import typer

from granite_switch.errors import SwitchError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("play")(play)


def play(
    model: Annotated[str, typer.Argument(help="Composed model: local folder or hub id.", metavar="MODEL")],
    server: Annotated[
        str, typer.Option(help="URL of a server that holds MODEL; without it, transformers runs it here.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="The server's key.", envvar="OPENAI_API_KEY")] = "",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; the first that is free from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    device_map: Annotated[str, typer.Option(help="As transformers takes it.")] = "auto",
) -> None:
    """Open a page to chat through the adapters, compare them, and see what is cached.

    Example: granite-switch play out/granite-switch-sample
    """
    if missing := [name for name in ("gradio", "httpx") if find_spec(name) is None]:
        raise SwitchError(f"needs {', '.join(missing)}", hint="pip install 'granite-switch[play]'")
    from granite_switch.compose.sources import model_folder
    from granite_switch.play.engine import Engine, Model

    engine: Engine
    files = Model.read(model_folder(model))
    if server:
        from granite_switch.play.remote import Remote

        engine = Remote(server, files, api_key)
    else:
        from granite_switch.cli.generate import load

        loaded, _ = load(str(files.folder), device_map)  # before what follows: it keeps libraries' noise away
        from granite_switch.play.local import Local

        engine = Local(loaded, files)
    from granite_switch.play.page import launch

    launch(engine, host, port, open_browser)
