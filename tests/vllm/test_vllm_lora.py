"""The updates in vLLM's linears against `core.lora`, their shapes under tracing, and the switch's digits."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from granite_switch.core.lora import Pair, switched_linear
from granite_switch.vllm.lora import EagerRouter, TritonLinear, TritonRouter
from granite_switch.vllm.switch import _GAIN, _SHIFT, BITS, POSITIONS, SLOT_DIGITS, Switch

WIDTH, OUTPUTS, RANKS = 24, (16, 8, 8), [[4, 0, 2], [0, 0, 0], [1, 3, 8], [4, 0, 2], [4, 0, 2]]
slots = st.lists(st.integers(0, len(RANKS)), min_size=1, max_size=60)
runs = st.lists(st.tuples(st.integers(0, len(RANKS)), st.integers(1, 9)), min_size=1, max_size=6).map(
    lambda drawn: [slot for slot, count in drawn for _ in range(count)]
)


def config(tokens: int = 512) -> Any:
    """The part of vLLM's configuration that a router reads."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
        compilation_config=SimpleNamespace(static_forward_context={}),
        model_config=SimpleNamespace(dtype=torch.float32),
    )


SPEC = SimpleNamespace(adapters=RANKS)


def make_switch(dtype: torch.dtype, captured: dict[str, torch.Tensor]) -> Switch:
    """A switch whose attention only records its inputs; tokens 1, 2, 3 switch to slots 100, 200, 300."""
    spec = SimpleNamespace(adapters=range(300), control_slots={i: 100 * i for i in (1, 2, 3)}, substitutes=range(4))

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        captured.update(query=query, key=key, value=value)
        return value

    model = SimpleNamespace(get_num_attention_heads=lambda _: 4, get_num_kv_heads=lambda _: 2, get_head_size=lambda: 32)
    vllm_config = SimpleNamespace(
        model_config=model, parallel_config=None, cache_config=SimpleNamespace(sliding_window=16)
    )
    with patch("granite_switch.vllm.switch.Attention", return_value=None) as attention:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        switch = Switch(spec, 4, vllm_config, "switch.9")
        torch.set_default_dtype(previous)
    assert attention.call_args.kwargs["cache_config"].sliding_window is None  # a window would forget control tokens
    switch.__dict__["attn"] = note
    return switch


def stacks(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Padded A and B of each slice, as a LoRA layer holds them."""
    generator = torch.Generator().manual_seed(seed)
    a = [torch.zeros(len(RANKS), 1, 8, WIDTH) for _ in OUTPUTS]
    b = [torch.zeros(len(RANKS), 1, out, 8) for out in OUTPUTS]
    for slot, of_slot in enumerate(RANKS):
        for part, rank in enumerate(of_slot):
            a[part][slot, 0, :rank] = torch.randn(rank, WIDTH, generator=generator)
            b[part][slot, 0, :, :rank] = torch.randn(OUTPUTS[part], rank, generator=generator)
    return a, b


def expected(x: torch.Tensor, y: torch.Tensor, routing: list[int]) -> torch.Tensor:
    """y plus the definition's update, with a weight of zeros."""
    a, b = stacks()
    parts = []
    for part, out in enumerate(OUTPUTS):
        pairs = {
            slot: Pair(a[part][slot - 1, 0].numpy(), b[part][slot - 1, 0].numpy(), 1.0)
            for slot in range(1, len(RANKS) + 1)
        }
        parts.append(switched_linear(x.numpy(), np.zeros((out, WIDTH), np.float32), routing, pairs))
    return y + torch.from_numpy(np.concatenate(parts, 1))


@given(routing=st.one_of(slots, runs))
def test_linears_on_cpu_add_the_definition_and_leave_the_base_alone(routing: list[int]) -> None:
    a, b = stacks()
    router = EagerRouter(SPEC, config())
    before = torch.randn(len(routing), sum(OUTPUTS))
    linear = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda layer, x, bias: before.clone()))
    layer = SimpleNamespace(create_lora_weights=lambda *_: None)
    with patch("granite_switch.vllm.lora.lora_layer", return_value=layer):
        method = router.attach(linear, "linear", ["q", "k", "v"], 8)
    for slot, ranks in enumerate(RANKS, 1):
        layer.lora_a_stacked = [x[slot - 1 : slot] for x in a]
        layer.lora_b_stacked = [y[slot - 1 : slot] for y in b]
        with patch("granite_switch.vllm.lora.fill"):
            method.set(slot, [torch.zeros(rank, WIDTH) if rank else None for rank in ranks], [None] * len(ranks))
    router.route(torch.tensor(routing, dtype=torch.int32))
    x = torch.randn(len(routing), WIDTH)
    y = linear.quant_method.apply(linear, x)
    torch.testing.assert_close(y, expected(x, before, routing), atol=1e-5, rtol=1e-5)
    of_base = torch.tensor(routing) == 0
    assert torch.equal(y[of_base], before[of_base])


