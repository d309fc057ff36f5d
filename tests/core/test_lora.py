"""The definition of the switched linear: slot 0 is the base, and each token gets only its own adapter."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core.lora import Pair, scaling, switched_linear


def _case(seed: int, tokens: int) -> tuple[np.ndarray, np.ndarray, dict[int, Pair]]:
    draw = np.random.default_rng(seed).standard_normal
    x, weight = draw((tokens, 6), dtype=np.float32), draw((5, 6), dtype=np.float32)
    pairs = {
        slot: Pair(draw((slot, 6), dtype=np.float32), draw((5, slot), dtype=np.float32), 0.5 * slot)
        for slot in (1, 2, 4)
    }
    return x, weight, pairs


slot_lists = st.lists(st.integers(0, 4), min_size=1, max_size=8)


@given(slot_lists, st.integers(0, 99))
def test_base_tokens_are_the_base_bit_for_bit(slots: list[int], seed: int) -> None:
    x, weight, pairs = _case(seed, len(slots))
    switched = switched_linear(x, weight, slots, pairs)
    plain = switched_linear(x, weight, [0] * len(slots), {})
    for row, slot in enumerate(slots):
        assert (switched[row] == plain[row]).all() == (slot not in pairs)


@given(slot_lists, st.integers(0, 99))
def test_each_token_is_its_merged_weight(slots: list[int], seed: int) -> None:
    x, weight, pairs = _case(seed, len(slots))
    for row, slot in enumerate(slots):
        merged = weight + (pairs[slot].scale * pairs[slot].b @ pairs[slot].a if slot in pairs else 0)
        np.testing.assert_allclose(switched_linear(x, weight, slots, pairs)[row], merged @ x[row], atol=2e-5)


def test_scaling_is_pefts() -> None:
    assert scaling(16, 4, use_rslora=False) == 4
    assert scaling(16, 4, use_rslora=True) == 8
