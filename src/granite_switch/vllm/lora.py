"""The adapters' low-rank updates behind vLLM's own LoRA layers, with the slots worked out in the forward pass.

vLLM's layer classes wrap the linears: they slice for tensor parallelism, keep quantised products and add before the
all-reduce. They call `add_lora_linear` of an object they are given; that object is ours. On GPUs it feeds vLLM's
Triton kernels with metadata of fixed shape, so that CUDA graphs can hold it; on CPU it is a product for each adapter
that the batch uses, on unpadded weights. `core.lora` is the definition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import LoRAConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import from_layer, replace_submodule
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from granite_switch.core.layout import GRANITE, AdapterTensor
from granite_switch.core.spec import SwitchSpec

_FEW = 64  # tokens
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what LoRAConfig takes; the layers pad to one of them


def wrap_linears(
    model: nn.Module, layer: int, spec: SwitchSpec, tensors: Mapping[str, Tensor], router: "Router"
) -> None:
    """Put one decoder layer's linears into LoRA layers that hold every adapter.

    Args:
        model: the decoder, with `layers`.
        layer: index of the decoder layer.
        spec: the adapters.
        tensors: their A and B by checkpoint name.
        router: gives the LoRA layers what to call.
    """
    config = router.vllm_config
    linears = dict.fromkeys(f"{row.block}.{row.vllm}" for row in GRANITE)
    for path in linears:
        rows = [row for row in GRANITE if f"{row.block}.{row.vllm}" == path]
        ranks = [[adapter.rank_of(row.name, layer) for row in rows] for adapter in spec.adapters]
        largest = max((max(of_slot) for of_slot in ranks), default=0)
        if not largest:
            continue
        name = f"layers.{layer}.{path}"
        settings = LoRAConfig(
            max_lora_rank=next(rank for rank in _RANKS if rank >= largest),
            max_loras=len(ranks),
            lora_dtype=config.model_config.dtype,
        )
        base = model.get_submodule(name)
        repacked = getattr(base, "weight", base) is None  # as oneDNN's int8 kernels leave it
        if repacked:
            base.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # LoRA layers read their device from it
        linear = from_layer(base, len(ranks), settings, [row.name for row in rows], config.model_config.hf_config)
        if repacked:
            base.weight = None
        for index, adapter in enumerate(spec.adapters):
            a, b = [], []
            for row, rank in zip(rows, ranks[index], strict=True):
                keys = [AdapterTensor(adapter.name, layer, row.name, matrix).key for matrix in "AB"]
                a.append(tensors[keys[0]] if rank else None)
                b.append(tensors[keys[1]].float() * adapter.scale_of(row.name, layer) if rank else None)
            if len(rows) > 1:
                linear.set_lora(index, a, b)
            elif a[0] is not None:
                linear.set_lora(index, a[0], b[0])
        replace_submodule(model, name, linear)
        router.attach(linear, ranks, name)


class Router:
    """What every LoRA layer shares: the slots of the tokens in this forward pass.

    Args:
        spec: the adapters.
        vllm_config: vLLM's.
    """

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.adapters = len(spec.adapters)
        self.tokens = vllm_config.scheduler_config.max_num_batched_tokens

    def route(self, slots: Tensor) -> None:
        """Work out, once in a forward pass, what the layers need of the slots, [T] int32."""
        raise NotImplementedError

    def attach(self, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]], name: str) -> None:
        """Give a LoRA layer the object whose `add_lora_linear` it calls."""
        raise NotImplementedError


class TritonRouter(Router):
    """vLLM's kernels, with the metadata of `LoRAKernelMeta.prepare_tensors` in shapes that depend on T alone.

    There an adapter that no token uses is left out of the lists; here it stands in them with no tokens, which the
    kernels leave at once. So nothing is asked of the device, and a CUDA graph can hold it all.
    """

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__(spec, vllm_config)
        self.mapping = torch.empty(self.tokens, dtype=torch.int32)  # adapter of each token, -1 for none
        self.order = torch.empty(self.tokens, dtype=torch.int32)  # tokens sorted by adapter
        self.ids = torch.arange(-1, self.adapters, dtype=torch.int32)
        self.counts = torch.empty(self.adapters + 1, dtype=torch.int32)
        self.starts = torch.zeros(self.adapters + 2, dtype=torch.int32)
        self.nobody = torch.tensor([False], device="cpu")
        self.groups = torch.tensor([self.adapters + 1], dtype=torch.int32, device="cpu")

    def route(self, slots: Tensor) -> None:
        count, mapping = slots.size(0), slots - 1
        counts = (mapping[:, None] == self.ids).sum(0, dtype=torch.int32)
        self.mapping[:count].copy_(mapping)
        self.order[:count].copy_(mapping.argsort(stable=True))
        self.counts.copy_(counts)
        self.starts[1:].copy_(counts.cumsum(0))

    def attach(self, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]], name: str) -> None:
        linear.set_mapping(self)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        a: tuple[Tensor, ...],
        b: tuple[Tensor, ...],
        scale: float,
        slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **_: object,
    ) -> None:
        """y += B (A x), in place; the arguments are those of `PunicaWrapperBase.add_lora_linear`.

        Args:
            y: [T, out].
            x: [T, in].
            a: of each slice, [N, 1, R, in].
            b: of each slice, [N, 1, out of the slice, R].
        """
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        count = x.size(0)
        metadata = (self.mapping[:count], self.order[:count], self.counts, self.starts, self.ids)
        hidden = torch.empty(len(slices), count, b[0].size(-1), dtype=torch.float32, device=x.device)
        lora_shrink(x, a, hidden, *metadata, self.nobody, self.groups, scale)
        lora_expand(hidden, b, y, *metadata, self.nobody, self.groups, offset_start=0, add_inputs=add_inputs)


@dataclass(frozen=True)
class _Update:
    """One adapter's update of one (packed) linear."""

    a: Tensor  # [sum of ranks, in]: of every projection in the linear
    outputs: tuple[tuple[slice, slice, Tensor], ...]  # columns of y, columns of A x, B^T [r, out]


