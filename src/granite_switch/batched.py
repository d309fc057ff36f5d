"""Low-rank updates of a batch in which tokens have different adapters, in as few products as that takes.

For backends that know on the host which adapters a batch uses. Adapters of equal ranks lie side by side in one piece
of memory, a stack; those in use that are neighbours there take one batched product, the tokens of each padded to as
many as the one with most has. `core.lora` is the definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Batch:
    """Tokens of neighbours in a stack."""

    stack: int
    members: slice  # of the stack
    tokens: Tensor  # [n * m] int64, the token of each row
    real: Tensor | None  # [n, m, 1] bool, False for rows that pad; None: there are none


@dataclass(frozen=True)
class Groups:
    """The tokens that have an adapter; those of each together, or run by run where runs are long."""

    groups: tuple[Group, ...] = ()
    order: Tensor | None = None  # [tokens of all groups] int64, rows of the batch; None: groups are ranges of those
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    plans: dict[Shelves, tuple[Batch, ...]] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Groups":
        order = None if self.order is None else self.order.to(device, non_blocking=non_blocking)
        return Groups(self.groups, order, device)

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


def shelve(ranks: Mapping[int, Ranks]) -> Shelves:
    """The slots of each stack: those of equal ranks."""
    shelves: dict[Ranks, list[int]] = {}
    for slot, of_slot in sorted(ranks.items()):
        shelves.setdefault(of_slot, []).append(slot)
    return tuple(map(tuple, shelves.values()))


def add(x: Tensor, outputs: Sequence[Tensor], stacks: Sequence[Stack], batches: Sequence[Batch]) -> None:
    """outputs += B (A x), in place.

    Args:
        x: [T, in].
        outputs: each [T, out].
        stacks: of the module, in the order of its shelves.
        batches: of this forward pass, for its shelves.
    """
    for batch in batches:
        stack = stacks[batch.stack]
        a = stack.a[batch.members]
        rows = x.index_select(0, batch.tokens).to(a.dtype).view(len(a), -1, x.shape[1])
        hidden = torch.bmm(rows, a.transpose(1, 2))
        if batch.real is not None:
            hidden.mul_(batch.real)
        if stack.scales is not None:
            hidden.mul_(stack.scales[batch.members])
        for output, columns, b in stack.b:
            delta = torch.bmm(hidden[:, :, columns], b[batch.members]).flatten(0, 1)
            outputs[output].index_add_(0, batch.tokens, delta.to(outputs[output].dtype))


def _runs(marks: Sequence[bool]) -> list[tuple[int, int]]:
    """Where a row of marks is true without a gap: first, and one after the last."""
    edges = [i for i in range(len(marks) + 1) if (i > 0 and marks[i - 1]) != (i < len(marks) and marks[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
