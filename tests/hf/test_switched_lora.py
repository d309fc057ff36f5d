"""The module of adapters alone: each of its ways gives what the definition gives, whatever was done to its weights."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from granite_switch.batched import Grouper
from granite_switch.core.layout import PROJECTIONS
from granite_switch.core.lora import Pair, switched_linear
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.hf.lora import SwitchedLora
from granite_switch.hf.routing import Routing, route

ROWS = [PROJECTIONS[name] for name in ("q_proj", "k_proj", "v_proj")]
GROUPED = Grouper()  # as in a model: the same slots again get the same groups, and what modules made ready for them
SHAPES = {"q_proj": (24, 16), "k_proj": (8, 16), "v_proj": (8, 16)}


def make(ranks: list[dict[str, int]], dtype: torch.dtype = torch.float32) -> SwitchedLora:
    """A module in which adapter i has these ranks (projection -> rank)."""
    adapters = [
        AdapterSpec(
            f"a{i}", "lora", f"<|a{i}|>", 100 + i, 0, 4, 8.0, tuple(r), rank_pattern={k: (v,) for k, v in r.items()}
        )
        for i, r in enumerate(ranks)
    ]
    module = SwitchedLora(SwitchSpec(tuple(adapters), "<|b|>", 99, 0), 0, ROWS, SHAPES).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def expected(module: SwitchedLora, x: torch.Tensor, slots: torch.Tensor) -> list[torch.Tensor]:
    """What `core.lora` says, on projections that are zero."""
    result = []
    for index, row in enumerate(ROWS):
        pairs = {
            slot: Pair(
                getattr(module, u.a).detach().float().numpy(), getattr(module, u.b).detach().float().numpy(), u.scale
            )
            for slot, updates in module.updates.items()
            for u in updates
            if u.output == index
        }
        zero = np.zeros(SHAPES[row.name], np.float32)
        y = switched_linear(x.flatten(0, 1).float().numpy(), zero, slots.flatten().tolist(), pairs)
        result.append(torch.from_numpy(y).view(*x.shape[:2], -1))
    return result


def run(
    module: SwitchedLora, x: torch.Tensor, slots: torch.Tensor, routing: Routing | None = None
) -> list[torch.Tensor]:
    zeros = [x.new_zeros(*x.shape[:2], SHAPES[row.name][0]) for row in ROWS]
    return module(x, zeros, routing or route(slots, GROUPED))


def assert_right(module: SwitchedLora, x: torch.Tensor, slots: torch.Tensor, **how) -> None:
    for got, right in zip(run(module, x, slots, **how), expected(module, x, slots), strict=True):
        torch.testing.assert_close(got.detach().float(), right, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[slots == 0], torch.zeros_like(got[slots == 0]))


# often several adapters of the same ranks
rank_sets = st.lists(
    st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 9), min_size=1), min_size=1, max_size=4
).flatmap(lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=7))


@settings(max_examples=40, deadline=None)
@given(
    ranks=rank_sets,
    batch=st.integers(1, 9),
    length=st.sampled_from([1, 1, 3, 20]),
    repeat=st.sampled_from([1, 1, 18]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("how", ["without gradients", "with gradients", "fixed shapes", "fixed shapes, packed"])
def test_every_way(how, ranks, batch, length, repeat, seed):
    torch.manual_seed(seed)
    module, x = make(ranks), torch.randn(batch, length * repeat, 16)
    slots = torch.randint(0, len(ranks) + 1, (batch, length)).repeat_interleave(repeat, 1)
    if how == "fixed shapes, packed":
        module.pack()
    routing = Routing(slots, None) if how.startswith("fixed") else None
    with torch.set_grad_enabled(how == "with gradients"):
        assert_right(module, x, slots, routing=routing)


@pytest.fixture
def packed():
    """A module that has run a batch of few tokens, most of its adapters used, and such a batch."""
    torch.manual_seed(0)
    module = make([{"q_proj": 4, "v_proj": 2}, {"k_proj": 3}, {"q_proj": 1, "k_proj": 2, "v_proj": 5}])
    x, slots = torch.randn(4, 1, 16), torch.tensor([[1], [2], [3], [0]])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        assert_right(module, x, slots)
    assert module.packed is not None
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    return module, x, slots


@torch.no_grad()
def change(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(1.0)


def copied(module):
    return copy.deepcopy(module)


def converted(module):
    return module.double().float()


def loaded(module, assign=True):
    other = {name: value + 1 for name, value in module.state_dict().items()}
    module.load_state_dict(other, assign=assign)
    return module


def loaded_in_place(module):
    return loaded(module, assign=False)


def replaced(module):
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach() + 1))
    return module


@pytest.mark.parametrize("act", [copied, converted, loaded, loaded_in_place, replaced, lambda module: module])
def test_packed_weights_are_the_parameters(packed, act):
    module, x, slots = packed
    module = act(module)
    with torch.no_grad():
        assert_right(module, x, slots)
        change(module)
        assert_right(module, x, slots)
        assert_right(module, x, slots, routing=Routing(slots, None))


def test_trained_after_inference_mode():
    """Packing must leave ordinary tensors behind, which autograd may save."""
    torch.manual_seed(0)
    module = make([{"q_proj": 4}, {"q_proj": 4}])
    x, slots = torch.randn(2, 1, 16), torch.tensor([[1], [2]])
    with torch.inference_mode():
        assert_right(module, x, slots)
        assert_right(module, x, torch.ones_like(slots))
    sum(y.square().sum() for y in run(module, x, slots)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_gradients_with_fixed_shapes(packed):
    """A compiled step of training reaches the parameters, packed or not."""
    module, x, slots = packed
    sum(y.square().sum() for y in run(module, x, slots, Routing(slots, None))).backward()
    got = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    sum(y.square().sum() for y in run(module, x, slots)).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_steps_alike_share_their_groups():
    grouped, slots = Grouper(), torch.tensor([2, 0, 1])
    first = grouped(slots)
    assert grouped(slots.clone()) is first
    assert grouped(torch.tensor([2, 0, 2])).groups != first.groups
    assert grouped(slots[:2]).groups == ((2, 0, 1),)