@dataclass(frozen=True)
class _Output:
    """One projection's share of a (packed) linear's matrices."""

    columns: slice  # of y
    b: Tensor  # B^T of all adapters [its ranks, out], slot by slot
    rows: Tensor | None  # [its ranks], their rows of A; None: all of them
    edges: tuple[int, ...]  # first row of each slot in `b`; one more for the end


@dataclass(frozen=True)
class _Groups:
    """The tokens that have an adapter, those of each together."""

    slots: Tensor | None = None  # of all tokens, [T]
    spans: tuple[tuple[int, slice], ...] = ()  # slot, its rows
    order: Tensor | None = None  # token of each row; None: rows are the batch's own


class GroupedRouter(Router):
    """A product for each adapter that the batch uses, or one over all of them, on unpadded weights.

    Compiled graphs call it as two operators. Both name `slots`, the first as changed, which keeps them in order.
    """

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__(spec, vllm_config)
        self.slots = torch.zeros(self.tokens, dtype=torch.int32)
        self.groups = _Groups()
        self.context = vllm_config.compilation_config.static_forward_context
        self.context["granite_switch.router"] = self

    def route(self, slots: Tensor) -> None:
        if torch.compiler.is_compiling():
            current = self.slots[: slots.size(0)]
            current.copy_(slots)
            torch.ops.vllm.granite_switch_route(current)
        else:
            self.groups = _groups(slots)

    def attach(self, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]], name: str) -> None:
        name = f"granite_switch.{name}"
        self.context[name] = grouped = _GroupedLinear(self, linear, ranks, name)
        linear.lora_a_stacked = linear.lora_b_stacked = ()
        linear.set_mapping(grouped)


