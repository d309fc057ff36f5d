"""OpenAI's client, LangChain's and LiteLLM, unmodified, call every adapter of the sample and reuse the cache.

They run in their own environment, as do the examples in docs/serving.md.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from artefacts import ROOT
from conftest import serving

sys.path.insert(0, str(ROOT / "sample"))

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
TASKS = ("answerability", "citations", "hallucination_detection", "query_rewrite")
CLIENTS = ("openai", "langchain", "litellm")
FACTS = " ".join(f"The job of {name} is {job}." for name in ("Edith", "Oskar", "Maud") for job in ("plumber", "hunter"))
# messages and their adapters; the first is long, so that 95 % is more than a cache block
TURNS = [
    (f"{FACTS * 16} What is the job of Edith?", "base"),
    ("What does Maud eat?", "answerability"),
    ("<rewrite> Write the last question so that it stands alone.", "query_rewrite"),
    ("Quote the documents for each sentence of the last answer.", "citations"),
    ("And Hilda?", "answerability"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The sample served as MODEL with an API key; yields the URL of its API."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(sample, "MODEL", log, "--api-key", "secret", "--enable-prompt-tokens-details") as url:
        yield f"{url}/v1"


def run(server: str, client: str, **given: Any) -> Any:
    """What a client gets."""
    python = PYTHON if PYTHON.exists() or client != "openai" else Path(sys.executable)
    if not python.exists():
        pytest.skip(f"{PYTHON.parents[1].name} is not there (make test-vllm makes it)")
    command = [python, Path(__file__).parent / "clients.py", client, server]
    text = json.dumps({"base": "MODEL", "requests": [], "turns": [], **given})
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # otherwise it fetches prices from the network
    result = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(server: str) -> dict[str, Any]:
    """For each adapter, an example and the server's answer when the template's argument names the adapter."""
    import world

    result = {}
    for task in TASKS:
        example = world.examples(task, 1)[0]
        body = {"model": "MODEL", "messages": example.messages, "temperature": 0, "max_tokens": 40}
        body["chat_template_kwargs"] = {"adapter_name": task}
        answer = httpx.post(
            f"{server}/chat/completions", json=body, headers={"authorization": "Bearer secret"}, timeout=600
        )
        result[task] = (example.messages, answer.json()["choices"][0]["message"]["content"])
    return result


@pytest.mark.parametrize("client", CLIENTS)
def test_every_adapter_is_called_by_name(client: str, server: str, expected: dict[str, Any]) -> None:
    requests = [
        {"model": f"MODEL:{task}", "messages": messages, "stream": stream}
        for task, (messages, _) in expected.items()
        for stream in (False, True)
    ]
    found = run(server, client, requests=requests)
    assert [m.removeprefix("openai/") for m in found["models"]] == ["MODEL", *(f"MODEL:{task}" for task in TASKS)]
    for request, answer in zip(requests, found["answers"], strict=True):
        wanted = expected[request["model"].removeprefix("MODEL:")][1]
        assert (answer["model"].removeprefix("openai/"), answer["text"]) == (request["model"], wanted)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_conversation_through_several_adapters_comes_from_the_cache(client: str, server: str) -> None:
    """The client keeps only the messages, and the server does not recompute earlier turns."""
    (first, adapter), *more = TURNS
    hits_before = hits(server)
    turns = run(server, client, turns=[(f"This is {client}. {first}", adapter), *more])["turns"]
    assert hits(server) - hits_before == sum(turn["cached"] for turn in turns)
    before = 0
    for turn in turns:
        assert turn["cached"] >= 0.95 * before
        before = turn["prompt"] + turn["completion"]


def hits(server: str) -> float:
    """vLLM's counter of tokens from the prefix cache."""
    text = httpx.get(f"{server.removesuffix('/v1')}/metrics").text
    return sum(float(value) for value in re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.M))


def examples() -> list[str]:
    """The Python that docs/serving.md shows."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "http://localhost:8000/v1" in code]


@pytest.mark.parametrize("number", range(len(examples())))
def test_what_the_page_shows_runs(number: int, server: str) -> None:
    code = examples()[number].replace("http://localhost:8000/v1", server).replace('api_key="none"', 'api_key="secret"')
    python = PYTHON if PYTHON.exists() else Path(sys.executable)
    if not PYTHON.exists() and re.search("langchain|litellm", code):
        pytest.skip(f"{PYTHON.parents[1].name} is not there (make test-vllm makes it)")
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip()


def test_the_page_shows_a_request_with_curl(server: str) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"curl \S+/v1/chat/completions .*? -d '(.*?)'", page, re.S)
    answer = httpx.post(
        f"{server}/chat/completions", json=json.loads(body), headers={"authorization": "Bearer secret"}, timeout=600
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == json.loads(body)["model"]
