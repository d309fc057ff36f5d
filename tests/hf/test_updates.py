"""The adapters' module by itself: every path equals the definition, after any change of its weights."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from granite_switch.core.lora import Pair, switched_linear
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.hf.cache import DynamicSlotLayer
from granite_switch.hf.routing import Routing, route
from granite_switch.hf.updates import Updates

LINEAR, OUT, WIDTH = "model.layers.0.self_attn.q_proj", 24, 16


def make(ranks: list[int], dtype: torch.dtype = torch.float32) -> Updates:
    """A module in which adapter i has rank ranks[i]; 0: it does not target the linear."""
    adapters = [
        AdapterSpec(f"a{i}", "lora", f"<|a{i}|>", 100 + i, 0, r or 4, 8.0, (LINEAR,) if r else ("elsewhere",))
        for i, r in enumerate(ranks)
    ]
    module = Updates(SwitchSpec(tuple(adapters), "<|b|>", 99, 0), LINEAR, OUT, WIDTH).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def expected(module: Updates, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The result of `core.lora` with a weight of zeros."""
    pairs = {
        slot: Pair(getattr(module, a).detach().float().numpy(), getattr(module, b).detach().float().numpy(), scale)
        for slot, (a, b, scale) in module.adapters.items()
    }
    y = switched_linear(
        x.flatten(0, 1).float().numpy(), np.zeros((OUT, WIDTH), np.float32), slots.flatten().tolist(), pairs
    )
    return torch.from_numpy(y).view(*x.shape[:2], -1)


def assert_right(module: Updates, x: torch.Tensor, slots: torch.Tensor, routing: Routing | None = None) -> None:
    got = module(x, x.new_zeros(*x.shape[:2], OUT), routing or route(slots))
    torch.testing.assert_close(got.detach().float(), expected(module, x, slots), rtol=1e-5, atol=1e-5)
    assert torch.equal(got[slots == 0], torch.zeros_like(got[slots == 0]))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([0, 1, 2, 4, 4, 9]), min_size=1, max_size=7),
    batch=st.integers(1, 9),
    length=st.sampled_from([1, 1, 3, 20]),
    repeat=st.sampled_from([1, 1, 18]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("how", ["decode step", "without gradients", "with gradients", "fixed shapes"])
def test_every_way(how, ranks, batch, length, repeat, seed):
    torch.manual_seed(seed)
    length, repeat = (1, 1) if how == "decode step" else (length, repeat)
    module, x = make(ranks), torch.randn(batch, length * repeat, WIDTH)
    slots = torch.randint(0, len(ranks) + 1, (batch, length)).repeat_interleave(repeat, 1)
    with torch.set_grad_enabled(how == "with gradients"):
        routing = Routing(slots, None) if how == "fixed shapes" else None
        if how == "decode step":
            routing = route(slots, DynamicSlotLayer())
            assert routing.decode
        for _ in range(2):
            assert_right(module, x, slots, routing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_another_dtype(dtype):
    module, x, slots = make([4, 2]), torch.randn(5, 3, WIDTH).to(dtype), torch.randint(0, 3, (5, 3))
    with torch.no_grad():
        got = module(x, x.new_zeros(5, 3, OUT), route(slots))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected(module, x, slots), rtol=0.05, atol=0.05)


@torch.no_grad()
def added_in_place(module):
    for parameter in module.parameters():
        parameter.add_(1.0)
    return module


def other_data(module):
    for parameter in module.parameters():
        parameter.data = parameter.data + 1
    return module


def loaded(module, assign=True):
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()}, assign=assign)
    return module


def loaded_in_place(module):
    return loaded(module, assign=False)


def replaced(module):
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach() + 1))
    return module


def one_replaced(module):
    name, parameter = next(module.named_parameters())
    setattr(module, name, nn.Parameter(parameter.detach() + 1))
    return module


ACTS = [copy.deepcopy, lambda m: m.double().float(), loaded, loaded_in_place, replaced, one_replaced]


@pytest.mark.parametrize("act", [*ACTS, added_in_place, other_data])
def test_a_decode_step_uses_the_parameters_as_they_are(act):
    """Padded copies of an earlier step are renewed when a parameter changes, and parameters are never modified."""
    torch.manual_seed(0)
    module, past = make([4, 3, 1]), DynamicSlotLayer()
    x, slots = torch.randn(4, 1, WIDTH), torch.tensor([[1], [2], [3], [0]])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        assert_right(module, x, slots, route(slots, past))
        assert past.decode[1].padded
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        module = act(module)
        assert_right(module, x, slots, route(slots, past, [(id(module), module.pair)]))
        assert_right(module, x, slots, Routing(slots, None))


def test_the_next_prompt_drops_the_copies():
    past, slots = DynamicSlotLayer(), torch.tensor([[1], [2]])
    with torch.no_grad():
        first = route(slots, past)
        assert route(slots.clone(), past).groups is first.groups
        route(torch.tensor([[1, 1], [2, 2]]), past)
        assert route(slots, past).groups is not first.groups
    assert "decode" not in copy.deepcopy(past).__dict__


def test_trained_after_inference_mode():
    torch.manual_seed(0)
    module, past = make([4, 4]), DynamicSlotLayer()
    x, slots = torch.randn(2, 1, WIDTH), torch.tensor([[1], [2]])
    with torch.inference_mode():
        assert_right(module, x, slots, route(slots, past))
    module(x, x.new_zeros(2, 1, OUT), route(slots, past)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_gradients_with_fixed_shapes():
    module, x, slots = make([4, 2, 3]), torch.randn(4, 1, WIDTH), torch.tensor([[1], [2], [3], [0]])
    module(x, x.new_zeros(4, 1, OUT), Routing(slots, None)).square().sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    module(x, x.new_zeros(4, 1, OUT), route(slots)).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [[[0, 0]], [[1, 0]]])
def test_unused_adapters_take_part_in_training(slots):
    """Unused adapters get zero gradients, and the output does not change by a bit."""
    module, x = make([4, 2]), torch.randn(1, 2, WIDTH)
    getattr(module, "a1-A").requires_grad = False
    y = torch.randn(1, 2, OUT)
    out = module(x, y.clone(), route(torch.tensor(slots)))
    out.sum().backward()
    assert torch.equal(out[0, 1], y[0, 1])
    assert getattr(module, "a1-A").grad is None
    assert not getattr(module, "a1-B").grad.any()
    assert getattr(module, "a0-A").grad is not None
