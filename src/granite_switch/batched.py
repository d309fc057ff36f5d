"""Low-rank updates of a batch in which tokens have different adapters, in as few products as that takes.

For backends that know on the host which adapters a batch uses. Adapters of equal ranks lie side by side in one piece
of memory, a stack; those in use that are neighbours there take one batched product, the tokens of each padded to as
many as the one with most has. Steps of decoding are alike, so what can be made ready is made ready once: in such a step
every call costs more than its arithmetic. `core.lora` is the definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 64  # tokens: a step of decoding, not a prompt
_LONG = 16  # tokens: runs of more are not worth sorting, which copies what goes in and what comes out

Ranks = tuple[tuple[int, int], ...]  # of one adapter in one module: (output, rank)
Shelves = tuple[tuple[int, ...], ...]  # the slots of each stack


class Group(NamedTuple):
    """Tokens of one adapter: a range of the flattened batch, or of `Groups.order` where there is one."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stack:
    """The matrices of adapters that have the same ranks."""

    a: Tensor  # [n, R, in], of all outputs one after the other
    b: tuple[tuple[int, slice, Tensor], ...]  # output, its columns of R, B^T [n, r, out]
    scales: Tensor | None = None  # [n, 1, R]; None: 1


class Matrices(NamedTuple):
    """One adapter's, in one module."""

    a: Tensor  # [R, in]
    b: tuple[tuple[int, Tensor], ...]  # output, B^T [r, out]
    scales: tuple[float, ...]  # of each B


@dataclass(frozen=True)
class Batch:
    """Tokens of neighbours in a stack."""

    stack: int
    members: slice  # of the stack
    tokens: Tensor  # [n * m] int64, the token of each row
    real: Tensor | None  # [n, m, 1] bool, False for rows that pad; None: there are none


class Product(Protocol):
    """A product that a module needs, ready to be used in step after step."""

    changed: frozenset[int]  # outputs

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """outputs [T, out] += B (A x [T, in]), in place."""


def add_product(target: Tensor, hidden: Tensor, b: Tensor, scale: float) -> None:
    """target [T, out] += scale * hidden [T, r] b [r, out], in place; hidden and b are of one dtype."""
    if target.dtype == b.dtype:
        target.addmm_(hidden, b, alpha=scale)
    else:
        target.add_((hidden @ b).to(target.dtype), alpha=scale)


class Single:
    """The product for tokens that have one adapter: a range of the batch, or all of it."""

    def __init__(self, rows: slice | None, matrices: Matrices) -> None:
        self.rows = rows
        self.a, self.b, self.scales = matrices
        self.ranks = [len(b) for _, b in self.b]
        self.changed = frozenset(output for output, _ in self.b)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """As `Product.add`."""
        x = x if self.rows is None else x[self.rows]
        hidden = F.linear(x if x.dtype == self.a.dtype else x.to(self.a.dtype), self.a)
        parts = hidden.split_with_sizes(self.ranks, 1) if len(self.ranks) > 1 else (hidden,)
        for part, (output, b), scale in zip(parts, self.b, self.scales, strict=True):
            add_product(outputs[output] if self.rows is None else outputs[output][self.rows], part, b, scale)


class Several:
    """The product for tokens of neighbours in a stack."""

    def __init__(self, batch: Batch, stack: Stack) -> None:
        a = stack.a[batch.members]
        self.tokens, self.adapters, self.a = batch.tokens, len(a), a.transpose(1, 2)
        self.b = [(output, b[batch.members]) for output, _, b in stack.b]
        self.ranks = [columns.stop - columns.start for _, columns, _ in stack.b]
        self.factors = batch.real  # of A x: scales, and zeros for rows that pad
        if stack.scales is not None:
            scales = stack.scales[batch.members]
            self.factors = scales if batch.real is None else scales * batch.real
        self.changed = frozenset(output for output, _ in self.b)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """As `Product.add`."""
        rows = x.index_select(0, self.tokens)
        if rows.dtype != self.a.dtype:
            rows = rows.to(self.a.dtype)
        hidden = torch.bmm(rows.view(self.adapters, -1, x.shape[1]), self.a)
        if self.factors is not None:
            hidden.mul_(self.factors)
        parts = hidden.split_with_sizes(self.ranks, 2) if len(self.ranks) > 1 else (hidden,)
        for part, (output, b) in zip(parts, self.b, strict=True):
            target, delta = outputs[output], torch.bmm(part, b).flatten(0, 1)
            target.index_add_(0, self.tokens, delta if delta.dtype == target.dtype else delta.to(target.dtype))


