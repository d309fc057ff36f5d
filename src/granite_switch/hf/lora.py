"""The adapters' low-rank updates of the projections that share one input.

One such module stands beside the projections, and the block's forward adds what it gives explicitly: a quantiser that
replaces a projection cannot take the adapters with it. A and B are direct parameters of this module and used in its
own forward, so accelerate's hooks bring offloaded ones in. `core.lora` is the definition.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granite_switch.core.layout import AdapterTensor, Projection
from granite_switch.core.spec import SwitchSpec
from granite_switch.hf.routing import Routing


@dataclass(frozen=True)
class _Update:
    """One adapter's update of one projection: names of its parameters, and the factor on B A."""

    output: int  # index of the projection in the group
    a: str
    b: str
    rank: int
    scale: float


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
            flats = self._masked(flat, flats, routing.slots.flatten())
        elif torch.is_grad_enabled():
            flats = self._out_of_place(flat, flats, routing)
        else:
            self._in_place(flat, flats, routing)
        return [y.view_as(shape) for y, shape in zip(flats, outputs, strict=True)]

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
            b.data = b.data.t().contiguous().t()
        return b

    def _out_of_place(self, x: Tensor, outputs: list[Tensor], routing: Routing) -> list[Tensor]:
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
        return outputs

    def _hidden(self, x: Tensor, a: Tensor) -> Tensor:
        """x A^T, in A's dtype."""
        hidden = F.linear(x.to(a.dtype), a)
        return hidden if self.exchange is None else self.exchange(hidden)

    def _masked(self, x: Tensor, outputs: list[Tensor], slots: Tensor) -> list[Tensor]:
        """The same with shapes that do not depend on the routing, for compiled graphs.

        Every adapter's A is applied to every token, and what is not a token's own is masked before B.
        """
        for index, y in enumerate(outputs):
            updates = [(slot, u) for slot, us in self.updates.items() for u in us if u.output == index]
            if not updates:
                continue
            a = torch.cat([getattr(self, u.a) for _, u in updates])
            b = torch.cat([getattr(self, u.b) for _, u in updates], dim=1)
            # filled in the graph: a constant from the host would have to be copied to the device in every step
            owners = torch.cat([torch.full((u.rank,), slot, device=slots.device) for slot, u in updates])
            scales = torch.cat([torch.full((u.rank,), u.scale, dtype=a.dtype, device=a.device) for _, u in updates])
            own = slots[:, None] == owners
            hidden = self._hidden(x, a) * scales
            outputs[index] = y + F.linear(torch.where(own, hidden, 0), b).to(y.dtype)
        return outputs
