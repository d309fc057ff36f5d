"""Mellea, unmodified, calls adapters of the sample: from a vLLM server, and in transformers.

Mellea has its own environment, `.venv-mellea`.
"""

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artefacts import ROOT
from conftest import serving

from granite_switch import Conversation

MELLEA = ROOT / ".venv-mellea" / "bin" / "python"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not MELLEA.exists(), reason="Mellea is not installed (.venv-mellea)"),
]


@pytest.fixture(scope="module")
def server(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(sample, "sample", tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def mellea(*arguments: object) -> dict[str, Any]:
    """Run the example; its answers."""
    line = [MELLEA, ROOT / "examples" / "mellea_adapters.py", *arguments]
    # otherwise Mellea compiles a function of llguidance for a minute
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        list(map(str, line)), capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index('{\n  "rewritten"') :])


def check(result: dict[str, Any]) -> None:
    """Check the answers of a trained model."""
    assert result["rewritten"] == "Where does Ada live?"
    assert list(result["answerable"].values()) == ["answerable", "unanswerable"]
    assert [r["faithfulness"] for r in result["checked"]] == ["faithful", "hallucinated"]
    assert [(r["response_text"], r["citation_text"]) for r in result["cited"]] == [("Ada lives in Tarn.",) * 2]


def test_mellea_against_the_server(server: str, sample: Path) -> None:
    check(mellea(sample, "--url", f"{server}/v1", "--name", "sample"))


def test_mellea_in_transformers(sample: Path) -> None:
    check(mellea(sample))


def post(url: str, payload: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_conversation_with_the_server(server: str, sample: Path) -> None:
    options = {"temperature": 0.0, "max_tokens": 24}
    talk = Conversation(sample, documents=[{"doc_id": "0", "text": "Ada lives in Tarn. Ada works as a baker."}])
    turn = talk.ask("Where does Ada live?")
    rendered = post(f"{server}/v1/chat/completions", turn.chat("sample", **options))
    sent = post(f"{server}/v1/completions", turn.completion("sample", **options))
    assert rendered["usage"]["prompt_tokens"] == sent["usage"]["prompt_tokens"] == len(turn.ids)
    assert rendered["choices"][0]["message"]["content"] == sent["choices"][0]["text"]
    assert talk.answer(sent["choices"][0]["token_ids"]) == "Ada lives in Tarn."

    check = talk.ask(None, "answerability", aside=True, keep=False)
    rendered = post(f"{server}/v1/chat/completions", check.chat("sample", **options))
    assert rendered["usage"]["prompt_tokens"] == len(check.ids)
    talk.answer(rendered["choices"][0]["message"]["content"])

    follow = talk.ask("What does she work as?")
    assert follow.reused >= len(talk.ids) - 1
    kept = post(f"{server}/v1/completions", follow.completion("sample", **options))
    assert talk.answer(kept["choices"][0]["token_ids"]) == "Ada works as a baker."
