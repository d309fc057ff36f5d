"""The adapters' low-rank updates inside vLLM's linears.

A linear keeps its class. Its `quant_method` is replaced by one that adds the updates to the original method's output,
before any all-reduce, so a quantised base stays quantised. vLLM's LoRA layer classes shard A and B for tensor
parallelism. On GPUs vLLM's Triton kernels compute the updates, with metadata of fixed shape for CUDA graphs; on CPU
`granite_switch.eager` does. `core.lora` is the definition.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from granite_switch import eager
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import ServingError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM's kernels support


class Router(nn.Module):
    """The routing of the current forward pass, shared by all linears.

    Args:
        spec: the adapters.
        vllm_config: vLLM's.
    """

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.vllm_config = vllm_config
        self.adapters = len(spec.adapters)

    def route(self, slots: Tensor) -> None:
        """Prepare the linears' metadata from the slots, [T] int32, once per forward pass."""
        raise NotImplementedError

    def attach(self, linear: LinearBase, name: str, members: Sequence[str], rank: int) -> "SwitchedLinear":
        """Make one of vLLM's linears add its adapters' updates.

        Args:
            linear: vLLM's linear.
            name: its path in the model.
            members: names of the base's linears that it packs, without their parents.
            rank: the largest rank among its adapters.

        Raises:
            ServingError: vLLM has no LoRA layer for it.
        """
        raise NotImplementedError


class SwitchedLinear(LinearMethodBase):
    """A linear's `quant_method`: the original one plus the adapters' updates."""

    def __init__(self, linear: LinearBase, name: str) -> None:
        self.method, self.name = linear.quant_method, name
        linear.quant_method = self

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `LinearMethodBase.apply`: x [..., in] to y [..., out]."""
        y = self.method.apply(layer, x, bias)
        self.add(y.view(-1, y.size(-1)), x.view(-1, x.size(-1)))
        return y

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.method.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def set(self, slot: int, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
        """Replace the adapter in a slot.

        Args:
            slot: from 1.
            a: [r, in] for each of the linear's members; None for those that the adapter does not update.
            b: [out, r], scaled; likewise.
        """
        raise NotImplementedError

    def add(self, y: Tensor, x: Tensor) -> None:
        """y [T, out] += B (A x [T, in]), in place."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["method"], name)


def lora_layer(
    linear: LinearBase, name: str, members: Sequence[str], adapters: int, rank: int, vllm_config: VllmConfig
) -> BaseLayerWithLoRA:
    """vLLM's LoRA layer for a linear, with `adapters` zero adapters."""
    repacked = getattr(linear, "weight", linear) is None  # as after repacking for oneDNN's int8 kernels
    if repacked:
        linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # LoRA layers read the device from it
    settings: Any = _settings(rank, vllm_config)
    layer = from_layer(linear, adapters, settings, list(members), vllm_config.model_config.hf_config)
    if repacked:
        linear.weight = None
    if layer is linear:
        raise ServingError(f"{name}: vLLM has no LoRA layer for {type(linear).__name__}")
    return layer


def _settings(rank: int, vllm_config: VllmConfig) -> SimpleNamespace:
    """The part of a `LoRAConfig` that LoRA layers read."""
    return SimpleNamespace(max_lora_rank=rank, fully_sharded_loras=False, lora_dtype=vllm_config.model_config.dtype)


