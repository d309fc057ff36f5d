"""y += s B (A x) for one linear and a batch whose slots are known on the host, in few matmuls.

Tokens are grouped by slot once per forward. A group is a contiguous range of the batch, or a list of indices where
slots alternate. In a mixed decode step call overhead dominates the small matmuls, so the adapters are split and padded
to blocks of one rank, with one batched matmul for A and one for B. The blocks are cached with the decode step's
grouping and checked against every parameter before each step. `core.lora` is the definition.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 64  # tokens: a batch of up to this many is treated as a decode step
_FEWER = 8  # tokens: up to this many, calls cost more than their arithmetic
_MASK = 1 << 18  # cost of masking padding rows, in elements read in the same time
_LONG = 16  # batch tokens per run, from which runs stay ranges of the batch, since indexing copies


class Pair(NamedTuple):
    """One adapter's update of one linear."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


@dataclass(frozen=True)
class Group:
    """Tokens of one adapter."""

    slot: int
    rows: slice | Tensor  # of the flattened batch; a tensor is [n] int64
    tokens: tuple[int, ...] = ()  # the rows as integers; empty in batches of more than `FEW` tokens


class Blocks(NamedTuple):
    """The adapters of a mixed decode step in one linear: n blocks of rank R, each for m tokens."""

    a: Tensor  # [n, in, R]
    b: Tensor  # [n, R, out], scaled
    rows: slice | Tensor  # the token of each row, [n * m] int64; a slice if they are consecutive
    real: Tensor | None  # [n, m, 1], 0 for padding rows; None if there are none


class Padded(NamedTuple):
    """The blocks of one linear, and the identity of the parameters they copy."""

    key: list[int]  # data pointer and version of each A and B
    blocks: Blocks | None  # None if padding is impossible or wasteful


Pairs = Callable[[int], Pair | None]  # a slot -> its update of one linear, or None if it has none


@dataclass(frozen=True)
class Groups:
    """The tokens of a batch that have an adapter, grouped by slot."""

    groups: tuple[Group, ...] = ()
    tokens: int = 0  # of the whole batch
    padded: dict[int, Padded] = field(default_factory=dict, compare=False, repr=False)  # by the id of a linear's module

    def to(self, device: torch.device) -> "Groups":
        """The groups on another device, without the blocks."""
        moved = (
            Group(g.slot, g.rows if isinstance(g.rows, slice) else g.rows.to(device), g.tokens) for g in self.groups
        )
        return Groups(tuple(moved), self.tokens)

    def of(self, pairs: Pairs) -> list[tuple[Group, Pair]]:
        """The groups whose adapters update a linear, and their updates."""
        return [(g, pair) for g in self.groups if (pair := pairs(g.slot)) is not None]

    def check(self, linears: Iterable[tuple[int, Pairs]]) -> None:
        """Drop the blocks of linears whose parameters have changed since. Call it before a step that reuses the groups.

        In each linear, between matmuls that evict the parameters from the CPU's caches, it would take five times as
        long.

        Args:
            linears: the owner, as for `add`, and the updates of each linear.
        """
        for owner, pairs in linears:
            known = self.padded.get(owner)
            if known is not None and known.key != _key(self.of(pairs)):
                del self.padded[owner]


def group(slots: Tensor) -> Groups:
    """Group the tokens of a batch, [T], by slot, without slot 0. Copies slots to the host."""
    if len(slots) <= FEW:
        return grouped(slots.tolist(), slots.device)
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    return _grouped(values.tolist(), counts.tolist(), len(slots), slots.device)


def grouped(slots: Sequence[int], device: torch.device) -> Groups:
    """As `group`, for slots on the host."""
    values: list[int] = []
    counts: list[int] = []
    for slot in slots:
        if values and values[-1] == slot:
            counts[-1] += 1
        else:
            values.append(slot)
            counts.append(1)
    return _grouped(values, counts, len(slots), device)


def _grouped(values: list[int], counts: list[int], tokens: int, device: torch.device) -> Groups:
    starts = accumulate(counts, initial=0)
    runs = [(slot, start, start + n) for slot, start, n in zip(values, starts, counts, strict=False) if slot]
    few = tokens <= FEW
    if len({slot for slot, _, _ in runs}) == len(runs) or len(runs) * _LONG <= tokens:
        rows = (Group(slot, slice(start, stop), tuple(range(start, stop)) if few else ()) for slot, start, stop in runs)
        return Groups(tuple(rows), tokens)
    by_slot: dict[int, list[int]] = {}
    for slot, start, stop in runs:
        by_slot.setdefault(slot, []).extend(range(start, stop))
    indexed = (
        Group(slot, torch.tensor(rows, device=device), tuple(rows) if few else ()) for slot, rows in by_slot.items()
    )
    return Groups(tuple(indexed), tokens)


def add(x: Tensor, y: Tensor, groups: Groups, pairs: Pairs, owner: int | None = None) -> Tensor:
    """Add each token's update to a linear's output.

    Args:
        x: [T, in], the linear's input.
        y: [T, out], its output; modified in place unless gradients are recorded.
        groups: of these T tokens.
        pairs: the updates of this linear.
        owner: identifies the linear in `groups.padded`; None: use no blocks.

    Returns:
        [T, out]. Rows in slot 0 equal y bit for bit.
    """
    if torch.is_grad_enabled():
        for g, pair in groups.of(pairs):
            y = _added(x, y, g.rows, pair, groups.tokens)
        return y
    known = groups.padded.get(owner) if owner is not None else None
    if known is None:
        mine = groups.of(pairs)
        if owner is not None and len(mine) > 1 and groups.tokens <= FEW:
            known = groups.padded[owner] = Padded(_key(mine), _pad(mine))
    if known is not None and known.blocks is not None:
        _add_blocks(x, y, known.blocks)
        return y
    for g, pair in groups.of(pairs):
        _add_in_place(x, y, g.rows, pair, groups.tokens)
    return y


