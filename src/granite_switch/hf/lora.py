"""The adapters' low-rank updates of the projections that share one input.

One such module stands beside the projections, and the block's forward adds what it gives explicitly: a quantiser that
replaces a projection cannot take the adapters with it. A and B are direct parameters of this module and used in its
own forward, so accelerate's hooks bring offloaded ones in. `core.lora` is the definition.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granite_switch.core.layout import AdapterTensor, Projection
from granite_switch.core.spec import SwitchSpec
from granite_switch.hf.routing import Routing

_FEW = 64  # tokens


@dataclass(frozen=True)
class _Update:
    """One adapter's update of one projection: names of its parameters, and the factor on B A."""

    output: int  # index of the projection in the group
    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class _Output:
    """One projection's share of the packed matrices."""

    b: Tensor  # B^T of all adapters [its ranks, out], slot by slot
    columns: Tensor | None  # [its ranks], their rows of the packed A; None: all of them
    edges: tuple[int, ...]  # first row of each slot in `b`; one more for the end
    firsts: tuple[Tensor, Tensor]  # [slots], the first row of each slot in A and in `b`
    ranks: Tensor  # [slots], its rank


@dataclass(frozen=True)
class _Packed:
    """All adapters' matrices of one module, one below the other: slot by slot, in each projection by projection."""

    a: Tensor  # [sum of ranks, in]
    edges: tuple[int, ...]  # first row of each slot; one more for the end
    outputs: dict[int, _Output]
    owners: Tensor  # [sum of ranks], the slot of each row
    scales: Tensor  # [sum of ranks], its factor

    def holds(self, parameter: Tensor) -> bool:
        """Whether the first parameter still stands here, and was not moved or replaced since."""
        return self.a.data_ptr() == parameter.data_ptr() and self.a.dtype == parameter.dtype


