"""Slots inside the engine against `core.routing`, for any prompts, chunks, batches and cached prefixes."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import core_of, runner_of, running
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.forward_context import get_forward_context

from granite_switch.core.routing import slots

TYPES = ["float32-auto", "bfloat16-auto", "float16-auto", "bfloat16-fp8", "float16-fp8_e5m2"]


class Watched:
    """An engine, with the slots that it computed for every token of every request."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.core, self.runner = llm, core_of(llm), runner_of(llm)
        self.controls = self.runner.model.spec.control_slots
        self.seen: dict[str, dict[int, int]] = {}
        self.positions = 0
        self.runner.model.switch.register_forward_hook(self._note)

    def _note(self, module: Any, inputs: Any, output: Any) -> None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # warm-up
            return
        starts = metadata[module.attn.layer_name].query_start_loc.tolist()
        found, positions = output.tolist(), inputs[1].tolist()
        for request, first, last in zip(self.runner.input_batch.req_ids, starts, starts[1:], strict=False):
            seen = self.seen.setdefault(request.split("-")[0], {})
            seen.update(zip(positions[first:last], found[first:last], strict=True))

    def check(self, prompts: list[list[int]], chunk: int, new_tokens: int = 2) -> int:
        """Run a batch and compare every slot with the oracle. Returns the number of prompt tokens from the cache."""
        self.seen.clear()
        self.core.scheduler.max_num_scheduled_tokens = chunk
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        cached = 0
        for output in outputs:
            tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            seen = self.seen[output.request_id]
            expected = slots(tokens, self.controls)
            assert seen == {position: expected[position] for position in seen}
            assert set(seen) == set(range(output.num_cached_tokens, len(tokens) - 1))
            self.positions += len(seen)
            cached += output.num_cached_tokens
        return cached


@pytest.fixture(scope="module", params=TYPES)
def watched(request: pytest.FixtureRequest, composed: Path) -> Iterator[Watched]:
    dtype, cache = request.param.split("-")
    with ExitStack() as stack:
        try:
            llm = stack.enter_context(running(composed, dtype=dtype, kv_cache_dtype=cache, max_model_len=16384))
        except NotImplementedError as refused:  # fp8 on a processor without AVX-512
            pytest.skip(f"vLLM: {refused}")
        yield Watched(llm)


def prompts(controls: list[int]) -> st.SearchStrategy[list[int]]:
    """Text, control tokens in any density, and long stretches of one."""
    text = st.lists(st.integers(2, 300), min_size=1, max_size=60)
    switches = st.lists(st.sampled_from(controls), min_size=1, max_size=20)
    return st.lists(st.one_of(text, switches), min_size=1, max_size=25).map(lambda parts: [*chain(*parts)])


def test_slots_are_the_oracles_in_any_batch_chunk_and_prefix(watched: Watched) -> None:
    drawn = prompts(sorted(watched.controls))
    shared = st.lists(st.integers(2, 300), min_size=64, max_size=64)

    @settings(max_examples=120)
    @given(batch=st.lists(drawn, min_size=1, max_size=6), prefix=shared, chunk=st.sampled_from([7, 33, 100, 512]))
    def check(batch: list[list[int]], prefix: list[int], chunk: int) -> None:
        watched.check(batch, chunk)
        watched.check([prefix + p for p in batch], chunk)
        assert watched.check([prefix + p[::-1] for p in batch], 512) >= 64 * len(batch)

    check()
    assert watched.positions > 20_000


def test_ten_thousand_control_tokens(watched: Watched) -> None:
    controls = sorted(watched.controls)
    prompt = [controls[(i * i + i // 7) % len(controls)] for i in range(10_000)]
    watched.check([prompt, [5, *prompt[:3000], 6]], 512)
