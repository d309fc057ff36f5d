"""The server's middleware around a small application, over HTTP but without an engine."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.testclient import TestClient
from transformers import AutoTokenizer
from typer.testing import CliRunner

from granite_switch.cli import app as commands
from granite_switch.cli.serve import command_line
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import SwitchError
from granite_switch.vllm import AdapterModels

MESSAGES = [{"role": "user", "content": "Where?"}]
CHAT = "/v1/chat/completions"


def application(composed: Path, spec: SwitchSpec, **options: Any) -> FastAPI:
    """An application with vLLM's state that echoes the request's body."""
    app = FastAPI()
    defaults = {"model": "m", "served_model_name": ["m"], "chat_template": None, "default_chat_template_kwargs": None}
    app.state.args = SimpleNamespace(**{**defaults, **options})
    config = SimpleNamespace(hf_config=SimpleNamespace(switch_spec=spec), max_model_len=100)
    app.state.vllm_config = SimpleNamespace(model_config=config)
    tokenizer = AutoTokenizer.from_pretrained(composed)
    app.state.engine_client = SimpleNamespace(
        renderer=SimpleNamespace(get_tokenizer=lambda: tokenizer), generate=lambda *_: None
    )

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "m", "parent": None}, {"id": "a-lora", "parent": "m"}]}

    @app.post(CHAT)
    async def chat(request: Request) -> Any:
        return {"model": "m", "id": "ü", "got": (await request.body()).decode("utf-8", "replace")}

    @app.post("/v1/responses")
    async def stream(request: Request) -> Any:
        parts = json.loads(await request.body())["parts"]

        async def pieces() -> AsyncIterator[bytes]:
            for part in parts:
                yield part.encode()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app.add_middleware(AdapterModels)
    return app


@pytest.fixture(scope="module")
def client(composed: Path, spec: SwitchSpec) -> Any:
    with TestClient(application(composed, spec), root_path="/root") as client:
        yield client


def got(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["got"])


def test_importing_it_is_quick() -> None:
    code = "import sys, granite_switch.vllm as v; v.AdapterModels; print({'vllm', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_models_are_listed_with_their_adapters(client: TestClient, spec: SwitchSpec) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["m", "a-lora", *(f"m:{name}" for name in spec.names)]
    rewrite = next(card for card in cards if card["id"] == "m:query_rewrite")
    assert (rewrite["parent"], rewrite["technology"], rewrite["invocation"]) == ("m", "alora", "<rewrite>")


@given(cuts=st.lists(st.integers(0, 200), max_size=5), sized=st.booleans())
def test_a_body_may_come_in_any_pieces(client: TestClient, cuts: list[int], sized: bool) -> None:
    body = json.dumps({"model": "m:citations", "messages": MESSAGES, "x": "\ud800ü"}).encode()
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in pairwise(bounds)]
    answer = client.post(CHAT, content=body if sized else iter(pieces))
    wanted = {"model": "m", "messages": MESSAGES, "x": "\ud800ü", "chat_template_kwargs": {"adapter_name": "citations"}}
    assert got(answer) == wanted
    assert answer.json()["model"] == "m:citations"
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_of_two_keys_alike_the_last_counts_as_for_vllm(client: TestClient) -> None:
    body = b'{"model": "m", "model": "m:citations", "messages": []}'
    assert got(client.post(CHAT, content=body))["model"] == "m"


def test_a_large_body(client: TestClient) -> None:
    text = "x" * 20_000_000
    body = {"model": "m:citations", "messages": [{"role": "user", "content": text}]}
    assert got(client.post(CHAT, json=body))["messages"][0]["content"] == text


@given(cuts=st.lists(st.integers(0, 400), max_size=12), newline=st.sampled_from(["\n", "\r\n"]))
def test_a_stream_may_come_in_any_pieces(client: TestClient, cuts: list[int], newline: str) -> None:
    events = [
        ': keep-alive {"model":"m"}',
        'data: {"model":"m","choices":[{"delta":{"content":"\\"model\\":\\"m\\" \\u00fc"}}]}',
        "event: response.created",
        'data: {"response":{"model":"m","tools":[{"model":"m"}]},"n":0.1}',
        'data: {"type":"message_start","message":{"model":"m"}}',
        'data: {"delta":"m"}',
        "data: {broken",
        "data: [DONE]",
    ]
    text = "".join(event + newline * 2 for event in events)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(bounds)]
    answer = client.post("/v1/responses", json={"model": "m:citations", "input": "", "parts": parts})
    lines = [line for line in answer.text.splitlines() if line]
    for line, event in zip(lines, events, strict=True):
        if not event.startswith("data: {") or event == "data: {broken":
            assert line == event
            continue
        wanted = json.loads(event[6:])
        for holder in (wanted, wanted.get("response"), wanted.get("message")):
            if holder and "model" in holder:
                holder["model"] = "m:citations"
        assert json.loads(line[6:]) == wanted
    base = client.post("/v1/responses", json={"model": "m", "input": "", "parts": parts})
    assert base.text == text


def test_a_stream_comes_as_it_is_written(composed: Path, spec: SwitchSpec) -> None:
    """Each event is passed on before the next one arrives."""
    sent: list[bytes] = []

    async def run() -> None:
        async def inner(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for number in range(3):
                event = b'data: {"model":"m","n":%d}\n\n' % number
                await send({"type": "http.response.body", "body": event, "more_body": True})
                assert sent[-1] == b'data: {"model":"m:citations","n":%d}\n\n' % number
            await send({"type": "http.response.body", "body": b""})

        await plain(inner, application(composed, spec), {"model": "m:citations", "messages": MESSAGES}, sent)

    asyncio.run(run())
    assert len(sent) == 4


async def plain(inner: Any, app: FastAPI, body: Any, sent: list[bytes], messages: Sequence[Any] = ()) -> None:
    """Send a body through the middleware around an ASGI function."""
    waiting = list(messages) or [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "app": app}
    await AdapterModels(inner)(scope, receive, send)


def test_a_client_that_leaves_is_seen_to_leave(composed: Path, spec: SwitchSpec) -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())

    half = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    asyncio.run(plain(inner, application(composed, spec), None, [], half))
    assert seen == [{"type": "http.disconnect"}]


def test_nothing_is_read_or_answered_before_the_application_wants_it(composed: Path, spec: SwitchSpec) -> None:
    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)

    sent: list[bytes] = []
    unread = [{"type": "never read"}]
    asyncio.run(plain(refuses, application(composed, spec), None, sent, unread))
    assert sent == [b'{"error":"Unauthorized"}']


def test_other_kinds_of_connection_pass(composed: Path, spec: SwitchSpec) -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope: Any = {"type": "websocket", "path": CHAT}
    asyncio.run(AdapterModels(inner)(scope, len, repr))
    assert seen == [(scope, len, repr)]


def test_compression_inside_does_not_hide_answers(composed: Path, spec: SwitchSpec) -> None:
    app = application(composed, spec)
    inside = app.user_middleware.pop()
    app.add_middleware(GZipMiddleware, minimum_size=1)
    app.user_middleware.insert(0, inside)
    client = TestClient(app)
    answer = client.post(CHAT, json={"model": "m:citations", "messages": MESSAGES})
    assert answer.json()["model"] == "m:citations"
    assert "m:citations" in client.get("/v1/models").text


@pytest.mark.parametrize("key", [True, False])
def test_a_refusal_reaches_the_client_through_any_middleware(composed: Path, spec: SwitchSpec, key: bool) -> None:
    """Starlette's BaseHTTPMiddleware, which vLLM and others derive from, would change an exception."""

    async def check(request: Request, following: Any) -> Any:
        if "authorization" not in request.headers:
            return JSONResponse({"error": "Unauthorized"}, 401)
        response = await following(request)
        response.headers["x-of-another"] = "kept"
        return response

    app = application(composed, spec)
    inside = app.user_middleware.pop()
    app.add_middleware(BaseHTTPMiddleware, dispatch=check)
    app.user_middleware.insert(0, inside)
    client = TestClient(app, raise_server_exceptions=False, headers={"authorization": "right"} if key else None)
    for body, status, said in [
        ({"model": "m:nobody", "messages": MESSAGES}, 404, "m:nobody"),
        ({"model": "m", "chat_template": "{{ messages }}", "messages": MESSAGES}, 400, "chat_template"),
    ]:
        answer = client.post(CHAT, json=body)
        if not key:
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
            continue
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status)
        assert said in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-of-another"] == "kept"
        assert int(answer.headers["content-length"]) == len(answer.content)
    for content in (b"[" * 5000, b'{"model": "m", "x": "\xff"}'):
        answer = client.post(CHAT, content=content)
        assert answer.status_code == (400 if key else 401)


