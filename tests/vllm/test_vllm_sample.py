"""The trained sample: vLLM writes what the transformers backend writes, and is right as often."""

import sys
from pathlib import Path

import pytest
from artefacts import ROOT
from conftest import running, transformers_model

sys.path.insert(0, str(ROOT / "sample"))

TASKS = ("answer", "answerability", "citations", "hallucination_detection", "query_rewrite")
EXAMPLES = 200

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(sample: Path):
    with running(sample, max_num_seqs=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(sample: Path):
    return transformers_model(sample)


@pytest.mark.parametrize("task", TASKS)
def test_same_text_and_accuracy(task: str, engine, model, sample: Path) -> None:
    import world
    from evaluate import answers, render
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(sample)
    name = None if task == "answer" else task
    examples = world.examples(task, EXAMPLES)
    expected = answers(model, tokenizer, examples, name)
    longest = max(len(tokenizer(example.expected)["input_ids"]) for example in examples)
    prompts = [tokenizer(render(tokenizer, e, name), add_special_tokens=False)["input_ids"] for e in examples]
    sampling = SamplingParams(temperature=0, max_tokens=longest + 4)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    written = [output.outputs[0].text for output in outputs]
    assert written == expected
    assert sum(map(world.is_right, examples, written)) >= 0.8 * EXAMPLES
