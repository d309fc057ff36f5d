"""The OpenAI-compatible server, as a client on loopback sees it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import serving

NAMES = [None, "answerability", "citations", "guardian-core", "hallucination_detection", "query_rewrite"]
MESSAGES = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
DOCUMENTS = [{"doc_id": "1", "text": "Anna lives in Oslo."}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(composed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the composed model; gives its URL."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(composed, "switch", log, "--max-logprobs", 20) as url:
        yield url


def body(name: str | None, **more: Any) -> dict[str, Any]:
    fields = {"model": "switch", "messages": MESSAGES, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **more}
    return fields | ({"chat_template_kwargs": {"adapter_name": name}} if name else {})


def chat(server: str, name: str | None, **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server}/v1/chat/completions", json=body(name, **more), timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_each_adapter_answers_with_documents(server: str) -> None:
    answers = {name: text(chat(server, name, documents=DOCUMENTS)) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)
    assert answers != {name: text(chat(server, name)) for name in NAMES}


def test_streamed_text_is_the_same(server: str) -> None:
    for name in NAMES[:3]:
        request = body(name, stream=True)
        with httpx.stream("POST", f"{server}/v1/chat/completions", json=request, timeout=600) as stream:
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
        pieces = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
        assert "".join(pieces) == text(chat(server, name))
        assert len(pieces) > 2


def test_log_probabilities_are_json_though_control_tokens_have_none(server: str) -> None:
    answer = chat(server, "query_rewrite", logprobs=True, top_logprobs=10, prompt_logprobs=1)
    assert len(answer["choices"][0]["logprobs"]["content"]) == 8
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_structured_output(server: str) -> None:
    for name in NAMES:
        answer = chat(server, name, structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False)
        assert text(answer) in ("yes", "no")


def test_an_unknown_adapter_is_the_clients_error_and_names_those_there_are(server: str) -> None:
    answer = httpx.post(f"{server}/v1/chat/completions", json=body("nobody"), timeout=60)
    assert answer.status_code == 400
    assert "query_rewrite" in answer.text
    assert chat(server, "query_rewrite")


def test_many_at_once_answer_as_alone(server: str) -> None:
    requests = [(name, i) for i in range(10) for name in NAMES]

    def ask(request: tuple[str | None, int]) -> str:
        name, i = request
        return text(chat(server, name, messages=[{"role": "user", "content": f"Anna {i} <rewrite>"}]))

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(ask, requests)) == alone
