"""The server's middleware around a small application: what HTTP can do to it, without an engine."""

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
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.middleware.gzip import GZipMiddleware
from starlette.testclient import TestClient
from transformers import AutoTokenizer
from typer.testing import CliRunner

from granite_switch.cli import app as commands
from granite_switch.cli.serve import command_line
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import SwitchError
from granite_switch.vllm import AdapterModels
from granite_switch.vllm.calls import Catalogue, Refused
from granite_switch.vllm.engine import Asked, asked, watch

MESSAGES = [{"role": "user", "content": "Where?"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def spec(composed: Path) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads((composed / "config.json").read_text())["switch"])


@pytest.fixture(scope="module")
def catalogue(spec: SwitchSpec) -> Catalogue:
    return Catalogue(("m", "m:other"), spec, max_model_len=100)


def application(composed: Path, spec: SwitchSpec, **options: Any) -> FastAPI:
    """An application with vLLM's state that answers with the body that it got."""
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value, indent=1).encode()))
@example(b'{"model": "m:citations"')
@example(b'{"model": "m:citations", "model": "m"}')
@example(b'{"model": "m", "messages": [{"role": "user", "content": "a", "adapter": null}]}')
@example(b'{"model": null}')
@example(b'{"model": ["m:citations"], "chat_template_kwargs": {}}')
@example(b'{"model": "m:citations", "chat_template_kwargs": "x"}')
@example(b"\x1f\x8b\x08gzip")
@example(b"[" * 100_000)
def test_what_names_no_adapter_passes_byte_for_byte(catalogue: Catalogue, body: bytes) -> None:
    call = catalogue.read(CHAT, body)
    assert (call.body, call.model) == (body, "")


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
    """Each event is passed on before the next is there."""
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
    with pytest.raises(SwitchError, match=r"does not know <\|new\|>"):
        AdapterModels(lambda *_: None)._prepare(application(composed, more).state)  # type: ignore[arg-type]


