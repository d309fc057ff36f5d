"""The adapters' low-rank updates of the projections that share one input.

One such module stands beside the projections, and the block's forward adds what it gives explicitly: a quantiser that
replaces a projection cannot take the adapters with it. A and B are direct parameters of this module and used in its
own forward, so accelerate's hooks bring offloaded ones in. `core.lora` is the definition.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granite_switch.batched import Groups, Matrices, Product, Stack, add_product, in_turn, products, shelve
from granite_switch.core.layout import AdapterTensor, Projection
from granite_switch.core.spec import SwitchSpec
from granite_switch.hf.routing import Routing

_STEP = 8  # tokens


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
        self.shelves = shelve({slot: tuple((u.output, u.rank) for u in of) for slot, of in self.updates.items()})
        self.packed: list[Stack] | None = None
        self.views: dict[int, Matrices] = {}  # of each slot in them
        self.ready: tuple[Groups | None, list[Product]] = None, []  # of the latest step

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
            self._out_of_place(flat, flats, routing.groups)
        else:
            for product in self._products(routing.groups, flat.shape[0]):
                product.add(flat, flats)
        return [y.view_as(shape) for y, shape in zip(flats, outputs, strict=True)]

    def pack(self) -> list[Stack] | None:
        """All adapters' matrices in stacks, of which the parameters are views from then on.

        None where that cannot be: they are offloaded or split over processes, or of several dtypes.
        """
        compiling = torch.compiler.is_compiling()
        if self.packed is not None and (compiling or self._holds(self.packed)):
            return self.packed
        if compiling or self.exchange is not None or hasattr(self, "_hf_hook"):
            return None
        parameters = list(self.parameters())
        if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].is_meta:
            return None
        with torch.inference_mode(False), torch.no_grad():
            self.packed = self._stacked()
            for stack, slots in zip(self.packed, self.shelves, strict=True):
                for index, slot in enumerate(slots):
                    a, updates = stack.a[index], self.updates[slot]
                    parts = tuple((output, b[index]) for output, _, b in stack.b)
                    self.views[slot] = Matrices(a, parts, tuple(update.scale for update in updates))
                    for update, (_, columns, _), (_, b) in zip(updates, stack.b, parts, strict=True):
                        getattr(self, update.a).data = a[columns]
                        getattr(self, update.b).data = b.t()
        self.ready = None, []
        return self.packed

    def _products(self, groups: Groups, tokens: int) -> list[Product]:
        """What a batch needs. Of a step of decoding it is kept for the next, which is mostly the same.

        Packed, all A of an adapter take one product. For one adapter alone that rounds in another way than PEFT's one
        for each, and saves time with few tokens only.
        """
        known, ready = self.ready
        if known is groups and self.packed is not None and self._holds(self.packed):
            return ready
        few = tokens <= _STEP or groups.batches(self.shelves, tokens)
        if not few or (stacks := self.pack()) is None:
            return in_turn(groups, [_Unpacked(self, *of) for of in groups.groups if of.slot in self.updates])
        ready = products(groups, self.shelves, stacks, self.views, tokens)
        self.ready = groups, ready
        return ready

    def _unpack(self) -> None:
        self.packed, self.views, self.ready = None, {}, (None, [])

    def _holds(self, stacks: Sequence[Stack]) -> bool:
        """Whether the first parameter still stands in them, and was not moved or replaced since."""
        first = getattr(self, self.updates[self.shelves[0][0]][0].a)
        return bool(stacks[0].a.data_ptr() == first.data_ptr() and stacks[0].a.dtype == first.dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        self._unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None, "views": {}, "ready": (None, [])}  # a copy has its own

    def _stacked(self) -> list[Stack]:
        """The stacks as copies, which inside a compiled graph are made anew in every step."""
        stacks = []
        for slots in self.shelves:
            a = torch.stack([torch.cat([getattr(self, update.a) for update in self.updates[slot]]) for slot in slots])
            b, start = [], 0
            for number, update in enumerate(self.updates[slots[0]]):
                matrices = [getattr(self, self.updates[slot][number].b).t() for slot in slots]
                b.append((update.output, slice(start, start := start + update.rank), torch.stack(matrices)))
            scales = [update.scale for slot in slots for update in self.updates[slot] for _ in range(update.rank)]
            stacks.append(Stack(a, tuple(b), _table(scales, a).view(len(slots), 1, -1)))
        return stacks

    def _fixed(self, x: Tensor, outputs: list[Tensor], slots: Tensor) -> None:
        """With shapes that do not depend on the routing, for compiled graphs.

        Few tokens each gather their own matrices; for more, all matrices are applied to all of them, and what is not
        a token's own is masked.
        """
        stacks = (None if torch.is_grad_enabled() else self.pack()) or self._stacked()
        for stack, held in zip(stacks, self.shelves, strict=True):
            numbers = range(held[0], held[-1] + 1)
            known = torch.arange(held[0], held[-1] + 1, device=x.device) if held == (*numbers,) else _table(held, slots)
            own = slots[:, None] == known  # [T, n]
            if self.exchange is not None or 4 * len(x) > len(held):  # 4: a gathered matrix is also written
                hidden = self.low_rank(x, stack.a.flatten(0, 1)).view(len(x), len(held), -1)
                hidden = torch.where(own[:, :, None], hidden * stack.scales[:, 0], 0)
                deltas = [hidden[:, :, columns].flatten(1) @ b.flatten(0, 1) for _, columns, b in stack.b]
            else:
                places = own.int().argmax(1)
                hidden = torch.einsum("tri,ti->tr", stack.a[places], x.to(stack.a.dtype)) * stack.scales[places, 0]
                hidden = torch.where(own.any(1, keepdim=True), hidden, 0)
                deltas = [torch.einsum("tr,tro->to", hidden[:, columns], b[places]) for _, columns, b in stack.b]
            for (output, _, _), delta in zip(stack.b, deltas, strict=True):
                outputs[output] = outputs[output] + delta.to(outputs[output].dtype)

    def _out_of_place(self, x: Tensor, outputs: list[Tensor], groups: Groups) -> None:
        """The same for autograd."""
        for slot, start, stop in groups.groups:
            rows = torch.arange(start, stop, device=x.device) if groups.order is None else groups.order[start:stop]
            for update in self.updates.get(slot, ()):
                hidden = self.low_rank(x[rows], getattr(self, update.a))
                y = outputs[update.output]
                delta = F.linear(hidden, getattr(self, update.b)) * update.scale
                outputs[update.output] = y.index_add(0, rows, delta.to(y.dtype))

    def low_rank(self, x: Tensor, a: Tensor) -> Tensor:
        """x A^T, in A's dtype."""
        hidden = F.linear(x.to(a.dtype), a)
        return hidden if self.exchange is None else self.exchange(hidden)


class _Unpacked:
    """The products for a range of tokens that have one adapter, with its parameters as they are."""

    def __init__(self, module: SwitchedLora, slot: int, start: int, stop: int) -> None:
        self.module, self.updates, self.start, self.stop = module, module.updates[slot], start, stop
        self.changed = frozenset(update.output for update in self.updates)

    def add(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """As `Product.add`."""
        x = x[self.start : self.stop]
        for update in self.updates:
            target, b = outputs[update.output][self.start : self.stop], getattr(self.module, update.b).t()
            add_product(target, self.module.low_rank(x, getattr(self.module, update.a)), b, update.scale)


def _table(values: Sequence[float], like: Tensor) -> Tensor:
    """A small table, filled where it is used: a constant from the host would have to be copied in every step."""
    return torch.cat([like.new_full((len(list(same)),), value) for value, same in groupby(values)])