def test_an_answer_too_deep_to_rewrite_comes_as_it_is(client: TestClient) -> None:
    deep = 'data: {"model":"m","x":' + "[" * 5000 + "]" * 5000 + "}\n\n"
    answer = client.post("/v1/responses", json={"model": "m:citations", "input": "", "parts": [deep]})
    assert answer.text == deep


def test_a_path_below_the_servers_root(client: TestClient) -> None:
    answer = client.post(f"/root{CHAT}", json={"model": "m:citations", "messages": MESSAGES})
    assert answer.json()["model"] == "m:citations"
    assert "m:citations" in client.get("/root/v1/models").text


def test_a_path_with_a_slash_at_its_end_is_led_to_the_one_without(client: TestClient) -> None:
    answer = client.post(f"{CHAT}/", json={"model": "m:citations", "messages": MESSAGES})
    assert [step.status_code for step in answer.history] == [307]
    assert answer.json()["model"] == "m:citations"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat_template": "{{ messages }}"}, "--chat-template"),
        ({"served_model_name": ["m", "m:citations"]}, "m:citations"),
        ({"default_chat_template_kwargs": {"adapter_name": "nobody"}}, "nobody"),
        ({"spec": None}, "not a switch model"),
    ],
)
def test_what_cannot_be_served_fails_at_the_start(composed: Path, spec: SwitchSpec, options: Any, said: str) -> None:
    app = application(composed, options.pop("spec", spec), **options)
    sent: list[Any] = []

    async def run() -> None:
        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app({"type": "lifespan"}, receive, send)

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert said in sent[0]["message"]


