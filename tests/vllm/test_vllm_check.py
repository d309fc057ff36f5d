"""`granite-switch check` passes if vLLM and transformers agree, and fails if they do not."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import transformers_model

from granite_switch.vllm.check import Row, _compare

pytestmark = pytest.mark.slow


def test_eager_and_as_a_server_give_what_transformers_gives(composed: Path) -> None:
    """In float32, eager and compiled; the second run uses chunks and the cache."""
    command = [sys.executable, "-m", "granite_switch.vllm.check", composed, "--dtype", "float32"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, input="")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "[y/N]" not in result.stdout, "transformers asks about remote code where nothing is registered"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    names = [adapter["name"] for adapter in json.loads((composed / "config.json").read_text())["switch"]["adapters"]]
    prompts = ["base", *names, "all in one", "and back"]
    assert [row[:2] for row in rows] == [[run, prompt] for run in ("eager", "as the server") for prompt in prompts]
    assert {row[-1] for row in rows} == {"ok"}
    cached = {run: [int(row[3]) for row in rows if row[0] == run] for run in ("eager", "as the server")}
    assert set(cached["eager"]) == {0}
    assert min(cached["as the server"]) > 0


@pytest.mark.parametrize("shift", [0.0, 0.01])
@pytest.mark.parametrize("best", [True, False])
def test_a_difference_is_seen(composed: Path, shift: float, best: bool) -> None:
    """A log-probability that is off, or a token that transformers finds less likely than another."""
    import torch

    model, prompt = transformers_model(composed), [5, 6, 7]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    token = int(logprobs.argmax() if best else logprobs.argmin())
    step = {token: SimpleNamespace(logprob=float(logprobs[token]) + shift)}
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=[step])], num_cached_tokens=0)
    row = _compare("eager", "base", prompt, output, model, "float32")
    assert row.agrees == (best and not shift)
    assert Row("eager", "base", 3, 0, 0.2, 0.0, "bfloat16").agrees
