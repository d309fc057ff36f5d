"""The composed sample equals PEFT, each adapter does its task, and the flow on one cache is exact."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from artefacts import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_switch.hf  # noqa: F401
from granite_switch import compose

sys.path[:0] = [str(ROOT / "sample"), str(ROOT / "examples")]

import flow
import world
from evaluate import accuracy, adapter_folders

ADAPTERS = ("answerability", "citations", "hallucination_detection", "query_rewrite")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "model"
    compose(ROOT / "sample" / "base", [ROOT / "sample" / "library"], output, base_name="granite-switch-sample")
    return output


@pytest.fixture(scope="module")
def model(sample: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(sample: Path):
    return AutoTokenizer.from_pretrained(sample)


def test_what_ships_is_small() -> None:
    files = [path for path in (ROOT / "sample").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 10_000_000


def test_four_adapters_of_both_technologies_and_different_ranks(model) -> None:
    spec = model.config.switch_spec
    assert spec.names == ADAPTERS
    assert [a.technology for a in spec.adapters] == ["alora", "lora", "lora", "alora"]
    assert len({a.rank for a in spec.adapters}) > 1
    assert len({a.targets for a in spec.adapters}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ADAPTERS)
def test_each_adapter_does_what_the_base_cannot(task: str, model, tokenizer) -> None:
    held_out = world.examples(task, 200)
    assert accuracy(model, tokenizer, held_out, adapter_name=task) >= 0.9
    assert accuracy(model, tokenizer, held_out) <= 0.6


@pytest.mark.slow
def test_the_base_answers(model, tokenizer) -> None:
    assert accuracy(model, tokenizer, world.examples("answer", 200)) >= 0.9


@pytest.mark.parametrize("task", ADAPTERS)
def test_logits_equal_peft(task: str, model, tokenizer) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(ROOT / "sample" / "base", dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, adapter_folders()[task])
    for example in world.examples(task, 3, seed=5):
        ids = tokenizer.apply_chat_template(
            example.messages,
            documents=example.documents,
            adapter_name=task,
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        substitutes = model.config.switch_spec.substitutes
        substituted = torch.tensor([[substitutes.get(i, i) for i in ids[0].tolist()]])
        with torch.no_grad():
            ours, theirs = model(ids).logits, reference(substituted).logits
        torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, atol=5e-5, rtol=1e-5)


def test_flow_on_one_cache_equals_a_fresh_computation(model, tokenizer) -> None:
    steps = flow.run(model, tokenizer)
    assert [step.name for step in steps] == ["rewrite", "answer", "check", "back to base"]
    assert steps[0].cached == 0
    for before, step in pairwise(steps):
        assert step.cached == len(before.sequence) - 1  # all but the last token, which was not an input yet
        assert step.prefilled < 40
    for step in steps:
        new = len(step.logits)
        with torch.no_grad():
            fresh = model(torch.tensor([step.sequence[:-1]])).logits[0, -new:]
        torch.testing.assert_close(step.logits, fresh, atol=5e-5, rtol=1e-5)
    assert "Ada" in steps[0].text
    assert steps[1].text == "Ada lives in Tarn."
    assert "unanswerable" in steps[2].text
    assert steps[3].text == world.UNKNOWN
