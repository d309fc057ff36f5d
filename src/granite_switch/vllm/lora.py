"""The adapters' low-rank updates by vLLM's own LoRA layers, with the slots worked out in the forward pass.

vLLM's layer classes slice A and B for tensor parallelism. On GPUs they wrap the linears and call `add_lora_linear` of
an object they are given; ours feeds vLLM's Triton kernels with metadata of fixed shape, which CUDA graphs can hold. On
CPU, where each call counts, the linear stays and adds to what its product gives: a product for each adapter that the
batch uses, or one batched over several, on unpadded weights. Either way a quantised base keeps its products, and what
is added comes before the all-reduce. `core.lora` is the definition.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import LoRAConfig, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import from_layer, replace_submodule
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from granite_switch.batched import Grouper, Groups, Matrices, Product, Ranks, Stack, products, shelve
from granite_switch.core.layout import GRANITE, AdapterTensor
from granite_switch.core.spec import SwitchSpec

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
        router.attach(model, name, linear, ranks)


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

    def attach(self, model: nn.Module, name: str, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]]) -> None:
        """Let the model's linear of that name add what its LoRA layer holds; ranks: of each adapter, in each slice."""
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

    def attach(self, model: nn.Module, name: str, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]]) -> None:
        replace_submodule(model, name, linear)
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


class GroupedRouter(Router):
    """A product for each adapter that the batch uses, or one batched over several, on unpadded weights.

    Compiled graphs call it as two operators. Both name `slots`, the first as changed, which keeps them in order.
    """

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__(spec, vllm_config)
        self.slots = torch.zeros(self.tokens, dtype=torch.int32)
        self.groups, self.grouped = Groups(), Grouper()
        self.context = vllm_config.compilation_config.static_forward_context
        self.context["granite_switch.router"] = self

    def route(self, slots: Tensor) -> None:
        if torch.compiler.is_compiling():
            current = self.slots[: slots.size(0)]
            current.copy_(slots)
            torch.ops.vllm.granite_switch_route(current)
        else:
            self.groups = self.grouped(slots)

    def attach(self, model: nn.Module, name: str, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]]) -> None:
        base = model.get_submodule(name)
        name = f"granite_switch.{name}"
        self.context[name] = base.quant_method = _GroupedLinear(self, base.quant_method, linear, ranks, name)


class _GroupedLinear:
    """The method by which a linear computes, and its adapters, taken out of the padded stacks of a LoRA layer."""

    def __init__(
        self, router: GroupedRouter, method: Any, linear: BaseLayerWithLoRA, ranks: Sequence[Sequence[int]], name: str
    ) -> None:
        self.router, self.method, self.name = router, method, name
        padded = list(zip(linear.lora_a_stacked, linear.lora_b_stacked, strict=True))
        starts = accumulate((b.shape[2] for _, b in padded), initial=0)
        self.columns = [slice(start, start + b.shape[2]) for (_, b), start in zip(padded, starts, strict=False)]
        pairs = {
            slot: tuple((part, rank) for part, rank in enumerate(of_slot) if rank)
            for slot, of_slot in enumerate(ranks, 1)
            if any(of_slot)
        }
        self.shelves = shelve(pairs)
        self.stacks = [_stack(padded, slots, pairs[slots[0]]) for slots in self.shelves]
        self.matrices = {
            slot: Matrices(
                stack.a[index], tuple((part, b[index]) for part, _, b in stack.b), tuple(1.0 for _ in stack.b)
            )
            for stack, slots in zip(self.stacks, self.shelves, strict=True)
            for index, slot in enumerate(slots)
        }
        self.ready: tuple[Groups | None, list[Product]] = None, []  # of the latest batch

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] to y [T, out], as `LinearMethodBase.apply`, with the updates."""
        y = self.method.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            torch.ops.vllm.granite_switch_add(y, x, self.router.slots[: x.size(0)], self.name)
        else:
            self.add(y, x)
        return y

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, out] += B (A x [T, in]), in place."""
        groups = self.router.groups
        if self.ready[0] is not groups:
            self.ready = groups, products(groups, self.shelves, self.stacks, self.matrices, len(x))
        if self.ready[1]:
            outputs = [y[:, columns] for columns in self.columns] if len(self.columns) > 1 else [y]
            for product in self.ready[1]:
                product.add(x, outputs)


def _stack(padded: Sequence[tuple[Tensor, Tensor]], slots: Sequence[int], ranks: Ranks) -> Stack:
    """The matrices of these slots, all of these ranks, out of a LoRA layer's."""
    a = [torch.cat([padded[part][0][slot - 1, 0, :rank] for part, rank in ranks]) for slot in slots]
    b, start = [], 0
    for part, rank in ranks:
        matrices = [padded[part][1][slot - 1, 0, :, :rank].t() for slot in slots]
        b.append((part, slice(start, start := start + rank), torch.stack(matrices)))
    return Stack(torch.stack(a), tuple(b))


def _route(slots: Tensor) -> None:
    router = get_forward_context().no_compile_layers["granite_switch.router"]
    router.groups = router.grouped(slots)


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
