"""The operators behind vLLM's LoRA layers against the definition in `core.lora`, and their shapes under tracing."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from granite_switch.core.lora import Pair, switched_linear
from granite_switch.vllm.lora import GroupedRouter, TritonRouter
from granite_switch.vllm.switch import _GAIN, _SHIFT, BITS, POSITIONS, SLOT_DIGITS, Switch

WIDTH, OUTPUTS, RANKS = 24, (16, 8, 8), [[4, 0, 2], [0, 0, 0], [1, 3, 8], [4, 0, 2], [4, 0, 2]]
slots = st.lists(st.integers(0, len(RANKS)), min_size=1, max_size=60)
runs = st.lists(st.tuples(st.integers(0, len(RANKS)), st.integers(1, 9)), min_size=1, max_size=6).map(
    lambda drawn: [slot for slot, count in drawn for _ in range(count)]
)


def config(tokens: int = 512) -> Any:
    """As much of vLLM's configuration as a router reads."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


SPEC = SimpleNamespace(adapters=RANKS)


def make_switch(dtype: torch.dtype, captured: dict[str, torch.Tensor]) -> Switch:
    """A switch whose attention only notes what it is given; tokens 1, 2, 3 switch to slots 100, 200, 300."""
    spec = SimpleNamespace(adapters=range(300), control_slots={i: 100 * i for i in (1, 2, 3)}, substitutes=range(4))

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        captured.update(query=query, key=key, value=value)
        return value

    with patch("granite_switch.vllm.switch.Attention", return_value=None):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        switch = Switch(spec, 4, 32, None, "switch.9")
        torch.set_default_dtype(previous)
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
    """y plus what the definition adds to a product with zero weights."""
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
def test_the_grouped_operator_is_the_definition_and_leaves_the_base_alone(routing: list[int]) -> None:
    a, b = stacks()
    router = GroupedRouter(SPEC, config())
    linear = SimpleNamespace(lora_a_stacked=tuple(a), lora_b_stacked=tuple(b))
    x, before = torch.randn(len(routing), WIDTH), torch.randn(len(routing), sum(OUTPUTS))
    base = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda layer, x, bias: before.clone()))
    router.attach(SimpleNamespace(get_submodule={"linear": base}.__getitem__), "linear", linear, RANKS)
    router.route(torch.tensor(routing, dtype=torch.int32))
    y = base.quant_method.apply(base, x)
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
    """On the meta device there is no data: a shape that depended on it, or a copy to the host, would raise."""
    with torch.device("meta"):
        router = TritonRouter(SPEC, config())
        a = tuple(torch.zeros(len(RANKS), 1, 8, WIDTH, dtype=torch.bfloat16) for _ in OUTPUTS)
        b = tuple(torch.zeros(len(RANKS), 1, out, 8, dtype=torch.bfloat16) for out in OUTPUTS)
        x, y = torch.zeros(7, WIDTH, dtype=torch.bfloat16), torch.zeros(7, sum(OUTPUTS), dtype=torch.bfloat16)
        routing = torch.zeros(7, dtype=torch.int32)

    def forward(slots: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        router.route(slots)
        router.add_lora_linear(y, x, a, b, 1.0, OUTPUTS)
        return y

    graph = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(routing, x, y)
    nodes = [str(node.target) for node in graph.graph.nodes]
    assert "vllm.lora_shrink.default" in nodes
    assert "vllm.lora_expand.default" in nodes
    assert any("sym_size" in name for name in nodes)


def test_the_latest_control_token_wins_at_any_position_in_any_type() -> None:
    """Scores as attention computes them, in float32 from keys in the cache's type, up to the last position."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        captured: dict[str, torch.Tensor] = {}
        switch = make_switch(torch.float16 if dtype == torch.float16 else torch.bfloat16, captured)
        positions = torch.cat([torch.arange(0, 3000), torch.arange(POSITIONS - 3000, POSITIONS)])
        tokens = torch.randint(0, 4, (len(positions),), generator=torch.Generator().manual_seed(0))
        switch(tokens, positions)
        key = captured["key"].to(dtype).to(torch.float32)
        value = captured["value"].to(dtype).to(torch.float32)
        scores = (key @ captured["query"][0].to(torch.float32)) * (_GAIN << _SHIFT)
        expected = 0
        for end in range(1, len(positions) + 1):
            expected = int(tokens[end - 1]) if tokens[end - 1] else expected
            if end % 50 and tokens[end - 1]:
                continue
            weights = scores[:end].softmax(0)
            digits = (weights @ value[:end])[:SLOT_DIGITS].to(torch.bfloat16).round().int()
            assert sum(int(d) << BITS * i for i, d in enumerate(digits)) == 100 * expected
