"""Legacy format 1's hiding, against its definition as a loop over queries and keys."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.core.routing import slots
from granite_switch.core.spec import Hiding
from granite_switch.errors import CheckpointError

TOLERANCE = 1e-5
PAD = 1


@pytest.fixture(scope="module")
def model(old: Callable[..., Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(old(1), attn_implementation="eager")


def set_hiding(model: torch.nn.Module, hiding: Hiding) -> None:
    """Give a loaded model other groups and policies."""
    config = model.config
    switch = {**config.switch, "hiding": {"groups": hiding.groups, "policy": hiding.policy}}
    config.switch = switch
    module = type(model.model.hiding)(config.switch_spec, config.vocab_size)
    model.model.hiding = module


@torch.no_grad()
def definition(model: torch.nn.Module, tokens: Sequence[int], padding: int = 0) -> Tensor:
    """Logits of one sequence, [S, V], by the definition, with explicit mask and positions.

    A query in slot s does not see a key in a group that s's policy hides, unless the query is in that group itself.
    A position is reduced by the number of keys that the policy hides, and by at least one if an adapter is active.
    """
    spec = model.config.switch_spec
    groups, policy = spec.hiding.groups, spec.hiding.policy
    here = slots(tokens, spec.control_slots)
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    positions = []
    for q, (query, slot) in enumerate(zip(tokens, here, strict=True)):
        hides = [groups[g] for g in policy[slot]]
        for k in range(padding, q + 1):
            mask[q, k] = not any(tokens[k] in group and query not in group for group in hides)
        gaps = sum(any(tokens[k] in group for group in hides) for k in range(padding, q + 1))
        positions.append(max(0, q - padding - max(gaps, int(slot > 0))))
    mask |= torch.eye(len(tokens), dtype=torch.bool)  # for padding: a row must see something
    hiding, model.model.hiding = model.model.hiding, None
    try:
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        ids, where = torch.tensor([tokens]), torch.tensor([positions])
        return model(ids, attention_mask=additive[None, None], position_ids=where, use_cache=False).logits[0]
    finally:
        model.model.hiding = hiding


@st.composite
def cases(draw: st.DrawFn) -> tuple[Hiding, list[int], int, list[int]]:
    """Groups and policies over three control tokens; a sequence; its padding; sizes of its chunks."""
    controls = [CONTROL, CONTROL + 1, CONTROL + 2]
    groups = tuple(tuple(draw(st.sets(st.sampled_from(controls), min_size=1))) for _ in range(draw(st.integers(0, 3))))
    indices = st.sets(st.integers(0, len(groups) - 1)) if groups else st.just(set())
    hiding = Hiding(groups, tuple(tuple(sorted(draw(indices))) for _ in range(4)))
    tokens = draw(st.lists(st.sampled_from([*controls, 40, 50, 60, 70, 80, 90]), min_size=2, max_size=12))
    cuts = draw(st.lists(st.integers(1, 5), min_size=6, max_size=6))
    return hiding, tokens, draw(st.integers(0, 3)), cuts


CONTROL = 400  # the first control token, which is the size of the tests' tokenizer


@settings(max_examples=30)
@given(case=cases())
def test_equals_the_definition(model: torch.nn.Module, case: tuple[Hiding, list[int], int, list[int]]) -> None:
    hiding, tokens, padding, cuts = case
    assert min(model.config.switch_spec.control_slots) == CONTROL
    set_hiding(model, hiding)
    tokens = [PAD] * padding + tokens
    want = definition(model, tokens, padding)[padding:]
    mask = torch.tensor([[0] * padding + [1] * (len(tokens) - padding)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            for cache in (None, DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=24)):
                got = _chunked(model, tokens, mask, positions, cache, cuts if cache else [])[padding:]
                torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    model.set_attn_implementation("eager")


def _chunked(
    model: torch.nn.Module, tokens: list[int], mask: Tensor, positions: Tensor, cache: object, cuts: list[int]
) -> Tensor:
    """Logits, [S, V], of a sequence that is prefilled in chunks."""
    edges = [0]
    for cut in [*cuts, len(tokens)]:
        edges.append(min(edges[-1] + cut, len(tokens)))
    parts = []
    for start, end in pairwise(edges):
        if start < end:
            ids = torch.tensor([tokens[start:end]])
            options = {"past_key_values": cache, "use_cache": cache is not None}
            parts.append(
                model(ids, attention_mask=mask[:, :end], position_ids=positions[:, start:end], **options).logits[0]
            )
    return torch.cat(parts)


@pytest.fixture
def apart(model: torch.nn.Module) -> torch.nn.Module:
    """Policies that differ between adapters: the first hides its own group, the second the others', the third none."""
    controls = [CONTROL, CONTROL + 1, CONTROL + 2]
    set_hiding(model, Hiding((tuple(controls[:2]), (controls[2],)), ((0, 1), (0,), (1,), ())))
    return model


ROWS = [[PAD, PAD, 40, CONTROL, 50, CONTROL + 1, 60, 70], [CONTROL + 2, 40, 50, CONTROL, 60, 70, CONTROL + 1, 80]]


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_generates_with_every_cache(apart: torch.nn.Module, cache: str) -> None:
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded caches need CUDA")
    ids = torch.tensor(ROWS)
    mask = (ids != PAD).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = apart.generate(ids, use_cache=False, **options)
    name = None if cache == "dynamic" else cache
    got = apart.generate(ids, cache_implementation=name, **options)
    assert got.tolist() == want.tolist()


def test_hides_in_a_quantised_cache(apart: torch.nn.Module) -> None:
    pytest.importorskip("optimum.quanto")
    tokens, cache = ROWS[1], QuantizedCache("quanto", apart.config, nbits=4, q_group_size=16)
    with torch.no_grad():
        apart(torch.tensor([tokens[:5]]), past_key_values=cache)
        weights = apart(torch.tensor([tokens[5:]]), past_key_values=cache, output_attentions=True).attentions
    for layer in weights:
        unseen = {(q + 5, k) for q, k in (layer[0].sum(0) == 0).nonzero().tolist() if k <= q + 5}
        assert unseen == {(5, 3), (6, 0), (7, 0)}


def test_beams_keep_what_is_hidden(apart: torch.nn.Module) -> None:
    ids = torch.tensor(ROWS)
    options = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert apart.generate(ids, **options).tolist() == apart.generate(ids, use_cache=False, **options).tolist()


def test_flash_attention_is_refused(apart: torch.nn.Module) -> None:
    apart.config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(CheckpointError, match=r"cannot hide[\s\S]*upgrade"):
            apart(torch.tensor([ROWS[1]]))
    finally:
        apart.config._attn_implementation = "eager"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention(apart: torch.nn.Module) -> None:
    apart.set_attn_implementation("flex_attention")
    try:
        with torch.no_grad():
            got = apart(torch.tensor([ROWS[1] * 4]), use_cache=False).logits[0]
    finally:
        apart.set_attn_implementation("eager")
    torch.testing.assert_close(got, definition(apart, ROWS[1] * 4), atol=TOLERANCE, rtol=TOLERANCE)
