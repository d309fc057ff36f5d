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
class _Packed:
    """All adapters' matrices of one module, one below the other: projection by projection, slot by slot."""

    a: Tensor  # [sum of ranks, in]
    b: dict[int, Tensor]  # for each output: B^T [sum of its ranks, out]
    spans: dict[int, slice]  # its rows of `a`
    firsts: dict[int, Tensor]  # [slots], the first row of each slot's A
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
        self.order = sorted(pairs, key=lambda pair: (pair[1].output, pair[0]))
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
        elif self._few(flat, routing) and (packed := self.pack()):
            self._masked(flat, flats, routing.slots.flatten(), packed)
        else:
            self._in_place(flat, flats, routing)
        return [y.view_as(shape) for y, shape in zip(flats, outputs, strict=True)]

    def _few(self, x: Tensor, routing: Routing) -> bool:
        """Whether one product over all adapters costs less than one for each: few tokens, and most adapters in use."""
        if len(routing.groups or ()) < 2 or len(x) > _FEW:
            return False
        used = sum(self.ranks.get(group.slot, 0) for group in routing.groups or ())
        return 2 * used > sum(self.ranks.values())

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
            for (_, update), start in zip(self.order, self._starts(), strict=True):
                rows = slice(start, start + update.rank)
                getattr(self, update.a).data = self.packed.a[rows]
                b, first = self.packed.b[update.output], self.packed.spans[update.output].start
                getattr(self, update.b).data = b[rows.start - first : rows.stop - first].t()
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
        b, spans, firsts = {}, {}, {}
        starts = self._starts()
        for output in dict.fromkeys(update.output for _, update in self.order):
            mine = [(start, slot, u) for start, (slot, u) in zip(starts, self.order, strict=True) if u.output == output]
            b[output] = torch.cat([getattr(self, update.b).t() for *_, update in mine])
            spans[output] = slice(mine[0][0], mine[-1][0] + mine[-1][2].rank)
            table = {slot: start for start, slot, _ in mine}
            # filled where they are used: a constant from the host would have to be copied there in every step
            firsts[output] = torch.cat(
                [torch.full((1,), table.get(slot, 0), device=a.device) for slot in range(max(self.updates) + 1)]
            )
        owners = torch.cat([torch.full((u.rank,), slot, device=a.device) for slot, u in self.order])
        scales = torch.cat([torch.full((u.rank,), u.scale, dtype=a.dtype, device=a.device) for _, u in self.order])
        return _Packed(a, b, spans, firsts, owners, scales)

    def _starts(self) -> list[int]:
        """The first row of each update in the packed A."""
        return [0, *accumulate(update.rank for _, update in self.order)][:-1]

    def _masked(self, x: Tensor, outputs: list[Tensor], slots: Tensor, packed: "_Packed") -> None:
        """Every A applied to every token; what is not a token's own is masked before B."""
        hidden = self._hidden(x, packed.a)
        hidden = torch.where(slots[:, None] == packed.owners, hidden * packed.scales, 0)
        for output, b in packed.b.items():
            y, mine = outputs[output], hidden[:, packed.spans[output]]
            outputs[output] = torch.addmm(y, mine, b) if b.dtype == y.dtype else y + (mine @ b).to(y.dtype)

    def _fixed(self, x: Tensor, outputs: list[Tensor], slots: Tensor) -> None:
        """With shapes that do not depend on the routing, for compiled graphs."""
        packed = (None if torch.is_grad_enabled() else self.pack()) or self._joined()
        widest = max(update.rank for _, update in self.order)
        if len(x) * widest * 4 > len(packed.a) or self.exchange is not None:  # 4: a gathered matrix is also written
            self._masked(x, outputs, slots, packed)
            return
        columns = torch.arange(widest, device=x.device)
        for output, b in packed.b.items():
            span = packed.spans[output]
            rows = (packed.firsts[output][slots][:, None] + columns).clamp(max=span.stop - 1)  # [T, r]
            hidden = torch.einsum("tri,ti->tr", packed.a[rows], x.to(packed.a.dtype)) * packed.scales[rows]
            hidden = torch.where(packed.owners[rows] == slots[:, None], hidden, 0)
            delta = torch.einsum("tr,tro->to", hidden, b[rows - span.start])
            outputs[output] = outputs[output] + delta.to(outputs[output].dtype)

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
