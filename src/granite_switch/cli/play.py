"""`granite-switch play`: a local web page to try a model."""

from typing import Annotated

import typer

from granite_switch.cli import options
from granite_switch.cli.command import require


def play(
    model: options.Model,
    server: Annotated[
        str, typer.Option(help="URL of a server that serves MODEL; by default transformers runs it here.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="The server's API key.", envvar="OPENAI_API_KEY")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; by default the first free one from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    device_map: options.DeviceMap = "auto",
) -> None:
    """Serve a page to chat with the adapters, compare them, and see what is cached."""
    require("gradio", "httpx", extra="play")
    from granite_switch.composition.sources import model_folder
    from granite_switch.play.engine import Engine, Model

    engine: Engine
    files = Model.read(model_folder(model))
    if server:
        from granite_switch.play.remote import Remote

        engine = Remote(server, files, api_key)
    else:
        from granite_switch.cli.generate import load

        loaded, _ = load(str(files.folder), device_map)  # before the next import: it suppresses libraries' warnings
        from granite_switch.play.local import Local

        engine = Local(loaded, files)
    from granite_switch.play.page import launch

    launch(engine, host, port, open_browser)