def fill(layer: BaseLayerWithLoRA, index: int, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    """Set one adapter of a LoRA layer, which shards A and B for this process."""
    if len(a) > 1:
        layer.set_lora(index, list(a), list(b))
    elif a[0] is not None:
        layer.set_lora(index, a[0], b[0])


class TritonRouter(Router):
    """vLLM's kernels, with the metadata of `LoRAKernelMeta.prepare_tensors` in shapes that depend only on T.

    `prepare_tensors` leaves unused adapters out of the lists. Here they stay with a count of 0, at which the kernels
    return immediately, so routing needs no device synchronisation and CUDA graphs can capture it. The tables are
    buffers because vLLM's sleep mode restores those.
    """

    mapping: Tensor
    order: Tensor
    ids: Tensor
    counts: Tensor
    starts: Tensor

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__(spec, vllm_config)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tables = {
            "mapping": torch.empty(tokens, dtype=torch.int32),  # adapter index of each token, -1 for none
            "order": torch.empty(tokens, dtype=torch.int32),  # tokens sorted by adapter
            "ids": torch.arange(-1, self.adapters, dtype=torch.int32),
            "counts": torch.empty(self.adapters + 1, dtype=torch.int32),
            "starts": torch.zeros(self.adapters + 2, dtype=torch.int32),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.no_lora = torch.tensor([False], device="cpu")  # the kernels' flag for a batch without adapters
        self.groups = torch.tensor([self.adapters + 1], dtype=torch.int32, device="cpu")

    def route(self, slots: Tensor) -> None:
        count, mapping = slots.size(0), slots - 1
        counts = (mapping[:, None] == self.ids).sum(0, dtype=torch.int32)
        self.mapping[:count].copy_(mapping)
        self.order[:count].copy_(mapping.argsort(stable=True))
        self.counts.copy_(counts)
        self.starts[1:].copy_(counts.cumsum(0))

    def attach(self, linear: LinearBase, name: str, members: Sequence[str], rank: int) -> SwitchedLinear:
        return TritonLinear(self, linear, name, members, rank)


class TritonLinear(SwitchedLinear):
    """Computes the updates with vLLM's kernels, from the padded stacks of a LoRA layer.

    The stacks are registered as buffers of the router, because sleep level 2 saves only buffers.
    """

    def __init__(self, router: TritonRouter, linear: LinearBase, name: str, members: Sequence[str], rank: int) -> None:
        padded = next(size for size in RANKS if size >= rank)
        self.router = router
        self.layer: Any = lora_layer(linear, name, members, router.adapters, padded, router.vllm_config)
        for matrix in "ab":
            for index, stack in enumerate(getattr(self.layer, f"lora_{matrix}_stacked")):
                router.register_buffer(f"{name}.{matrix}{index}".replace(".", "_"), stack, persistent=False)
        self.drop_cached_strides()
        super().__init__(linear, name)

    def drop_cached_strides(self) -> None:
        """Remove the strides that vLLM caches by address, left by a freed model whose stacks had these addresses."""
        from vllm.lora.ops.triton_ops.utils import _LORA_A_PTR_DICT, _LORA_B_PTR_DICT

        for cache, stacks in (
            (_LORA_A_PTR_DICT, self.layer.lora_a_stacked),
            (_LORA_B_PTR_DICT, self.layer.lora_b_stacked),
        ):
            cache.pop(tuple(stack.data_ptr() for stack in stacks), None)

    def set(self, slot: int, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
        fill(self.layer, slot - 1, a, b)

    def add(self, y: Tensor, x: Tensor) -> None:
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        router, count = self.router, x.size(0)
        a, b = self.layer.lora_a_stacked, self.layer.lora_b_stacked
        metadata = (router.mapping[:count], router.order[:count], router.counts, router.starts, router.ids)
        hidden = torch.empty(len(a), count, b[0].size(-1), dtype=torch.float32, device=x.device)
        lora_shrink(x, a, hidden, *metadata, router.no_lora, router.groups, 1.0)
        lora_expand(hidden, b, y, *metadata, router.no_lora, router.groups, offset_start=0, add_inputs=True)


class EagerRouter(Router):
    """Groups tokens by slot on the host. Compiled graphs call a custom op, which looks the linear up by name."""

    def __init__(self, spec: SwitchSpec, vllm_config: VllmConfig) -> None:
        super().__init__(spec, vllm_config)
        self.groups = eager.Groups()
        self.last: list[int] = []
        self.context = vllm_config.compilation_config.static_forward_context

    def route(self, slots: Tensor) -> None:
        if len(slots) > eager.FEW:
            self.last, self.groups = [], eager.group(slots)
            return
        values = slots.tolist()
        if values != self.last:  # else reuse the previous decode step's groups, with their cached blocks
            self.last, self.groups = values, eager.grouped(values, slots.device)

    def attach(self, linear: LinearBase, name: str, members: Sequence[str], rank: int) -> SwitchedLinear:
        return EagerLinear(self, linear, name, members)


class EagerLinear(SwitchedLinear):
    """Computes the updates with `eager.add`."""

    def __init__(self, router: EagerRouter, linear: LinearBase, name: str, members: Sequence[str]) -> None:
        self.router = router
        self.layer: Any = lora_layer(linear, name, members, 1, 1, router.vllm_config)  # shards one adapter at a time
        self.pairs: dict[int, eager.Pair] = {}
        super().__init__(linear, f"granite_switch.{name}")
        router.context[self.name] = self

    def set(self, slot: int, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
        rank = max((len(matrix) for matrix in a if matrix is not None), default=0)
        if not rank:
            return
        self.router.last = []  # the cached blocks are of the weights before
        layer = self.layer
        layer.create_lora_weights(1, _settings(rank, self.router.vllm_config))
        fill(layer, 0, a, b)
        parts = [(x[0, 0], y[0, 0]) for x, y in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)]
        layer.lora_a_stacked = layer.lora_b_stacked = ()
        if all(torch.equal(x, parts[0][0]) for x, _ in parts):
            self.pairs[slot] = eager.Pair(parts[0][0], torch.cat([y for _, y in parts]), 1.0)
            return
        used = [len(x) if y.any() else 0 for x, y in parts]  # a slice whose B is zero adds nothing
        self.pairs[slot] = eager.Pair(
            torch.cat([x[:n] for (x, _), n in zip(parts, used, strict=True)]),
            torch.block_diag(*(y[:, :n] for (_, y), n in zip(parts, used, strict=True))),
            1.0,
        )

    def add(self, y: Tensor, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.vllm.granite_switch_add(y, x, self.name)
        else:
            added = eager.add(x, y, self.router.groups, self.pairs.get, id(self))
            if added is not y:  # gradients are recorded; not in vLLM itself, which runs in inference mode
                y.data.copy_(added)


def _add(y: Tensor, x: Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name].add(y, x)


def _nothing(*_: object) -> None:
    """Fake implementation: the op mutates y in place, so there is no output to describe."""


def make_router(spec: SwitchSpec, vllm_config: VllmConfig) -> Router:
    """The router for the platform that vLLM runs on."""
    return (EagerRouter if current_platform.is_cpu() else TritonRouter)(spec, vllm_config)


if current_platform.is_cpu():
    direct_register_custom_op("granite_switch_add", _add, mutates_args=["y"], fake_impl=_nothing)
