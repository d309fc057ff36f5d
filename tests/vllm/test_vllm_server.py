"""The OpenAI-compatible server with adapters as models, as a client on loopback sees it."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import serving

from granite_switch.core.spec import SwitchSpec

NAMES = [None, "answerability", "citations", "guardian-core", "hallucination_detection", "query_rewrite"]
MESSAGES = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
DOCUMENTS = [{"doc_id": "1", "text": "Anna lives in Oslo."}]
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(composed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the composed model under two names and an API key."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--max-logprobs", 20, "--api-key", "secret", "--trust-request-chat-template")
    with serving(composed, "switch other", log, *options) as url:
        yield httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, timeout=600)


def model(name: str | None) -> str:
    return f"switch:{name}" if name else "switch"


def body(name: str | None, **more: Any) -> dict[str, Any]:
    settings = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return {"model": model(name), "messages": MESSAGES, **settings, **more}


def by_kwargs(name: str | None, **more: Any) -> dict[str, Any]:
    fields = body(None, **more)
    return fields | ({"chat_template_kwargs": {"adapter_name": name}} if name else {})


def post(server: httpx.Client, path: str, status: int = 200, **fields: Any) -> Any:
    answer = server.post(path, json=fields)
    assert answer.status_code == status, answer.text
    return answer.json()


def chat(server: httpx.Client, name: str | None, **more: Any) -> Any:
    return post(server, CHAT, **body(name, **more))


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def refused(server: httpx.Client, path: str, **fields: Any) -> str:
    """The message of an error in OpenAI's format."""
    error = post(server, path, 400, **fields)["error"]
    assert (error["code"], set(error)) == (400, {"message", "type", "param", "code"})
    return error["message"]


def counters(server: httpx.Client, adapter: str) -> dict[str, float]:
    found = re.findall(r'^granite_switch_(\w+)_total{adapter="([^"]+)",.*} (\S+)$', server.get("/metrics").text, re.M)
    return {kind: float(value) for kind, name, value in found if name == adapter}


def test_models_are_listed_for_who_has_the_key(server: httpx.Client) -> None:
    models = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert set(models) == {f"{base}{f':{name}' if name else ''}" for base in ("switch", "other") for name in NAMES}
    assert models["other:citations"]["parent"] == "other"
    assert models["switch:query_rewrite"]["invocation"] == "<rewrite>"
    assert models["switch:citations"]["max_model_len"] == models["switch"]["max_model_len"]


@pytest.mark.parametrize("key", [None, "Bearer wrong"])
def test_nothing_is_told_without_the_key(server: httpx.Client, key: str | None) -> None:
    headers = {"authorization": key} if key else {}
    chats = (httpx.post(f"{server.base_url}{CHAT}", json=body(name), headers=headers) for name in ("citations", "no"))
    for answer in (httpx.get(f"{server.base_url}/v1/models", headers=headers), *chats):
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


def test_each_adapter_answers_by_its_name_as_by_the_templates_argument(server: httpx.Client) -> None:
    answers = {name: chat(server, name, documents=DOCUMENTS) for name in NAMES}
    assert {name: answer["model"] for name, answer in answers.items()} == {name: model(name) for name in NAMES}
    texts = {name: text(answer) for name, answer in answers.items()}
    assert len(set(texts.values())) == len(NAMES)
    assert texts == {name: text(post(server, CHAT, **by_kwargs(name, documents=DOCUMENTS))) for name in NAMES}
    assert texts != {name: text(chat(server, name)) for name in NAMES}
    other = chat(server, "citations", documents=DOCUMENTS, model="other:citations")
    assert (text(other), other["model"]) == (texts["citations"], "other:citations")


def test_streamed_text_is_the_same(server: httpx.Client) -> None:
    for name in NAMES[:3]:
        with server.stream("POST", CHAT, json=body(name, stream=True)) as stream:
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(pieces) == text(chat(server, name))
        assert len(pieces) > 2
        assert {chunk["model"] for chunk in chunks} == {model(name)}