@given(routing=slots)
def test_the_kernels_metadata_name_the_tokens_of_each_adapter_as_vllms_do(routing: list[int]) -> None:
    router = TritonRouter(SPEC, config())
    router.route(torch.tensor(routing, dtype=torch.int32))
    theirs = LoRAKernelMeta.make(len(RANKS), 512, "cpu")
    theirs.prepare_tensors(torch.tensor(routing) - 1)

    def rows(
        ids: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor, order: torch.Tensor
    ) -> dict[int, list[int]]:
        spans = zip(ids.tolist(), counts.tolist(), starts.tolist(), strict=False)
        return {i: order[start : start + count].tolist() for i, count, start in spans if count and i >= 0}

    ours = rows(router.ids, router.counts, router.starts, router.order)
    assert ours == rows(
        theirs.active_lora_ids,
        theirs.num_tokens_per_lora,
        theirs.lora_token_start_loc,
        theirs.token_indices_sorted_by_lora_ids,
    )
    assert router.mapping[: len(routing)].tolist() == [slot - 1 for slot in routing]


def test_the_gpu_path_is_one_graph_for_any_number_of_tokens_without_a_look_at_the_data() -> None:
    """The meta device has no data, so a data-dependent shape or a copy to the host would raise an error."""
    with torch.device("meta"):
        router = TritonRouter(SPEC, config())
        a = tuple(torch.zeros(len(RANKS), 1, 8, WIDTH, dtype=torch.bfloat16) for _ in OUTPUTS)
        b = tuple(torch.zeros(len(RANKS), 1, out, 8, dtype=torch.bfloat16) for out in OUTPUTS)
        x, y = torch.zeros(7, WIDTH, dtype=torch.bfloat16), torch.zeros(7, sum(OUTPUTS), dtype=torch.bfloat16)
        routing = torch.zeros(7, dtype=torch.int32)

    linear = object.__new__(TritonLinear)
    linear.router, linear.layer = router, SimpleNamespace(lora_a_stacked=a, lora_b_stacked=b)

    def forward(slots: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        router.route(slots)
        linear.add(y, x)
        return y

    graph = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(routing, x, y)
    nodes = [str(node.target) for node in graph.graph.nodes]
    assert "vllm.lora_shrink.default" in nodes
    assert "vllm.lora_expand.default" in nodes
    assert any("sym_size" in name for name in nodes)


def test_the_latest_control_token_wins_at_any_position_in_any_type() -> None:
    """Scores as attention computes them, in float32 from keys in the cache's dtype, up to the last position."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        captured: dict[str, torch.Tensor] = {}
        switch = make_switch(torch.float16 if dtype == torch.float16 else torch.bfloat16, captured)
        positions = torch.cat([torch.arange(0, 3000), torch.arange(POSITIONS - 3000, POSITIONS)])
        tokens = torch.randint(0, 4, (len(positions),), generator=torch.Generator().manual_seed(0))
        switch(tokens, positions)
        key, value = (captured[name][:, :32].to(dtype).to(torch.float32) for name in ("key", "value"))  # of head 0
        scores = (key @ captured["query"][0, :32].to(torch.float32)) * (_GAIN << _SHIFT)
        expected = 0
        for end in range(1, len(positions) + 1):
            expected = int(tokens[end - 1]) if tokens[end - 1] else expected
            if end % 50 and tokens[end - 1]:
                continue
            weights = scores[:end].softmax(0)
            digits = (weights @ value[:end])[:SLOT_DIGITS].to(torch.bfloat16).round().int()
            assert sum(int(d) << BITS * i for i, d in enumerate(digits)) == 100 * expected


@pytest.mark.slow
def test_kernels_in_tritons_interpreter_are_the_definition() -> None:
    """In a separate process, because vLLM looks for Triton when it is imported.

    The environment variable GRANITE_SWITCH_TRITON_EXAMPLES sets the number of batches (60).
    """
    worker = Path(__file__).parent / "triton_worker.py"
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr[-3000:]
