"""The callback of everything that writes a model."""

from typing import Protocol


class Progress(Protocol):
    """A function that is called after each piece that is written.

    Args:
        count: bytes in this piece.
        total: bytes in all pieces, the same in every call.
    """

    def __call__(self, count: int, total: int, /) -> object: ...
