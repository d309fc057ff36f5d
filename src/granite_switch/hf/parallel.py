"""Tensor parallel: how the adapters are split beside projections that transformers' own plan splits.

Column-wise (q, k, v, gate, up) a process holds some rows of W, and so the same rows of B; every process has the whole
A. Row-wise (o, down) it holds some columns of W and sees that part of the input, so it holds those columns of A and
the products with A are summed over the processes: rank values for each token, before B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

# rules of a tensor-parallel plan, for the modules of adapters
PLAN = {
    "layers.*.self_attn.qkv_lora": "switch_colwise",
    "layers.*.self_attn.o_lora": "switch_rowwise",
    "layers.*.mlp.gate_up_lora": "switch_colwise",
    "layers.*.mlp.down_lora": "switch_rowwise",
}


class _Split(TensorParallelLayer):
    """Splits one of A and B, and lets the module work on its own part.

    Args:
        matrix: "A" or "B".
        dim: the dimension to split.
        exchange: what happens to the products with A, given a process group.
    """

    def __init__(self, matrix: str, dim: int, exchange: Callable[[Tensor, Any], Tensor]) -> None:
        self.matrix, self.dim, self.exchange = matrix, dim, exchange

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        if param.endswith(f"-{self.matrix}"):
            whole = module._parameters[param]
            part = distribute_tensor(whole, mesh, [Shard(self.dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        module.exchange = partial(self.exchange, group=mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))
        return super().install_forward(module, mesh)


class _Sum(torch.autograd.Function):
    """The sum over the processes; each has the gradient of it already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumGradient(torch.autograd.Function):
    """The same on every process; each has a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None


def _sum(x: Tensor, group: Any) -> Tensor:
    return _Sum.apply(x, group)


def _sum_gradient(x: Tensor, group: Any) -> Tensor:
    return _SumGradient.apply(x, group) if torch.is_grad_enabled() else x


ALL_PARALLEL_STYLES.register("switch_colwise", _Split("B", 0, _sum_gradient))
ALL_PARALLEL_STYLES.register("switch_rowwise", _Split("A", 1, _sum))