@dataclass(frozen=True)
class Groups:
    """The tokens that have an adapter; those of each together, or run by run where runs are long."""

    groups: tuple[Group, ...] = ()
    order: Tensor | None = None  # [tokens of all groups] int64, rows of the batch; None: groups are ranges of those
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plans: dict[Shelves, tuple[Batch, ...]] = field(default_factory=dict, compare=False, repr=False)
    copies: dict[torch.device, "Groups"] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Groups":
        """The same on a device; asked again, the same object."""
        if device not in self.copies:
            with torch.inference_mode(False):
                order = None if self.order is None else self.order.to(device, non_blocking=non_blocking)
            self.copies[device] = Groups(self.groups, order, device)
        return self.copies[device]

    def batches(self, shelves: Shelves, tokens: int) -> tuple[Batch, ...]:
        """Batched products for a module whose stacks hold these slots; none where one for each adapter is better.

        That is so for one adapter, for many tokens in the batch, and for long runs of them.
        """
        if len(self.groups) < 2 or tokens > _FEW:
            return ()
        if self.order is None and sum(stop - start for _, start, stop in self.groups) >= _LONG * len(self.groups):
            return ()
        if shelves not in self.plans:
            self.plans[shelves] = self._plan(shelves)
        return self.plans[shelves]

    def _plan(self, shelves: Shelves) -> tuple[Batch, ...]:
        order = None if self.order is None else self.order.tolist()
        rows: dict[int, list[int]] = {}
        for slot, start, stop in self.groups:
            rows.setdefault(slot, []).extend(range(start, stop) if order is None else order[start:stop])
        batches = []
        for stack, slots in enumerate(shelves):
            for first, last in _runs([slot in rows for slot in slots]):
                mine = [rows[slot] for slot in slots[first:last]]
                longest = max(map(len, mine))
                tokens = [of_one + of_one[:1] * (longest - len(of_one)) for of_one in mine]
                real = [[[i < len(of_one)] for i in range(longest)] for of_one in mine]
                padded = any(len(of_one) < longest for of_one in mine)
                batches.append(
                    Batch(
                        stack,
                        slice(first, last),
                        torch.tensor(tokens, device=self.device).flatten(),
                        torch.tensor(real, device=self.device) if padded else None,
                    )
                )
        taken = sum(len(batch.tokens) for batch in batches)
        return tuple(batches) if taken <= 2 * sum(map(len, rows.values())) + 32 else ()


def group(slots: Tensor) -> Groups:
    """Group the tokens of a batch, [T], by slot, without slot 0. One transfer to the host."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    sizes = counts.tolist()
    starts = accumulate(sizes, initial=0)
    runs = [Group(slot, start, start + n) for slot, n, start in zip(values.tolist(), sizes, starts, strict=False)]
    runs = [run for run in runs if run.slot]
    if len({run.slot for run in runs}) == len(runs) or sum(sizes) >= _LONG * len(sizes):
        return Groups(tuple(runs), None, slots.device)
    rows: list[int] = []
    groups = []
    for slot in sorted({run.slot for run in runs}):
        start = len(rows)
        for run in runs:
            if run.slot == slot:
                rows.extend(range(run.start, run.stop))
        groups.append(Group(slot, start, len(rows)))
    return Groups(tuple(groups), torch.tensor(rows, device=slots.device), slots.device)


class Grouper:
    """Groups batches. Steps of decoding are alike: they get the same object, and with it what was made ready for it."""

    def __init__(self) -> None:
        self.last: tuple[list[int], Groups] = [], Groups()

    def __call__(self, slots: Tensor) -> Groups:
        """As `group`."""
        if len(slots) > _FEW:
            return group(slots)
        values, (last, groups) = slots.tolist(), self.last
        if values != last or groups.device != slots.device:
            with torch.inference_mode(False):  # a later batch may want gradients
                groups = group(slots)
            self.last = values, groups
        return groups


def shelve(ranks: Mapping[int, Ranks]) -> Shelves:
    """The slots of each stack: those of equal ranks."""
    shelves: dict[Ranks, list[int]] = {}
    for slot, of_slot in sorted(ranks.items()):
        shelves.setdefault(of_slot, []).append(slot)
    return tuple(map(tuple, shelves.values()))


class Sorted:
    """Products for rows of mixed adapters, sorted by adapter: they act on copies, which are added in the end."""

    def __init__(self, order: Tensor, products: Sequence[Product]) -> None:
        self.order, self.products = order, products
        self.changed = frozenset().union(*(product.changed for product in products))

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """As `Product.add`."""
        x = x.index_select(0, self.order)
        deltas = [y.new_zeros(len(x) if i in self.changed else 0, y.shape[1]) for i, y in enumerate(outputs)]
        for product in self.products:
            product.add(x, deltas)
        for i in self.changed:
            outputs[i].index_add_(0, self.order, deltas[i])


def products(
    groups: Groups, shelves: Shelves, stacks: Sequence[Stack], own: Mapping[int, Matrices], tokens: int
) -> list[Product]:
    """What a module has to multiply for a batch.

    Args:
        groups: of the batch.
        shelves: of the module.
        stacks: its matrices, as the shelves say.
        own: the same, of each slot.
        tokens: in the batch, T.
    """
    if batches := groups.batches(shelves, tokens):
        return [Several(batch, stacks[batch.stack]) for batch in batches]
    if len(groups.groups) == 1 and groups.order is None:
        ((slot, start, stop),) = groups.groups
        return [Single(None if stop - start == tokens else slice(start, stop), own[slot])] if slot in own else []
    return in_turn(
        groups, [Single(slice(start, stop), own[slot]) for slot, start, stop in groups.groups if slot in own]
    )


def in_turn(groups: Groups, each: list[Product]) -> list[Product]:
    """Products for groups, one after the other."""
    return each if groups.order is None or not each else [Sorted(groups.order, each)]


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Where a row of marks is true without a gap: first, and one after the last."""
    edges = [i for i in range(len(marks) + 1) if (i > 0 and marks[i - 1]) != (i < len(marks) and marks[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
