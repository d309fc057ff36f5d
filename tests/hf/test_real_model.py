"""The script of `make real` fails where an engine answers otherwise than PEFT, beyond what float32 explains."""

import sys
from pathlib import Path

import pytest
import torch
from artefacts import ROOT
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)

sys.path.insert(0, str(ROOT / "examples"))
import real_model

PROMPT, END = [6, 7, 8], 0


@pytest.mark.parametrize("engine", ["transformers", "vLLM"])
def test_answers_are_compared(engine: str, composed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    switch = AutoModelForCausalLM.from_pretrained(composed)
    with torch.no_grad():
        best, second = switch(torch.tensor([PROMPT])).logits[0, -1].topk(2).indices.tolist()
        switch.lm_head.weight[second] = switch.lm_head.weight[best]  # a tie
        worst = switch(torch.tensor([PROMPT])).logits[0, -1, 6:30].argmin().item() + 6

    def compare(*answer: int) -> None:
        answers = {"PEFT": {"cite": [[best, 9]]}, engine: {"cite": [list(answer)]}}
        real_model.compare_answers(switch, {"cite": [PROMPT]}, answers, END)

    compare(best, 9)
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"1 of {engine}"):
        compare(worst, 9)
    with pytest.raises(SystemExit, match=f"1 of {engine}"):
        compare(best)  # ended early
    assert capsys.readouterr().out.count(f"{engine}, cite, question 1: not PEFT's answer") == 2
    if engine == "vLLM":
        compare(second, 9)  # two tokens that rounding can swap
        assert "differ by 0.000000" in capsys.readouterr().out