class _GroupedLinear:
    """One linear's adapters, taken out of the padded stacks of a LoRA layer."""

    def __init__(
        self, router: GroupedRouter, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]], name: str
    ) -> None:
        self.router, self.name = router, name
        stacks = list(zip(linear.lora_a_stacked, linear.lora_b_stacked, strict=True))
        # adapter by adapter, in each projection by projection: an adapter's A is one piece
        rows = [(index, part, rank) for index, of in enumerate(ranks) for part, rank in enumerate(of) if rank]
        self.a = torch.cat([stacks[part][0][index, 0, :rank] for index, part, rank in rows])
        self.owners = torch.tensor([index + 1 for index, _, rank in rows for _ in range(rank)], dtype=torch.int32)
        self.edges = _edges([sum(of) for of in ranks])
        parts = torch.tensor([part for _, part, rank in rows for _ in range(rank)])
        self.outputs: list[_Output] = []
        collected: dict[int, list[tuple[slice, slice, Tensor]]] = {}
        column = 0
        for part, (_, b) in enumerate(stacks):
            columns = slice(column, column := column + b.shape[2])
            edges = _edges([of[part] for of in ranks])
            if not edges[-1]:
                continue
            mine = (parts == part).nonzero().flatten()
            whole = torch.cat([b[index, 0, :, : of[part]].t() for index, of in enumerate(ranks)])
            self.outputs.append(_Output(columns, whole, mine if len(mine) < len(parts) else None, edges))
            for index, of in enumerate(ranks):
                if rank := of[part]:
                    before, own = sum(of[:part]), whole[edges[index + 1] : edges[index + 2]]
                    collected.setdefault(index + 1, []).append((columns, slice(before, before + rank), own))
        self.ranks = {index + 1: sum(of) for index, of in enumerate(ranks) if any(of)}
        starts = accumulate(self.ranks.values(), initial=0)
        self.updates = {
            slot: _Update(self.a[start : start + rank], tuple(collected[slot]))
            for (slot, rank), start in zip(self.ranks.items(), starts, strict=False)
        }

    def add_lora_linear(self, y: Tensor, x: Tensor, *_: object, **__: object) -> None:
        """y [T, out] += B (A x [T, in]), in place."""
        if torch.compiler.is_compiling():
            torch.ops.vllm.granite_switch_add(y, x, self.router.slots[: x.size(0)], self.name)
        else:
            self.add(y, x)

    def add(self, y: Tensor, x: Tensor) -> None:
        groups = self.router.groups
        if few := self._few(x, groups):
            self._add_masked(y, x, groups.slots, *few)
        elif groups.order is None:
            self._add(y, x, groups)
        elif any(slot in self.updates for slot, _ in groups.spans):
            delta = y.new_zeros(len(groups.order), y.shape[1])
            self._add(delta, x[groups.order], groups)
            y.index_add_(0, groups.order, delta)

    def _few(self, x: Tensor, groups: _Groups) -> tuple[int, int] | None:
        """The first and the last slot in use, if one product over all from one to the other costs less than one each.

        That is so for few tokens and where most adapters in between are in use.
        """
        slots = [slot for slot, _ in groups.spans]
        if len(slots) < 2 or len(x) > _FEW:
            return None
        first, last = min(slots), max(slots)
        between = self.edges[last + 1] - self.edges[first]
        return (first, last) if 2 * sum(self.ranks.get(slot, 0) for slot in slots) > between else None

    def _add_masked(self, y: Tensor, x: Tensor, slots: Tensor, first: int, last: int) -> None:
        """The A of every slot from the first to the last applied to every token; what is not its own is masked."""
        rows = slice(self.edges[first], self.edges[last + 1])
        hidden = torch.where(slots[:, None] == self.owners[rows], F.linear(x, self.a[rows]), 0)
        for output in self.outputs:
            mine = slice(output.edges[first], output.edges[last + 1])
            if mine.start < mine.stop:
                own = hidden if output.rows is None else hidden.index_select(1, output.rows[mine] - rows.start)
                y[:, output.columns].addmm_(own, output.b[mine])

    def _add(self, y: Tensor, x: Tensor, groups: _Groups) -> None:
        for slot, rows in groups.spans:
            if update := self.updates.get(slot):
                hidden, target = F.linear(x[rows], update.a), y[rows]
                for columns, ranks, b in update.outputs:
                    target[:, columns].addmm_(hidden[:, ranks], b)


def _edges(ranks: Sequence[int]) -> tuple[int, ...]:
    """The first row of each slot where matrices of these ranks, from slot 1 on, stand one below the other; the end."""
    return (0, *accumulate(ranks, initial=0))


def _groups(slots: Tensor) -> _Groups:
    """Group the tokens of slots [T] by slot, without slot 0."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    runs, start = [], 0
    for slot, count in zip(values.tolist(), counts.tolist(), strict=True):
        runs.append((slot, slice(start, start + count)))
        start += count
    runs = [run for run in runs if run[0]]
    if len({slot for slot, _ in runs}) == len(runs):
        return _Groups(slots, tuple(runs))
    spans, order = [], []
    for slot, same in groupby(sorted(runs, key=lambda run: run[0]), key=lambda run: run[0]):
        first = len(order)
        order += [row for _, rows in same for row in range(rows.start, rows.stop)]
        spans.append((slot, slice(first, len(order))))
    return _Groups(slots, tuple(spans), torch.tensor(order))


def _route(slots: Tensor) -> None:
    router = get_forward_context().no_compile_layers["granite_switch.router"]
    router.groups = _groups(slots)


def _add(y: Tensor, x: Tensor, slots: Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name].add(y, x)


def _nothing(*_: object) -> None:
    """An operator that returns nothing needs no more to be traced."""


def make_router(spec: SwitchSpec, vllm_config: VllmConfig) -> Router:
    """The router for the platform that vLLM runs on."""
    return (GroupedRouter if current_platform.is_cpu() else TritonRouter)(spec, vllm_config)


if current_platform.is_cpu():
    direct_register_custom_op("granite_switch_route", _route, mutates_args=["slots"], fake_impl=_nothing)
    direct_register_custom_op("granite_switch_add", _add, mutates_args=["y"], fake_impl=_nothing)
