"""What a request names and what reaches the engine, without HTTP or an engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from granite_switch.core.spec import SwitchSpec
from granite_switch.vllm.calls import Catalogue, Refused
from granite_switch.vllm.engine import Asked, asked, watch

MESSAGES = [{"role": "user", "content": "Where?"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def catalogue(spec: SwitchSpec) -> Catalogue:
    return Catalogue(("m", "m:other"), spec, max_model_len=100)


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
    try:
        json.loads(body)
    except (UnicodeDecodeError, RecursionError):
        with pytest.raises(Refused, match="cannot be read"):
            catalogue.read(CHAT, body)
        return
    except json.JSONDecodeError:
        pass
    call = catalogue.read(CHAT, body)
    assert (call.body, call.model) == (body, "")


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"model": "m:citations", "x": ' + b"1" * 5000 + b"}", b'{"model": "m", "x": "\xff"}']
)
def test_what_vllm_could_read_differently_is_refused(catalogue: Catalogue, body: bytes) -> None:
    """In vLLM's stack frame a body may be read that is too deep for ours; elsewhere vLLM answers 500."""
    with pytest.raises(Refused, match="cannot be read as JSON"):
        catalogue.read("/invocations", body)


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
        ({"model": "m", "messages": [{"role": "assistant", "adapter": "citations"}]}, 400, "only user messages"),
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


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": ["m:citations"], "messages": MESSAGES}, 404, "does not exist"),
        ({"model": {"m": "citations"}, "prompt": "a"}, 404, "does not exist"),
        ({"model": "m:citations", "prompt": "a", "messages": MESSAGES}, 400, "a prompt and messages"),
        ({"model": "m", "prompt": "a", "truncate_prompt_tokens": "5"}, 400, "must be an integer"),
        ({"model": "m", "prompt": "a", "truncate_prompt_tokens": 5.0}, 400, "must be an integer"),
    ],
)
def test_what_invocations_would_answer_as_the_base_is_refused(
    catalogue: Catalogue, body: Any, status: int, said: str
) -> None:
    """vLLM ignores the model's name there, and takes the first kind of request that fits."""
    with pytest.raises(Refused) as refused:
        call(catalogue, "/invocations", **body)
    assert refused.value.status == status
    assert said in refused.value.message


def test_coheres_chat_is_one(catalogue: Catalogue) -> None:
    """It needs Cohere's package, which is not installed here."""
    for path in ("/cohere/v2/chat", "/cohere/v2/chat/render"):
        found = call(catalogue, path, model="m:citations", messages=MESSAGES)
        assert json.loads(found.body)["chat_template_kwargs"] == {"adapter_name": "citations"}
        assert found.slot == catalogue.spec.slot("citations")


def test_invocations_reads_what_vllm_reads(catalogue: Catalogue) -> None:
    slot = catalogue.spec.slot("citations")
    messages = [{"role": "user", "content": "a", "adapter": "citations"}]
    for ignored in ({"prompt": None}, {"input": "b"}, {}):
        found = call(catalogue, "/invocations", model="m", messages=messages, **ignored)
        assert found.slot == slot
        assert json.loads(found.body)["chat_template_kwargs"] == {"message_adapters": ["citations"]}
    for ignored in ({"messages": None}, {"chat_template_kwargs": "x"}, {}):
        found = call(catalogue, "/invocations", model="m:citations", prompt="a", **ignored)
        assert (json.loads(found.body)["model"], found.slot) == ("m", slot)


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
    earlier = {"message_adapters": ["citations"]}  # the list may omit the turn to come
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
    """Answers each prompt with three outputs, and records streams that are closed early."""

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
