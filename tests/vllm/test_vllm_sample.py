"""The trained sample: vLLM gives the transformers backend's text and accuracy."""

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
def tokenizer(sample: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sample)


@pytest.fixture(scope="module")
def expected(sample: Path, tokenizer) -> dict[str, list[str]]:
    """The transformers backend's text, computed before the engine binds this process to its cores."""
    import world
    from evaluate import answers

    model = transformers_model(sample)
    return {
        task: answers(model, tokenizer, world.examples(task, EXAMPLES), None if task == "answer" else task)
        for task in TASKS
    }


@pytest.fixture(scope="module")
def engine(sample: Path, expected):
    with running(sample, max_num_seqs=64) as llm:
        yield llm


@pytest.mark.parametrize("task", TASKS)
def test_same_text_and_accuracy(task: str, engine, expected, tokenizer) -> None:
    import world
    from evaluate import render
    from vllm import SamplingParams

    name = None if task == "answer" else task
    examples = world.examples(task, EXAMPLES)
    longest = max(len(tokenizer(example.expected)["input_ids"]) for example in examples)
    prompts = [tokenizer(render(tokenizer, e, name), add_special_tokens=False)["input_ids"] for e in examples]
    sampling = SamplingParams(temperature=0, max_tokens=longest + 4)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    written = [output.outputs[0].text for output in outputs]
    assert written == expected[task]
    assert sum(map(world.is_right, examples, written)) >= 0.9 * EXAMPLES