def _add_in_place(x: Tensor, y: Tensor, rows: slice | Tensor, pair: Pair, tokens: int) -> None:
    a, b, scale = pair
    if isinstance(rows, Tensor):
        y.index_add_(0, rows, _scaled(F.linear(_linear(x.index_select(0, rows), a), b), scale).to(y.dtype))
        return
    if rows.stop - rows.start < tokens:
        x, y = x[rows], y[rows]
    hidden = _linear(x, a)
    exact = y.dtype == torch.float32 and math.frexp(scale)[0] == 0.5  # a power of two: rounds as in two steps
    if y.dtype == b.dtype and (exact or len(x) <= _FEWER):  # one pass over y
        y.addmm_(hidden, b.t(), alpha=scale)
    else:
        y.add_(_scaled(F.linear(hidden, b), scale).to(y.dtype))


def _added(x: Tensor, y: Tensor, rows: slice | Tensor, pair: Pair, tokens: int) -> Tensor:
    """`_add_in_place`, out of place for autograd."""
    a, b, scale = pair
    if isinstance(rows, slice):
        if rows.stop - rows.start == tokens:
            return y + (F.linear(_linear(x, a), b) * scale).to(y.dtype)
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return y.index_add(0, rows, (F.linear(_linear(x.index_select(0, rows), a), b) * scale).to(y.dtype))


def _scaled(delta: Tensor, scale: float) -> Tensor:
    return delta if scale == 1 else delta.mul_(scale)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight)


def _key(mine: list[tuple[Group, Pair]]) -> list[int]:
    return [version for _, (a, b, _) in mine for version in (a.data_ptr(), _version(a), b.data_ptr(), _version(b))]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pad(mine: list[tuple[Group, Pair]]) -> Blocks | None:
    own, lengths = [pair for _, pair in mine], [len(g.tokens) for g, _ in mine]
    first, ranks = own[0], [len(pair.a) for pair in own]
    if any(pair.a.dtype != first.a.dtype or pair.a.device != first.a.device for pair in own):
        return None
    if max(lengths) * len(own) > 2 * sum(lengths) + 32:
        return None
    # except on CPU, `index_add_` adds a token's blocks in any order, so results could vary: give each token one block
    sizes = {*ranks} if first.a.device.type == "cpu" else {max(ranks)}
    rank, alone = _cheapest(sizes, ranks, lengths, first.a.shape[1] + len(first.b), len(first.b))
    cut = [
        (tokens, pair, start)
        for g, pair in mine
        for tokens in ([(token,) for token in g.tokens] if alone else [g.tokens])
        for start in range(0, len(pair.a), rank)
    ]
    cut.sort(key=lambda block: block[0])
    length = max(len(tokens) for tokens, _, _ in cut)
    with torch.inference_mode(False), torch.no_grad():
        a = first.a.new_zeros(len(cut), rank, first.a.shape[1])
        b = first.a.new_zeros(len(cut), rank, len(first.b))
        for i, (_, pair, start) in enumerate(cut):
            part = slice(start, min(start + rank, len(pair.a)))
            a[i, : part.stop - start].copy_(pair.a[part])
            b[i, : part.stop - start].copy_(pair.b[:, part].t()).mul_(pair.scale)
        rows = [token for tokens, _, _ in cut for token in tokens + tokens[:1] * (length - len(tokens))]
        real = [[[float(j < len(tokens))] for j in range(length)] for tokens, _, _ in cut]
        in_order = rows == [*range(rows[0], rows[0] + len(rows))]
        return Blocks(
            a.transpose(1, 2),
            b,
            slice(rows[0], rows[0] + len(rows)) if in_order else torch.tensor(rows, device=a.device),
            None if alone else torch.tensor(real, dtype=a.dtype, device=a.device),
        )


def _cheapest(sizes: set[int], ranks: list[int], lengths: list[int], width: int, out: int) -> tuple[int, bool]:
    """The rank of a block, and whether each block has one token, so that the batched matmuls move the least memory.

    The cost counts elements: of the blocks, of each row's input, update and output, and `_MASK` for padding rows.
    """

    def cost(rank: int, alone: bool) -> int:
        blocks = sum(-(-r // rank) * (n if alone else 1) for r, n in zip(ranks, lengths, strict=True))
        rows = blocks * (1 if alone else max(lengths))
        return blocks * rank * width + rows * (width + out) + (0 if alone else _MASK)

    return min(((rank, alone) for rank in sizes for alone in (True, False)), key=lambda option: cost(*option))


def _add_blocks(x: Tensor, y: Tensor, blocks: Blocks) -> None:
    a, b, rows, real = blocks
    x = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    hidden = torch.bmm((x if x.dtype == a.dtype else x.to(a.dtype)).view(len(a), -1, x.shape[1]), a)
    if real is not None:
        hidden.mul_(real)
    delta = torch.bmm(hidden, b).flatten(0, 1)
    if delta.dtype != y.dtype:
        delta = delta.to(y.dtype)
    if isinstance(rows, slice):
        y[rows].add_(delta)
    else:
        y.index_add_(0, rows, delta)