class SwitchedLora(nn.Module):
    """All adapters' updates of a group of projections in one layer.

    Args:
        spec: the adapters.
        layer: index of the decoder layer.
        projections: of the group, in the order of `forward`'s outputs.
        shapes: (out, in) of each projection.
    """

    def __init__(
        self,
        spec: SwitchSpec,
        layer: int,
        projections: Sequence[Projection],
        shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        super().__init__()
        # set where the projections are split over processes: what is to be done with the products with A
        self.exchange: Callable[[Tensor], Tensor] | None = None
        self.updates: dict[int, list[_Update]] = {}
        for slot, adapter in enumerate(spec.adapters, 1):
            for index, row in enumerate(projections):
                rank = adapter.rank_of(row.name, layer)
                if not rank:
                    continue
                a, b = (AdapterTensor(adapter.name, layer, row.name, m).parameter for m in "AB")
                out, width = shapes[row.name]
                self.register_parameter(a, nn.Parameter(torch.empty(rank, width)))
                self.register_parameter(b, nn.Parameter(torch.empty(out, rank)))
                update = _Update(index, a, b, rank, adapter.scale_of(row.name, layer))
                self.updates.setdefault(slot, []).append(update)
        self.ranks = {slot: sum(update.rank for update in updates) for slot, updates in self.updates.items()}
        pairs = [(slot, update) for slot, updates in self.updates.items() for update in updates]
        self.order = sorted(pairs, key=lambda pair: (pair[0], pair[1].output))
        self.packed: _Packed | None = None

    def reset_parameters(self) -> None:
        """A new adapter changes nothing: A as PEFT draws it (`LoraLayer.reset_lora_parameters`), B zero."""
        for updates in self.updates.values():
            for update in updates:
                nn.init.kaiming_uniform_(getattr(self, update.a), a=math.sqrt(5))
                nn.init.zeros_(getattr(self, update.b))

    def forward(self, x: Tensor, outputs: Sequence[Tensor], routing: Routing) -> list[Tensor]:
        """Add each token's update to the projections' outputs.

        Args:
            x: [B, S, in], the projections' input.
            outputs: of each projection, [B, S, out]; changed in place where no gradient is wanted.
            routing: the batch's slots.

        Returns:
            The outputs with the updates, each [B, S, out]. Tokens of slot 0 are what they were, bit for bit.
        """
        if not self.updates:
            return list(outputs)
        flat = x.flatten(0, -2)
        flats = [y.flatten(0, -2) for y in outputs]
        if routing.groups is None:
            self._fixed(flat, flats, routing.slots.flatten())
        elif torch.is_grad_enabled():
            self._out_of_place(flat, flats, routing)
        elif (few := self._few(flat, routing)) and (packed := self.pack()):
            self._masked(flat, flats, routing.slots.flatten(), packed, *few)
        else:
            self._in_place(flat, flats, routing)
        return [y.view_as(shape) for y, shape in zip(flats, outputs, strict=True)]

    def _few(self, x: Tensor, routing: Routing) -> tuple[int, int] | None:
        """The first and the last slot in use, if one product over all from one to the other costs less than one each.

        That is so for few tokens and where most adapters in between are in use.
        """
        slots = [group.slot for group in routing.groups or () if group.slot in self.ranks]
        if len(slots) < 2 or len(x) > _FEW:
            return None
        first, last = min(slots), max(slots)
        used = sum(self.ranks[slot] for slot in slots)
        between = sum(self.ranks.get(slot, 0) for slot in range(first, last + 1))
        return (first, last) if 2 * used > between else None

    def pack(self) -> "_Packed | None":
        """All adapters' matrices in one piece of memory, of which the parameters are views from then on.

        None where that cannot be: they are offloaded or split over processes, or of several dtypes.
        """
        compiling = torch.compiler.is_compiling()
        if self.packed is not None and (compiling or self.packed.holds(getattr(self, self.order[0][1].a))):
            return self.packed
        if compiling or self.exchange is not None or hasattr(self, "_hf_hook"):
            return None
        parameters = [getattr(self, name) for _, update in self.order for name in (update.a, update.b)]
        if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].is_meta:
            return None
        with torch.inference_mode(False), torch.no_grad():
            self.packed = self._joined()
            places = dict.fromkeys(self.packed.outputs, 0)
            for (_, update), start in zip(self.order, self._starts(), strict=True):
                getattr(self, update.a).data = self.packed.a[start : start + update.rank]
                place = places[update.output]
                places[update.output] = stop = place + update.rank
                getattr(self, update.b).data = self.packed.outputs[update.output].b[place:stop].t()
        return self.packed

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # a copy's parameters are no views of this

    def _joined(self) -> "_Packed":
        """The same as copies, which inside a compiled graph is made anew in every step."""
        a = torch.cat([getattr(self, update.a) for _, update in self.order])
        placed = list(zip(self._starts(), self.order, strict=True))
        slots, device = range(max(self.updates) + 2), a.device
        outputs = {}
        for output in sorted({update.output for _, update in self.order}):
            mine = [(start, slot, update) for start, (slot, update) in placed if update.output == output]
            ranks = {slot: update.rank for _, slot, update in mine}
            edges = tuple(accumulate((ranks.get(slot, 0) for slot in slots), initial=0))[:-1]
            starts = {slot: start for start, slot, _ in mine}
            columns = [torch.arange(start, start + update.rank, device=device) for start, _, update in mine]
            outputs[output] = _Output(
                torch.cat([getattr(self, update.b).t() for *_, update in mine]),
                torch.cat(columns) if edges[-1] < len(a) else None,
                edges,
                (_table([starts.get(slot, 0) for slot in slots], device), _table(edges, device)),
                _table([ranks.get(slot, 0) for slot in slots], device),
            )
        edges = tuple(accumulate((self.ranks.get(slot, 0) for slot in slots), initial=0))[:-1]
        owners = torch.cat([torch.full((u.rank,), slot, device=device) for slot, u in self.order])
        scales = torch.cat([torch.full((u.rank,), u.scale, dtype=a.dtype, device=device) for _, u in self.order])
        return _Packed(a, edges, outputs, owners, scales)

    def _starts(self) -> list[int]:
        """The first row of each update in the packed A."""
        return [0, *accumulate(update.rank for _, update in self.order)][:-1]

    def _masked(
        self, x: Tensor, outputs: list[Tensor], slots: Tensor, packed: "_Packed", first: int = 0, last: int = -2
    ) -> None:
        """The A of every slot from the first to the last applied to every token; what is not its own is masked."""
        rows = slice(packed.edges[first], packed.edges[last + 1])
        hidden = self._hidden(x, packed.a[rows])
        hidden = torch.where(slots[:, None] == packed.owners[rows], hidden * packed.scales[rows], 0)
        for index, output in packed.outputs.items():
            mine = slice(output.edges[first], output.edges[last + 1])
            if mine.start == mine.stop:
                continue
            y, b = outputs[index], output.b[mine]
            own = hidden if output.columns is None else hidden.index_select(1, output.columns[mine] - rows.start)
            outputs[index] = torch.addmm(y, own, b) if b.dtype == y.dtype else y + (own @ b).to(y.dtype)

    def _fixed(self, x: Tensor, outputs: list[Tensor], slots: Tensor) -> None:
        """With shapes that do not depend on the routing, for compiled graphs."""
        packed = (None if torch.is_grad_enabled() else self.pack()) or self._joined()
        widest = max(update.rank for _, update in self.order)
        if len(x) * widest * 4 > len(packed.a) or self.exchange is not None:  # 4: a gathered matrix is also written
            self._masked(x, outputs, slots, packed)
            return
        columns = torch.arange(widest, device=x.device)
        for index, output in packed.outputs.items():
            of_a, of_b = ((first[slots][:, None] + columns) for first in output.firsts)  # [T, r]
            of_a, of_b = of_a.clamp(max=len(packed.a) - 1), of_b.clamp(max=len(output.b) - 1)
            hidden = torch.einsum("tri,ti->tr", packed.a[of_a], x.to(packed.a.dtype)) * packed.scales[of_a]
            hidden = torch.where(columns < output.ranks[slots][:, None], hidden, 0)
            delta = torch.einsum("tr,tro->to", hidden, output.b[of_b])
            outputs[index] = outputs[index] + delta.to(outputs[index].dtype)

    def _in_place(self, x: Tensor, outputs: list[Tensor], routing: Routing) -> None:
        """Add group by group, each a range of rows: of the batch itself or, where adapters are mixed, of it sorted."""
        targets = dict(enumerate(outputs))
        if routing.order is not None:
            x = x.index_select(0, routing.order)
            used = {update.output for group in routing.groups or () for update in self.updates.get(group.slot, ())}
            targets = {index: outputs[index].new_zeros(len(x), outputs[index].shape[1]) for index in used}
        for group in routing.groups or ():
            rows = slice(group.start, group.stop)
            for update in self.updates.get(group.slot, ()):
                hidden, b = self._hidden(x[rows], getattr(self, update.a)), self._by_rank(update.b)
                target = targets[update.output][rows]
                if b.dtype == target.dtype:
                    target.addmm_(hidden, b.t(), alpha=update.scale)
                else:
                    target.add_(F.linear(hidden, b), alpha=update.scale)
        if routing.order is not None:
            for index, target in targets.items():
                outputs[index].index_add_(0, routing.order, target)

    def _by_rank(self, name: str) -> Tensor:
        """B [out, r], stored rank by rank: its product with a few tokens then reads memory in its order."""
        b: Tensor = getattr(self, name)
        if b.stride(0) != 1 and self.exchange is None and not hasattr(self, "_hf_hook"):
            with torch.inference_mode(False):
                b.data = b.data.t().contiguous().t()
        return b

    def _out_of_place(self, x: Tensor, outputs: list[Tensor], routing: Routing) -> None:
        """The same for autograd."""
        for group in routing.groups or ():
            rows = torch.arange(group.start, group.stop, device=x.device)
            if routing.order is not None:
                rows = routing.order[rows]
            for update in self.updates.get(group.slot, ()):
                hidden = self._hidden(x[rows], getattr(self, update.a))
                y = outputs[update.output]
                delta = F.linear(hidden, getattr(self, update.b)) * update.scale
                outputs[update.output] = y.index_add(0, rows, delta.to(y.dtype))

    def _hidden(self, x: Tensor, a: Tensor) -> Tensor:
        """x A^T, in A's dtype."""
        hidden = F.linear(x.to(a.dtype), a)
        return hidden if self.exchange is None else self.exchange(hidden)


def _table(values: Sequence[int], device: torch.device) -> Tensor:
    """A small table, filled where it is used: a constant from the host would have to be copied in every step."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])
