"""Run by test_vllm_lora.py: `TritonRouter` and vLLM's LoRA kernels in Triton's interpreter against the definition.

vLLM looks for Triton's GPU driver when it is imported, so the interpreter must be set up first.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
import triton

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.lora.ops.triton_ops import lora_shrink_op

from granite_switch.core.lora import Pair, switched_linear
from granite_switch.vllm.lora import TritonLinear, TritonRouter

WIDTH, TOKENS = 32, 48

# vLLM splits the sums of small batches 64 ways; the interpreter runs the parts one after another
configs = lora_shrink_op.get_lora_op_configs
lora_shrink_op.get_lora_op_configs = lambda *args, **kwargs: configs(*args, **kwargs) | {"split_k": 2}


def make(
    adapters: int, rank: int, slices: int, seed: int, memory: torch.Tensor | None = None
) -> tuple[TritonRouter, TritonLinear]:
    """A router, and a linear with random adapters, stored at the start of each row of `memory` if given."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS))
    router = TritonRouter(SimpleNamespace(adapters=range(adapters)), config)
    draw = torch.Generator().manual_seed(seed)
    linear = object.__new__(TritonLinear)
    linear.router = router
    linear.layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.randn(adapters, 1, rank, WIDTH, generator=draw).half() for _ in range(slices)),
        lora_b_stacked=tuple(
            torch.randn(adapters, 1, 16 * (i + 1), rank, generator=draw).half() for i in range(slices)
        ),
    )
    if memory is not None:
        for row, name in zip(memory, ("lora_a_stacked", "lora_b_stacked"), strict=True):
            stacks = zip(row, getattr(linear.layer, name), strict=True)
            setattr(linear.layer, name, tuple(m[: x.numel()].view_as(x).copy_(x) for m, x in stacks))
    linear.drop_cached_strides()
    return router, linear


def expected(linear: TritonLinear, x: torch.Tensor, y: torch.Tensor, slots: list[int]) -> torch.Tensor:
    parts = []
    for a, b in zip(linear.layer.lora_a_stacked, linear.layer.lora_b_stacked, strict=True):
        pairs = {s: Pair(a[s - 1, 0].float().numpy(), b[s - 1, 0].float().numpy(), 1.0) for s in range(1, len(a) + 1)}
        nothing = np.zeros((b.shape[2], WIDTH), np.float32)
        parts.append(switched_linear(x.float().numpy(), nothing, slots, pairs))
    return y.float() + torch.from_numpy(np.concatenate(parts, 1))


def check(linear: TritonLinear, x: torch.Tensor, before: torch.Tensor, found: torch.Tensor, slots: list[int]) -> None:
    wanted, of_base = expected(linear, x, before, slots), torch.tensor(slots) == 0
    assert torch.equal(found[of_base], before[of_base])
    assert (found.float() - wanted).abs().max() <= 3e-3 * wanted.abs().max() + 1e-3


def routings(adapters: int) -> st.SearchStrategy[list[int]]:
    """Any slots, including only the base, only one adapter, and every adapter."""
    return st.one_of(
        st.permutations(range(adapters + 1)),
        st.lists(st.integers(0, adapters), min_size=1, max_size=TOKENS - 9),
        st.integers(1, TOKENS - 9).map(lambda n: [0] * n),
        st.integers(1, TOKENS - 9).map(lambda n: [adapters] * n),
    )


@settings(
    max_examples=int(os.environ.get("GRANITE_SWITCH_TRITON_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def kernels_are_the_definition(data: st.DataObject) -> None:
    adapters, rank = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 8, 16, 32, 64]))
    router, linear = make(adapters, rank, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)))
    slots, padding = data.draw(routings(adapters)), data.draw(st.integers(0, 9))  # CUDA graphs pad a batch
    router.mapping.fill_(adapters - 1)  # left by an earlier batch
    out = sum(b.shape[2] for b in linear.layer.lora_b_stacked)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, before = (torch.randn(len(slots) + padding, width, generator=draw).half() for width in (WIDTH, out))
    whole = slots + data.draw(st.lists(st.integers(0, adapters), min_size=padding, max_size=padding))
    router.route(torch.tensor(whole, dtype=torch.int32))
    found = before.clone()
    linear.add(found, x)
    check(linear, x, before, found, whole)


def a_captured_route_serves_any_routing() -> None:
    """As with CUDA graphs, recorded operations run again on new contents of the same buffers."""
    router, linear = make(5, 8, 2, 0)
    slots, draw = torch.zeros(20, dtype=torch.int32), torch.Generator().manual_seed(1)

    def step(slots: torch.Tensor) -> torch.Tensor:
        router.route(slots)
        return slots

    graph = make_fx(step)(slots)
    for _ in range(2):
        drawn = torch.randint(0, 6, (20,), generator=draw, dtype=torch.int32)
        graph(drawn)
        x, before = (torch.randn(20, width, generator=draw).half() for width in (WIDTH, 48))
        found = before.clone()
        linear.add(found, x)
        check(linear, x, before, found, drawn.tolist())


def a_linear_at_the_addresses_of_a_freed_one_is_right() -> None:
    """As when a process loads a second model; vLLM caches the stacks' strides by address."""
    memory, draw = torch.zeros(2, 2, 4096).half(), torch.Generator().manual_seed(2)
    for rank in 8, 16:
        router, linear = make(3, rank, 2, 0, memory)
        slots = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
        x, before = (torch.randn(5, width, generator=draw).half() for width in (WIDTH, 48))
        router.route(slots)
        found = before.clone()
        linear.add(found, x)
        check(linear, x, before, found, slots.tolist())


kernels_are_the_definition()
a_linear_at_the_addresses_of_a_freed_one_is_right()
a_captured_route_serves_any_routing()
print("equal")
