"""The adapters' updates of one linear for a batch whose slots are known on the host: y += s B (A x), in few matmuls.

Tokens are grouped by slot once per forward. A group is a range of the batch, or indices where slots alternate. In a
mixed decode step every matmul is small and its call costs more than its arithmetic, so adapters of similar ranks are
padded to one rank and share one batched matmul for A and one for B. The padded copies are kept with that decode step's
grouping and are checked against every parameter before they are used. `core.lora` is the definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 64  # tokens: a decode step, not a prompt
_STEP = 8  # tokens: up to so many, one call that scales and adds saves time; it rounds otherwise than PEFT
_LONG = 16  # tokens: longer runs stay ranges of the batch, since indexing copies


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
    tokens: tuple[int, ...] = ()  # the rows as integers, where they are few


@dataclass(frozen=True)
class Bucket:
    """Adapters of a mixed decode step in one linear, padded to one rank and to one number of tokens."""

    a: Tensor  # [n, in, R]
    b: Tensor  # [n, R, out], scaled
    rows: Tensor  # [n * m] int64, the token of each row
    real: Tensor | None  # [n, m, 1], 0 for rows that pad; None: no row does


class Padded(NamedTuple):
    """The buckets of one linear, and the parameters that were copied."""

    key: tuple[object, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class Groups:
    """The tokens of a batch that have an adapter, grouped by slot."""

    groups: tuple[Group, ...] = ()
    tokens: int = 0  # of the whole batch
    padded: dict[int, Padded] = field(default_factory=dict, compare=False, repr=False)  # by the id of a linear's module

    def to(self, device: torch.device) -> "Groups":
        """The same on a device, without the copies."""
        moved = (
            Group(g.slot, g.rows if isinstance(g.rows, slice) else g.rows.to(device), g.tokens) for g in self.groups
        )
        return Groups(tuple(moved), self.tokens)


def group(slots: Tensor) -> Groups:
    """Group the tokens of a batch, [T], by slot, without slot 0. One transfer to the host."""
    if len(slots) <= FEW:
        return grouped(slots.tolist(), slots.device)
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    return _grouped(values.tolist(), counts.tolist(), len(slots), slots.device)


def grouped(slots: Sequence[int], device: torch.device) -> Groups:
    """As `group`, of slots that are on the host."""
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


def add(x: Tensor, y: Tensor, groups: Groups, pairs: Mapping[int, Pair], owner: int | None = None) -> Tensor:
    """Add each token's update to a linear's output.

    Args:
        x: [T, in], the linear's input.
        y: [T, out], its output; changed in place unless gradients are recorded.
        groups: of these T tokens.
        pairs: slot -> its update of this linear; slots without one are left alone.
        owner: an id of the linear under which copies for mixed decode steps are kept; None: keep none.

    Returns:
        y with the updates. Rows of slot 0 are what they were, bit for bit.
    """
    mine = [g for g in groups.groups if g.slot in pairs]
    if torch.is_grad_enabled():
        for g in mine:
            y = _added(x, y, g.rows, pairs[g.slot], groups.tokens)
        return y
    if owner is not None and len(mine) > 1 and groups.tokens <= FEW:
        for bucket in (buckets := _buckets(groups, mine, pairs, owner)):
            _add_bucket(x, y, bucket)
        if buckets:
            return y
    for g in mine:
        _add_in_place(x, y, g.rows, pairs[g.slot], groups.tokens)
    return y


def _add_in_place(x: Tensor, y: Tensor, rows: slice | Tensor, pair: Pair, tokens: int) -> None:
    a, b, scale = pair
    if isinstance(rows, Tensor):
        y.index_add_(0, rows, _scaled(F.linear(_linear(x.index_select(0, rows), a), b), scale).to(y.dtype))
        return
    if rows.stop - rows.start < tokens:
        x, y = x[rows], y[rows]
    hidden = _linear(x, a)
    if len(x) <= _STEP and y.dtype == b.dtype:
        y.addmm_(hidden, b.t(), alpha=scale)
    else:
        y.add_(_scaled(F.linear(hidden, b), scale).to(y.dtype))


def _added(x: Tensor, y: Tensor, rows: slice | Tensor, pair: Pair, tokens: int) -> Tensor:
    """Out of place, for autograd."""
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


def _buckets(groups: Groups, mine: list[Group], pairs: Mapping[int, Pair], owner: int) -> tuple[Bucket, ...]:
    """The padded copies for this linear; none where they cannot be made or cost more than they save."""
    own = [pairs[g.slot] for g in mine]
    key = tuple([version for a, b, _ in own for version in (a.data_ptr(), _version(a), b.data_ptr(), _version(b))])
    known = groups.padded.get(owner)
    if known is None or known.key != key:
        known = groups.padded[owner] = Padded(key, _pad(mine, own))
    return known.buckets


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pad(mine: list[Group], own: list[Pair]) -> tuple[Bucket, ...]:
    """Buckets of adapters whose largest rank is at most twice the smallest."""
    first, lengths = own[0].a, [len(g.tokens) for g in mine]
    wasteful = max(lengths) * len(own) > 2 * sum(lengths) + 32
    if wasteful or any(p.a.dtype != first.dtype or p.a.device != first.device for p in own):
        return ()
    buckets: list[list[tuple[Group, Pair]]] = []
    for one, pair in sorted(zip(mine, own, strict=True), key=lambda member: len(member[1].a)):
        if not buckets or len(pair.a) > 2 * len(buckets[-1][0][1].a):
            buckets.append([])
        buckets[-1].append((one, pair))
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_bucket(members) for members in buckets)


def _bucket(members: list[tuple[Group, Pair]]) -> Bucket:
    rank, length = max(len(pair.a) for _, pair in members), max(len(g.tokens) for g, _ in members)
    first = members[0][1]
    a = first.a.new_zeros(len(members), rank, first.a.shape[1])
    b = first.a.new_zeros(len(members), rank, len(first.b))
    for i, (_, pair) in enumerate(members):
        a[i, : len(pair.a)].copy_(pair.a)
        b[i, : len(pair.a)].copy_(pair.b.t()).mul_(pair.scale)
    rows = [[g.tokens[j if j < len(g.tokens) else 0] for j in range(length)] for g, _ in members]
    real = [[[float(j < len(g.tokens))] for j in range(length)] for g, _ in members]
    padded = any(len(g.tokens) < length for g, _ in members)
    return Bucket(
        a.transpose(1, 2),
        b,
        torch.tensor(rows, device=a.device).flatten(),
        torch.tensor(real, dtype=a.dtype, device=a.device) if padded else None,
    )


def _add_bucket(x: Tensor, y: Tensor, bucket: Bucket) -> None:
    rows = x.index_select(0, bucket.rows)
    if rows.dtype != bucket.a.dtype:
        rows = rows.to(bucket.a.dtype)
    hidden = torch.bmm(rows.view(len(bucket.a), -1, x.shape[1]), bucket.a)
    if bucket.real is not None:
        hidden.mul_(bucket.real)
    delta = torch.bmm(hidden, bucket.b).flatten(0, 1)
    y.index_add_(0, bucket.rows, delta if delta.dtype == y.dtype else delta.to(y.dtype))