def call(catalogue: Catalogue, path: str, **body: Any) -> Any:
    return catalogue.read(path, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "m:nobody"}, 404, "citations"),
        ({"model": "m:"}, 404, "`m:`"),
        ({"model": "m:other:nobody"}, 404, "`m:other`"),
        ({"model": "m:citations", "chat_template_kwargs": {"adapter_name": "query_rewrite"}}, 400, "different"),
        ({"model": "m:citations", "chat_template_kwargs": {"adapter_name": "base"}}, 400, "different"),
        ({"model": "m", "chat_template_kwargs": {"adapter_name": 7}}, 400, "no adapter 7"),
        ({"model": "m", "chat_template_kwargs": {"adapter_name": "nobody"}}, 400, "query_rewrite"),
        ({"model": "m:citations", "messages": [{"role": "user", "adapter": "query_rewrite"}]}, 400, "different"),
        ({"model": "m", "messages": [{"role": "assistant", "adapter": "citations"}]}, 400, "only what a user says"),
        ({"model": "m", "messages": [{"role": "user", "adapter": "nobody"}]}, 400, "nobody"),
        ({"model": "m", "messages": [[{"role": "user", "adapter": "citations"}]]}, 400, "batch"),
        ({"model": "m", "chat_template_kwargs": {"message_adapters": "citations"}}, 400, "list"),
        ({"previous_response_id": "r", "chat_template_kwargs": {"message_adapters": []}}, 400, "previous_response_id"),
        ({"model": "m", "chat_template": "{{ messages }}"}, 400, "chat_template"),
        ({"model": "m", "chat_template_kwargs": {"chat_template": "{{ messages }}"}}, 400, "chat_template"),
        (
            {"truncate_prompt_tokens": 9, "messages": [{"role": "user", "adapter": "citations"}]},
            400,
            "truncate",
        ),
        (
            {
                "chat_template_kwargs": {"message_adapters": ["citations"]},
                "messages": [{"role": "user", "adapter": "query_rewrite"}],
            },
            400,
            "message_adapters",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(catalogue: Catalogue, body: Any, status: int, said: str) -> None:
    with pytest.raises(Refused) as refused:
        call(catalogue, CHAT, **body)
    assert refused.value.status == status
    assert said in refused.value.message


def test_the_longest_served_name_wins(catalogue: Catalogue) -> None:
    found = call(catalogue, CHAT, model="m:other:citations", messages=MESSAGES)
    assert (json.loads(found.body)["model"], found.model) == ("m:other", "m:other:citations")
    assert call(catalogue, CHAT, model="m:other", messages=MESSAGES).model == ""


def test_adapters_of_messages_reach_the_template_which_vllm_gives_no_fields_of_its_own(catalogue: Catalogue) -> None:
    first = {"role": "user", "content": "a", "adapter": "citations"}
    tool = {"role": "user", "content": [{"type": "tool_result"}]}
    last = {"role": "user", "content": "b"}
    messages: list[Any] = [{"role": "system", "content": "s"}, first, {"role": "assistant", "content": "x"}, tool, last]
    found = call(catalogue, CHAT, model="m:query_rewrite", messages=messages)
    body = json.loads(found.body)
    assert body["chat_template_kwargs"]["message_adapters"] == ["citations", "query_rewrite"]
    assert body["messages"][1] == {"role": "user", "content": "a"}
    assert found.slot == catalogue.spec.slot("query_rewrite")
    found = call(catalogue, "/v1/responses", model="m", input=messages)
    assert json.loads(found.body)["chat_template_kwargs"] == {"message_adapters": ["citations", None]}
    assert found.slot == 0
    earlier = {"message_adapters": ["citations"]}  # a list may end before the turn to come
    found = call(catalogue, CHAT, model="m:query_rewrite", messages=[last, last], chat_template_kwargs=earlier)
    assert found.slot == catalogue.spec.slot("query_rewrite")
    found = call(catalogue, CHAT, model="m", messages=[last, last], chat_template_kwargs=earlier)
    assert found.slot == 0
    found = call(catalogue, CHAT, model="m", messages=[last], chat_template_kwargs=earlier)
    assert found.slot == catalogue.spec.slot("citations")
    old = replace(catalogue, per_message=False)
    with pytest.raises(Refused, match="compose the model"):
        call(old, CHAT, model="m", messages=messages)


def test_the_servers_default_adapter_is_expected(catalogue: Catalogue) -> None:
    default = replace(catalogue, defaults={"adapter_name": "citations"})
    assert call(default, CHAT, model="m", messages=MESSAGES).slot == catalogue.spec.slot("citations")
    assert call(default, CHAT, model="m:query_rewrite", messages=MESSAGES).slot == catalogue.spec.slot("query_rewrite")


def test_prompts_that_hold_control_tokens_are_not_cut(catalogue: Catalogue) -> None:
    control = catalogue.spec.adapter("citations")
    harmless = [
        [1] * 500,
        "x" * 500,
        [*[1] * 8, control.token_id],
        f"a{control.token}",
        [[1] * 500, [control.token_id]],
    ]
    cut = [[1] * 8 + [control.token_id] * 3, [[1], [1] * 10 + [control.token_id]], "x" * 40 + control.token]
    for prompt, limit in [*((p, 30) for p in harmless), ([control.token_id] * 99, -1)]:
        assert call(catalogue, "/v1/completions", prompt=prompt, truncate_prompt_tokens=limit).slot is None
    for prompt, limit in [*((p, 10) for p in cut), ([control.token_id] * 100, -1)]:
        with pytest.raises(Refused, match="truncate_prompt_tokens"):
            call(catalogue, "/v1/completions", prompt=prompt, truncate_prompt_tokens=limit)


class Engine:
    """Answers each prompt with three outputs; notes who was closed early."""

    def __init__(self) -> None:
        self.closed = False

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            for number in range(3):
                yield SimpleNamespace(num_cached_tokens=2, number=number)
        finally:
            self.closed = True


def counted(name: str) -> list[float]:
    from prometheus_client import REGISTRY

    labels = {"model_name": "watched", "adapter": name}
    kinds = ("requests", "prompt_tokens", "cached_tokens")
    return [REGISTRY.get_sample_value(f"granite_switch_{kind}_total", labels) or 0.0 for kind in kinds]


def test_the_engine_gets_only_prompts_of_the_adapter_that_was_named(spec: SwitchSpec) -> None:
    engine = Engine()
    watch(engine, spec, "watched")
    watch(engine, spec, "watched")  # a second time changes nothing
    citations, rewrite = spec.adapter("citations").token_id, spec.adapter("query_rewrite").token_id

    async def ask(slot: int | None, prompt: Any, request_id: str = "r", stop_after: int = 3) -> int:
        outputs = engine.generate(prompt, None, request_id)
        numbers = []
        async for output in outputs:
            numbers.append(output.number)
            if len(numbers) == stop_after:
                break
        await outputs.aclose()
        return len(numbers)

    def run(slot: int | None, prompt: Any, *more: Any) -> int:
        asked.set(Asked(slot=slot))
        return asyncio.run(ask(slot, prompt, *more))

    slot = spec.slot("citations")
    assert run(slot, {"prompt_token_ids": [1, rewrite, citations, 1]}) == 3
    assert run(None, {"prompt_token_ids": [citations, 1]}) == 3
    assert counted("citations") == [2, 6, 4]
    assert run(0, SimpleNamespace(prompt_token_ids=[1, citations, spec.base_token_id]), "r", 1) == 1
    assert engine.closed
    assert counted("base") == [1, 3, 2]
    for ids in ([1], [citations, rewrite], [citations, spec.base_token_id]):
        with pytest.raises(Exception, match="names citations"):
            run(slot, {"prompt_token_ids": ids})
    with pytest.raises(Exception, match="switches to citations"):
        run(0, {"prompt_token_ids": [citations]})
    with pytest.raises(Exception, match="no token ids"):
        run(slot, {"prompt": "text"})
    assert counted("citations") == [2, 6, 4]


def test_a_beam_search_is_one_request(spec: SwitchSpec) -> None:
    engine = Engine()
    watch(engine, spec, "watched")
    before = counted("query_rewrite")
    asked.set(Asked(slot=spec.slot("query_rewrite")))

    async def ask() -> None:
        ids = [spec.adapter("query_rewrite").token_id]
        for step in range(3):
            for beam in range(2):
                prompt = {"prompt_token_ids": [*ids, *[spec.adapter("citations").token_id] * step]}
                async for _ in engine.generate(prompt, None, request_id=f"chat-1-00ff{step}-beam-{beam}"):
                    pass

    asyncio.run(ask())
    assert [b - a for a, b in zip(before, counted("query_rewrite"), strict=True)] == [1, 1, 2]


WORD = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8)


@given(
    st.lists(WORD | WORD.map(lambda word: f"--{word}") | st.sampled_from(["-tp", "-O3", "--port=1", "-h"]), max_size=6)
)
def test_options_are_vllms_own(options: list[str]) -> None:
    """What the command gets after the model is what vLLM gets, in its order."""
    if {"--help", "--"} & set(options):
        return
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_switch.cli.serve._need_vllm", lambda: None)
        patch.setattr("granite_switch.cli.serve._check", lambda *_: None)
        patch.setattr("os.execv", lambda _, command: seen.extend(command))
        CliRunner().invoke(commands, ["serve", "folder", *options], catch_exceptions=False)
    assert seen == command_line("folder", options)


def test_vllms_own_command_starts_where_its_metadata_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite_switch.cli.serve.distribution", lambda name: name)
    start = ["-m", "vllm.entrypoints.cli.main", "serve", "folder", "--middleware", "granite_switch.vllm.AdapterModels"]
    assert command_line("folder", ["--port", "1"])[1:] == [*start, "--port", "1"]
