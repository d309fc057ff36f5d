"""The definition of a switch, as plain functions on integers.

Every backend is tested against it; it is written to be read, not to be fast. Slot 0 is the base model, slots 1..N are
the adapters in the order of the checkpoint's config.
"""

from collections.abc import Mapping, Sequence


def slots(tokens: Sequence[int], control_slots: Mapping[int, int], initial: int = 0) -> list[int]:
    """Return the slot of each token: that of the latest control token at or before it.

    Args:
        tokens: token ids of one sequence, in order.
        control_slots: control token id -> slot. The return-to-base token maps to 0.
        initial: the slot before `tokens`, for example after a cached prefix.
    """
    result = []
    current = initial
    for token in tokens:
        current = control_slots.get(token, current)
        result.append(current)
    return result


def substitute(tokens: Sequence[int], substitutes: Mapping[int, int]) -> list[int]:
    """Return the tokens that the decoder embeds: each control token is replaced by its substitute.

    Args:
        tokens: token ids of one sequence.
        substitutes: control token id -> token id to embed in its place.
    """
    return [substitutes.get(token, token) for token in tokens]