def test_the_other_ways_to_ask_give_the_same(server: httpx.Client, spec: SwitchSpec) -> None:
    for name in NAMES[1:]:
        wanted, asked = text(chat(server, name)), {"model": model(name), "temperature": 0}
        response = post(server, "/v1/responses", **asked, input=MESSAGES, max_output_tokens=8)
        message = post(server, "/v1/messages", **asked, messages=MESSAGES, max_tokens=8)
        batch = post(server, f"{CHAT}/batch", **asked, messages=[MESSAGES], max_tokens=8)
        ids = post(server, "/tokenize", model=model(name), messages=MESSAGES)["tokens"]
        prompt = post(server, "/v1/completions", **asked, prompt=ids, max_tokens=8)
        for answer in (response, message, batch, prompt):
            assert answer["model"] == model(name)
        assert spec.adapter(name).token_id in ids
        for said in (response["output"][0]["content"][0]["text"], message["content"][0]["text"], text(batch)):
            assert wanted.startswith(said)  # the text may stop early at the end-of-text token
            assert said
        assert wanted.startswith(prompt["choices"][0]["text"])


@pytest.mark.parametrize(
    ("path", "fields", "event"),
    [
        ("/v1/responses", {"input": MESSAGES, "max_output_tokens": 4}, "response"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "message"),
    ],
)
def test_events_that_hold_an_answer_name_the_model(server: httpx.Client, path: str, fields: Any, event: str) -> None:
    with server.stream("POST", path, json={"model": "other:citations", "stream": True, **fields}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert {one[event]["model"] for one in events if event in one} == {"other:citations"}


def test_an_unknown_adapter_is_an_unknown_model(server: httpx.Client) -> None:
    asked = {
        "/v1/completions": {"prompt": "a"},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    }
    for path in (CHAT, "/v1/responses", "/v1/messages", "/v1/completions", "/tokenize", "/invocations"):
        for name in ("switch:nobody", "nobody", "nobody:citations"):
            error = post(server, path, 404, model=name, **asked.get(path, {"messages": MESSAGES}))["error"]
            assert name in error["message"]
            assert "not" in error["type"].lower()


def test_sagemakers_way_to_name_an_adapter_is_not_taken_for_the_base(server: httpx.Client) -> None:
    header = {"x-amzn-sagemaker-adapter-identifier": "switch:citations"}
    answer = server.post("/invocations", json=body(None), headers=header)
    assert answer.status_code == 400
    assert '"model": "NAME:ADAPTER"' in answer.json()["error"]["message"]
    assert post(server, "/invocations", **body("citations"))["model"] == "switch:citations"


def test_an_adapter_that_is_named_in_an_odd_way_is_not_taken_for_the_base(server: httpx.Client) -> None:
    """Where vLLM's own parsing would drop the name."""
    own = [{**MESSAGES[0], "adapter": "citations"}]
    short = {"temperature": 0, "max_tokens": 8}
    for status, fields in [
        (404, {"model": ["switch:citations"], "messages": MESSAGES}),
        (400, {"model": "switch", "messages": own, "prompt": "a"}),
        (400, {"model": "switch:citations", "prompt": "a", "chat_template_kwargs": "x"}),
        (400, {"model": "switch:citations", "prompt": "a", "truncate_prompt_tokens": "1"}),
    ]:
        assert post(server, "/invocations", status, **short, **fields)["error"]["code"] == status
    wanted = text(chat(server, "citations"))
    for ignored in ({"prompt": None}, {"input": "a"}):
        assert text(post(server, "/invocations", **body(None, messages=own, **ignored))) == wanted


def test_no_body_is_an_error_of_the_server(server: httpx.Client) -> None:
    named = json.dumps(body("citations", max_tokens=1))[:-1]
    deep = [f'{named}, "x": {"[" * depth}{"]" * depth}}}'.encode() for depth in (*range(900, 1000, 7), 100_000)]
    bodies = [b"", b"null", b"[]", b'"switch:citations"', b"{", b'{"x": "\xff"}', b'{"x": ' + b"1" * 5000 + b"}"]
    for path in (CHAT, "/invocations", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"):
        for content in (*bodies, *deep):
            answer = server.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400)
            if path in (CHAT, "/invocations") and answer.status_code == 200:
                assert answer.json()["model"] == "switch:citations"


def test_what_cannot_be_meant_is_the_clients_error(server: httpx.Client) -> None:
    kwargs = {"chat_template_kwargs": {"adapter_name": "query_rewrite"}}
    assert "citations" in refused(server, CHAT, **body("citations", **kwargs))
    assert text(chat(server, "query_rewrite", **kwargs)) == text(chat(server, "query_rewrite"))
    assert "query_rewrite" in refused(server, CHAT, **by_kwargs("nobody"))
    assert "<rewrite>" in refused(server, CHAT, **body("query_rewrite", messages=[{"role": "user", "content": "a"}]))
    assert "chat_template" in refused(server, CHAT, **body("citations", chat_template="{{ messages[0].content }}"))
    assert server.post(CHAT, content=b'{"model": "switch:cit').status_code == 400
    assert chat(server, None, model=None)["model"] == "switch"
    assert chat(server, "query_rewrite")


def test_a_prompt_of_ones_own_must_hold_the_adapters_token(server: httpx.Client, spec: SwitchSpec) -> None:
    citations, rewrite = spec.adapter("citations"), spec.adapter("query_rewrite")
    good = [f"a {citations.token} b", [5, citations.token_id], [f"{citations.token} a", f"{citations.token} b"]]
    bad = ["a", [5, 6], [f"{citations.token} a", "b"], f"{citations.token} a {rewrite.token}", [[5, rewrite.token_id]]]
    for prompt in (*good, [[rewrite.token_id, citations.token_id]]):
        answer = post(server, "/v1/completions", model="switch:citations", prompt=prompt, max_tokens=1)
        assert answer["model"] == "switch:citations"
    for prompt in bad:
        said = refused(server, "/v1/completions", model="switch:citations", prompt=prompt, max_tokens=1)
        assert citations.token in said


def test_a_control_token_is_never_cut_off(server: httpx.Client, spec: SwitchSpec) -> None:
    for name in NAMES[1:]:
        ids = post(server, "/tokenize", model=model(name), messages=MESSAGES)["tokens"]
        for limit in (2, len(ids) - 2, len(ids)):
            for side, kept in (("left", ids[-limit:]), ("right", ids[:limit])):
                fields = body(name, truncate_prompt_tokens=limit, truncation_side=side)
                wanted = 200 if spec.adapter(name).token_id in kept else 400
                assert server.post(CHAT, json=fields).status_code == wanted
    assert "truncat" in refused(server, CHAT, **body("citations", truncate_prompt_tokens=4))
    assert "truncat" in refused(server, CHAT, **by_kwargs("citations", truncate_prompt_tokens=4))
    assert chat(server, "citations", truncate_prompt_tokens=1000)["usage"]["prompt_tokens"] > 4
    prompt = [spec.adapter("citations").token_id, *[5] * 20]
    fields = {"model": "switch", "prompt": prompt, "max_tokens": 1}
    assert "truncate" in refused(server, "/v1/completions", **fields, truncate_prompt_tokens=10)
    assert post(server, "/v1/completions", **fields, truncate_prompt_tokens=30)


def test_requests_are_counted_by_adapter(server: httpx.Client) -> None:
    content = [{"role": "user", "content": "Anna lives in Oslo. " * 30 + "<rewrite>"}]
    before = counters(server, "query_rewrite")
    usage = chat(server, "query_rewrite", messages=content)["usage"]
    with server.stream("POST", CHAT, json=body("query_rewrite", messages=content, stream=True)) as stream:
        stream.read()
    after = counters(server, "query_rewrite")
    gained = {kind: value - before.get(kind, 0) for kind, value in after.items()}
    assert gained["requests"] == 2
    assert gained["prompt_tokens"] == 2 * usage["prompt_tokens"]
    assert usage["prompt_tokens"] - 32 <= gained["cached_tokens"] < 2 * usage["prompt_tokens"]
    assert "vllm:prefix_cache_hits_total{" in server.get("/metrics").text


def test_log_probabilities_are_json_though_control_tokens_have_none(server: httpx.Client) -> None:
    answer = chat(server, "query_rewrite", logprobs=True, top_logprobs=10, prompt_logprobs=1)
    assert len(answer["choices"][0]["logprobs"]["content"]) == 8
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_structured_output(server: httpx.Client) -> None:
    for name in NAMES:
        answer = chat(server, name, structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False)
        assert text(answer) in ("yes", "no")


def test_many_at_once_answer_as_alone(server: httpx.Client) -> None:
    requests = [(name, i) for i in range(10) for name in NAMES]

    def ask(request: tuple[str | None, int]) -> tuple[str, str]:
        name, i = request
        answer = chat(server, name, messages=[{"role": "user", "content": f"Anna {i} <rewrite>"}])
        return answer["model"], text(answer)

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(ask, requests)) == alone


def test_what_is_refused_at_the_start(composed: Path, base: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0].content }}")
    for folder, options in (
        (composed, ("--chat-template", template)),
        (composed, (f"--chat_template={template}",)),
        (base, ()),
    ):
        log = tmp_path / "log"
        with (
            pytest.raises(AssertionError, match=r"--chat-template|composed model"),
            serving(folder, "m", log, *options),
        ):
            pass
