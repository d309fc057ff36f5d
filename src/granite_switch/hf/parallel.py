"""Tensor parallelism: shard the adapters of linears that the base's own plan shards.

Column-wise (q, k, v, gate, up), a process holds some rows of W and the same rows of B; A is replicated. Row-wise (o,
down), it holds some columns of W and the matching part of the input, so it holds those columns of A, and an all-reduce
sums A x before B: `rank` values per token.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from granite_switch.core.layout import SUFFIX
from granite_switch.errors import RoutingError
from granite_switch.hf.updates import Site

# the linear's style -> its adapters' style; None: A and B are replicated, since the linear's input and output are whole
_STYLES = {
    "colwise": "switch_colwise",
    "rowwise": "switch_rowwise",
    "replicate": None,
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")),
}


def add_plans(model: Any, sites: Iterable[Site], prefix: str = "") -> None:
    """Add the adapters to a model's tensor-parallel plan.

    Args:
        model: has the base's plan.
        sites: its linears with adapters.
        prefix: prefix of the plan's names that the sites' paths lack.
    """
    plan = model._tp_plan or {}
    for site in sites:
        linear = re.sub(r"\d+", "*", prefix + site.path)
        style = plan.get(linear)
        if style is not None and (own := _STYLES.get(style, "switch_refused")):
            plan[linear + SUFFIX] = own


class _Split(TensorParallelLayer):
    """Shards A or B, and lets the module compute with its local shard.

    Args:
        matrix: "A" or "B".
        dim: the dimension to shard.
        reduce: applied to A x, with the process group as `group`.
    """

    def __init__(self, matrix: str, dim: int, reduce: Callable[..., Tensor]) -> None:
        self.matrix, self.dim, self.reduce = matrix, dim, reduce

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        if param.endswith(f"-{self.matrix}"):
            whole: Any = module._parameters[param]
            part = distribute_tensor(whole, mesh, [Shard(self.dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        module.reduce = partial(self.reduce, group=mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))
        return super().install_forward(module, mesh)


class _Sum(torch.autograd.Function):
    """All-reduce forward, identity backward: every process already has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumGradient(torch.autograd.Function):
    """Identity forward, all-reduce backward: every process has part of the gradient."""

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


class _Refused(TensorParallelLayer):
    """The style for adapters of a linear whose own style is not supported."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        raise RoutingError(
            f"the base's tensor-parallel plan shards a linear with adapters ({param}) in an unsupported style",
            hint=f"tp_plan: the supported styles are {', '.join(_STYLES)}",
        )


_styles: Any = ALL_PARALLEL_STYLES
_styles.register("switch_refused", _Refused())
_styles.register("switch_colwise", _Split("B", 0, _sum_gradient))
_styles.register("switch_rowwise", _Split("A", 1, _sum))
