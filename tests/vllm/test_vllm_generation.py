"""vLLM's features with a switch model; the transformers backend is the oracle."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import core_of, running, transformers_model
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

NAMES = ["answerability", "citations", "guardian-core", "hallucination_detection", "query_rewrite"]
MESSAGES = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
Reference = Callable[[list[int], int], list[int]]


def prompt(llm: Any, name: str | None, messages: Any = MESSAGES) -> list[int]:
    rendered = llm.get_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **({"adapter_name": name} if name else {})
    )
    return llm.get_tokenizer().encode(rendered, add_special_tokens=False)


def batch(llm: Any) -> list[list[int]]:
    """The base, each adapter, a return to the base, and a conversation that switches many times."""
    single = [prompt(llm, name) for name in [None, *NAMES]]
    back = llm.get_tokenizer().convert_tokens_to_ids("<|return_to_base|>")
    returned = [*single[1], 30, 31, back, *single[0][1:]]
    return [*single, returned, [*single[1], *single[2], *single[3], *single[4], *single[5]]]


def run(llm: Any, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    settings = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **sampling})
    return llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_mixed_batch_equals_transformers_twice_and_alone(engine: Any, reference: Reference) -> None:
    prompts = batch(engine)
    expected = [reference(p, 12) for p in prompts]
    assert len({tuple(e) for e in expected[:6]}) == 6  # the adapters do differ
    assert tokens(run(engine, prompts)) == expected
    again = run(engine, prompts[::-1])[::-1]
    assert tokens(again) == expected
    assert any(output.num_cached_tokens for output in again)
    assert [tokens(run(engine, [p]))[0] for p in prompts] == expected


def test_chat_takes_the_adapters_name(engine: Any, reference: Reference) -> None:
    for name in NAMES:
        chat = engine.chat(
            MESSAGES,
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
            chat_template_kwargs={"adapter_name": name},
            use_tqdm=False,
        )
        assert chat[0].prompt_token_ids == prompt(engine, name)
        assert tokens(chat) == [reference(prompt(engine, name), 8)]


def test_an_unknown_adapter_is_an_error_and_the_engine_lives(engine: Any) -> None:
    with pytest.raises(Exception, match="answerability"):
        engine.chat(MESSAGES, chat_template_kwargs={"adapter_name": "nobody"}, use_tqdm=False)
    assert run(engine, [prompt(engine, None)])


def test_one_prefix_in_the_cache_serves_the_base_and_every_alora(engine: Any, reference: Reference) -> None:
    long = [{"role": "user", "content": "the river ends in the sea " * 40 + "<rewrite>"}]
    first = run(engine, [prompt(engine, None, long)])[0]
    for name in ["answerability", "guardian-core"]:
        output = run(engine, [prompt(engine, name, long)])[0]
        assert output.num_cached_tokens >= len(first.prompt_token_ids) - 2 * 32
        assert tokens([output]) == [reference(output.prompt_token_ids, 12)]


def test_control_tokens_are_never_generated(engine: Any) -> None:
    controls = sorted(core_of(engine).model_executor.driver_worker.worker.model_runner.model.spec.control_slots)
    wanted = dict.fromkeys(controls, 100.0)
    for output in run(engine, batch(engine), temperature=1.5, n=4, logit_bias=wanted, max_tokens=40):
        for sequence in output.outputs:
            assert not set(sequence.token_ids) & set(controls)


def test_n_sequences_of_one_prompt(engine: Any, reference: Reference) -> None:
    name = prompt(engine, "query_rewrite")
    (output,) = run(engine, [name], temperature=1.0, n=4, seed=3)
    assert len({tuple(sequence.token_ids) for sequence in output.outputs}) > 1
    (output,) = run(engine, [name], temperature=1.0, n=3, top_k=1)
    assert all(list(sequence.token_ids) == reference(name, 12) for sequence in output.outputs)


def test_beam_search_finds_at_least_the_greedy_sequences_probability(engine: Any) -> None:
    name = prompt(engine, "answerability")
    beams = engine.beam_search(
        [{"prompt_token_ids": name}], BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    )
    (greedy,) = run(engine, [name], max_tokens=6, logprobs=1)
    assert beams[0].sequences[0].cum_logprob >= greedy.outputs[0].cumulative_logprob - 1e-4
    assert beams[0].sequences[0].tokens[: len(name)] == name


def test_logprobs_equal_transformers(engine: Any, composed: Path) -> None:
    model = transformers_model(composed)
    suppressed = set(model.config.switch_spec.suppressed)  # in vLLM by the model, in transformers when it generates
    for output in run(engine, batch(engine), logprobs=5, prompt_logprobs=5, max_tokens=3):
        whole = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        with torch.no_grad():
            expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(found) == len(whole) - 1
        for position, candidates in enumerate(found):
            for token, record in candidates.items():
                value = expected[position, token].item()
                if token in suppressed:
                    assert math.isinf(record.logprob)
                else:
                    assert record.logprob == pytest.approx(value, abs=2e-4)


def test_structured_output_is_what_the_schema_says(engine: Any) -> None:
    schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}
    allowed = StructuredOutputsParams(json=schema)
    prompts = [prompt(engine, name) for name in [None, *NAMES]]
    for output in run(engine, prompts, structured_outputs=allowed, max_tokens=60, ignore_eos=False):
        assert json.loads(output.outputs[0].text)["answer"] in ("yes", "no")
    choice = StructuredOutputsParams(choice=["Anna", "Oslo"])
    for output in run(engine, prompts, structured_outputs=choice, ignore_eos=False):
        assert output.outputs[0].text in ("Anna", "Oslo")


def test_penalties_and_bans_count_the_prompts_control_tokens_too(engine: Any) -> None:
    prompts = batch(engine)
    plain = tokens(run(engine, prompts))
    penalties = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    assert tokens(run(engine, prompts, **penalties)) != plain
    banned = run(engine, prompts[1:2], allowed_token_ids=[9, 10, 11])
    assert set(tokens(banned)[0]) <= {9, 10, 11}


@pytest.mark.slow
def test_requests_that_are_preempted_resume_where_they_were(composed: Path, reference: Reference) -> None:
    with running(composed, num_gpu_blocks_override=12, max_model_len=320) as llm:
        prompts = batch(llm)
        expected = [reference(p, 60) for p in prompts]
        scheduler = core_of(llm).scheduler
        preempted = []
        original = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **k: (preempted.append(1), original(*a, **k))[1]
        assert tokens(run(llm, prompts, max_tokens=60)) == expected
        assert preempted


@pytest.mark.slow
def test_compiled_equals_eager(composed: Path, reference: Reference) -> None:
    with running(composed, enforce_eager=False, max_num_batched_tokens=64) as llm:
        prompts = batch(llm)
        assert tokens(run(llm, prompts)) == [reference(p, 12) for p in prompts]
        assert tokens(run(llm, prompts)) == [reference(p, 12) for p in prompts]


@pytest.mark.slow
def test_speculation_by_ngrams_changes_nothing(composed: Path, reference: Reference) -> None:
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with running(composed, speculative_config=guess) as llm:
        prompts = batch(llm)
        assert tokens(run(llm, prompts, max_tokens=30)) == [reference(p, 30) for p in prompts]
