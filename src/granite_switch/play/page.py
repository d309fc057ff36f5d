"""The page, in Gradio: its layout and event handlers."""

import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it on import; nothing here phones home

import gradio as gr

from granite_switch.cli import trace
from granite_switch.composition.inspect import inspect, plot, strengths
from granite_switch.errors import SwitchError
from granite_switch.play import views
from granite_switch.play.engine import Ask, Engine, Sampling, Setting
from granite_switch.play.session import Session, needs_text

_INTERVAL = 0.08  # seconds between updates of a streamed answer


def launch(engine: Engine, host: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        SwitchError: the port is taken, or the host is not an address of this machine.
    """
    css = files("granite_switch.play").joinpath("page.css").read_text(encoding="utf-8")
    page = build(engine)
    try:
        _, url, _ = page.queue(default_concurrency_limit=8).launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=_theme(),
            css=css + trace.style(len(engine.files.spec.adapters)),
        )
    except (OSError, ValueError):
        place = f"port {port} is taken" if port else "no port from 7860 is free"
        raise SwitchError(f"{place}, or {host} is not an address of this machine", hint="--port N") from None
    print(f"open {url} (Ctrl-C stops the server)", flush=True)
    page.block_thread()


def build(engine: Engine) -> gr.Blocks:
    """The page for an engine."""
    page: gr.Blocks
    with gr.Blocks(title=f"Granite Switch: {engine.files.folder.name}", analytics_enabled=False) as page:
        session = gr.State(None)
        gr.HTML(views.title(engine.files.folder.name, engine.place), padding=False)
        with gr.Accordion("System prompt, documents, sampling", open=False):
            before = _before(engine)
        with gr.Tab("Chat"):
            _chat(engine, session, before)
        with gr.Tab("Side by side"):
            _compare(engine, session, before)
        with gr.Tab("Model"):
            gr.HTML(views.report(inspect(engine.files.folder), engine.files.spec), elem_id="report", padding=False)
            gr.HTML(_picture(engine.files.folder), elem_id="strengths", padding=False)
        page.load(lambda: Session(engine), None, session, api_visibility="private")
    return page


def _theme() -> gr.themes.Base:
    """A theme with system fonts, so that nothing is fetched, and WCAG AA contrast in light and dark mode."""
    subdued = ["body_text_color_subdued", "block_info_text_color", "input_placeholder_color"]
    subdued += ["block_label_text_color", "block_title_text_color"]
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", **fonts).set(
        **dict.fromkeys(subdued, "*neutral_600"),
        **{f"{name}_dark": "*neutral_300" for name in subdued},
        **{f"button_primary_background_fill{kind}": "*primary_700" for kind in ("", "_dark")},
        **{f"button_primary_background_fill_hover{kind}": "*primary_800" for kind in ("", "_dark")},
    )


def _before(engine: Engine) -> list[Any]:
    """The inputs that apply to all turns: system prompt, documents, sampling."""
    system = gr.Textbox(label="System prompt", lines=2, elem_id="system")
    documents = gr.Textbox(label="Documents", info="Separated by blank lines.", lines=4, elem_id="documents")
    with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy.", elem_id="temperature")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", elem_id="top_p")
        longest = min(2048, engine.limit)
        count = gr.Slider(
            1, longest, min(256, longest), step=1, label="Maximum answer tokens", elem_id="max_new_tokens"
        )
    return [system, documents, temperature, top_p, count]


def _chat(engine: Engine, session: gr.State, before: list[Any]) -> None:
    spec = engine.files.spec
    log = gr.HTML(views.chat([], spec), elem_id="chat", max_height=520, autoscroll=True, padding=False)
    alert = gr.HTML("", elem_id="alert", padding=False)
    adapter = gr.Radio(_choices(engine), value="base", label="Answer with", elem_id="adapter")
    need = gr.HTML("", elem_id="need", padding=False)
    text = gr.Textbox(
        label="Message", placeholder="Enter to send, Shift+Enter for a new line", max_lines=8, elem_id="message"
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
        new = gr.Button("New conversation", elem_id="new", min_width=160)
    keep = gr.Checkbox(
        True,
        label="Keep the cache",
        info="Each turn continues from the tokens before it. Otherwise the chat is rendered again, as in training.",
        elem_id="keep",
    )
    gr.Markdown("## What happened")
    lora = gr.Checkbox(False, label="Compare with LoRA semantics", elem_id="lora")
    figures = gr.HTML(views.measures([], spec, False), elem_id="figures", padding=False)
    with gr.Accordion("Every token of the last turn, in its slot's colour", open=True):
        tokens = gr.HTML("", elem_id="trace", padding=False)

    def shown(current: Session, as_lora: bool) -> list[Any]:
        return [views.measures(current.exchanges, spec, as_lora), views.sequence(current.last, engine.files)]

    def answer(current: Session, as_lora: bool, said: str, name: str, kept: bool, *form: Any) -> Iterator[list[Any]]:
        latest = 0.0
        yield [gr.skip(), "", *[gr.skip()] * 3]
        clear: Any = ""  # clear the message box once, so that text typed during the answer stays
        try:
            for _ in current.send(Ask(said, name, kept), *_read(*form)):
                if time.monotonic() - latest >= _INTERVAL:
                    latest = time.monotonic()
                    yield [views.chat(current.exchanges, spec), "", clear, *[gr.skip()] * 2]
                    clear = gr.skip()
            yield [views.chat(current.exchanges, spec), "", clear, *shown(current, as_lora)]
        except Exception as error:
            yield [views.chat(current.exchanges, spec), _told(error), said, *shown(current, as_lora)]

    def restart(current: Session, as_lora: bool) -> list[Any]:
        try:
            current.reset()
        except Exception as error:
            return [gr.skip(), _told(error), *[gr.skip()] * 2]
        return [views.chat([], spec), "", *shown(current, as_lora)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asked = [session, lora, text, adapter, keep, *before]
    answered = [log, alert, text, figures, tokens]
    for event in (send.click, text.submit):
        event(answer, asked, answered, **quiet)
    stop.click(Session.stop, session, None, queue=False, **quiet)
    new.click(restart, [session, lora], [log, alert, figures, tokens], **quiet)
    lora.change(shown, [session, lora], [figures, tokens], **quiet)
    adapter.change(lambda name: views.need(name, needs_text(engine.files.folder, name)), adapter, need, **quiet)


def _compare(engine: Engine, session: gr.State, before: list[Any]) -> None:
    spec = engine.files.spec
    names = gr.CheckboxGroup(_choices(engine), value=["base", *spec.names[:1]], label="Answer with", elem_id="several")
    text = gr.Textbox(label="Message to all of them", max_lines=8, elem_id="compare_message")
    after = gr.Checkbox(False, label="Continue the chat", elem_id="after")
    with gr.Row():
        go = gr.Button("Answer side by side", variant="primary", elem_id="compare")
        stop = gr.Button("Stop", elem_id="compare_stop")
    alert = gr.HTML("", elem_id="compare_alert", padding=False)
    answers = gr.HTML("", elem_id="compared", padding=False)

    def run(current: Session, chosen: list[str], said: str, follows: bool, *form: Any) -> list[Any]:
        try:
            found = current.compare(said, chosen, *_read(*form), follows)
        except Exception as error:
            return ["", _told(error)]
        return [views.compared(found, spec), ""]

    for event in (go.click, text.submit):
        event(run, [session, names, text, after, *before], [answers, alert], api_visibility="private")
    stop.click(Session.stop, session, None, queue=False, show_progress="hidden", api_visibility="private")


def _choices(engine: Engine) -> list[tuple[str, str]]:
    return [("base (no adapter)", "base"), *((views.choice(a), a.name) for a in engine.files.spec.active)]


def _read(system: str, documents: str, temperature: float, top_p: float, count: float) -> tuple[Setting, Sampling]:
    texts = (text.strip() for text in re.split(r"\n\s*\n", documents or ""))
    return Setting(system or "", tuple(filter(None, texts))), Sampling(temperature, top_p, int(count))


def _told(error: Exception) -> str:
    """An error as HTML; an unexpected one is also printed to stderr."""
    if isinstance(error, SwitchError):
        return views.alert(error)
    traceback.print_exception(error)
    return views.alert(SwitchError(f"{type(error).__name__}: {error}", hint="see the traceback in the terminal"))


def _picture(folder: Path) -> str:
    try:
        with tempfile.TemporaryDirectory() as place:
            plot(strengths(folder), Path(place) / "strengths.svg")
            return views.picture((Path(place) / "strengths.svg").read_bytes())
    except SwitchError as error:
        return views.alert(error)