def test_another_models_template_is_refused(composed: Path, spec: SwitchSpec) -> None:
    more = replace(spec, adapters=(*spec.adapters, replace(spec.adapters[0], name="new", token="<|new|>", token_id=5)))
    with pytest.raises(SwitchError, match=r"does not contain <\|new\|>"):
        AdapterModels(lambda *_: None)._prepare(application(composed, more).state)  # type: ignore[arg-type]


WORD = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8)


@given(
    st.lists(WORD | WORD.map(lambda word: f"--{word}") | st.sampled_from(["-tp", "-O3", "--port=1", "-h"]), max_size=6)
)
def test_options_are_vllms_own(options: list[str]) -> None:
    """The arguments after the model are passed to vLLM in order."""
    if {"--help", "--"} & set(options):
        return
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_switch.cli.serve.require", lambda *_, **__: None)
        patch.setattr("granite_switch.cli.serve._check", lambda *_: None)
        patch.setattr("os.execv", lambda _, command: seen.extend(command))
        CliRunner().invoke(commands, ["serve", "folder", *options], catch_exceptions=False)
    assert seen == command_line("folder", options)


def test_vllms_own_command_starts_where_its_metadata_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite_switch.cli.serve.distribution", lambda name: name)
    start = ["-m", "vllm.entrypoints.cli.main", "serve", "folder", "--middleware", "granite_switch.vllm.AdapterModels"]
    assert command_line("folder", ["--port", "1"])[1:] == [*start, "--port", "1"]
