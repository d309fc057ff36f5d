"""Properties of the definition of routing."""

from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core.routing import slots, substitute

CONTROLS = {100: 0, 101: 1, 102: 2, 103: 3}
sequences = st.lists(st.one_of(st.integers(0, 9), st.sampled_from(list(CONTROLS))), max_size=60)


def test_reads_as_the_definition_says() -> None:
    assert slots([5, 101, 5, 5, 102, 100, 5], CONTROLS) == [0, 1, 1, 1, 2, 0, 0]
    assert substitute([5, 101, 7], {101: 3}) == [5, 3, 7]


@given(sequences)
def test_latest_wins(tokens: list[int]) -> None:
    for position, slot in enumerate(slots(tokens, CONTROLS)):
        before = [CONTROLS[t] for t in tokens[: position + 1] if t in CONTROLS]
        assert slot == (before[-1] if before else 0)


@given(sequences, st.data())
def test_chunked_equals_whole(tokens: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    first = slots(tokens[:cut], CONTROLS)
    rest = slots(tokens[cut:], CONTROLS, initial=first[-1] if first else 0)
    assert first + rest == slots(tokens, CONTROLS)


@given(sequences, sequences)
def test_causal(prefix: list[int], rest: list[int]) -> None:
    assert slots(prefix + rest, CONTROLS)[: len(prefix)] == slots(prefix, CONTROLS)


@given(sequences)
def test_return_to_base_ends_an_adapter(tokens: list[int]) -> None:
    assert slots([*tokens, 100, 5], CONTROLS)[-2:] == [0, 0]


@given(sequences)
def test_exchange_changes_control_tokens_only(tokens: list[int]) -> None:
    substituted = substitute(tokens, dict.fromkeys(CONTROLS, 3))
    assert len(substituted) == len(tokens)
    assert not set(substituted) & set(CONTROLS)
    assert all(a == b for a, b in zip(tokens, substituted, strict=True) if a not in CONTROLS)


def test_ten_thousand_control_tokens() -> None:
    tokens = [101 + i % 3 for i in range(10_000)]
    assert slots(tokens, CONTROLS) == [1 + i % 3 for i in range(10_000)]
