"""A logits processor for tokens that must not be generated."""

from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers.generation import LogitsProcessor


class Suppress(LogitsProcessor):
    """Sets the scores of tokens to -inf."""

    def __init__(self, tokens: tuple[slice, ...]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for tokens in self.tokens:
            scores[..., tokens] = float("-inf")
        return scores


def ranges(tokens: Iterable[int]) -> Iterator[slice]:
    """Token ids as slices of consecutive ids; control tokens are nearly always one slice."""
    start = last = -2
    for token in sorted(tokens):
        if token != last + 1:
            if start >= 0:
                yield slice(start, last + 1)
            start = token
        last = token
    if start >= 0:
        yield slice(start, last + 1)
