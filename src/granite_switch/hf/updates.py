"""Low-rank updates added to the linears of any decoder.

An `Updates` module is registered next to each linear that adapters target, and a call of the linear calls it. The
linear keeps its class, weights and `forward`, so quantisers, tensor parallelism and offloading handle it as usual. A
and B are direct parameters of `Updates`, because accelerate loads offloaded weights when the module that owns them is
called. Every forward checks which modules are attached: a quantiser replaces linears. `core.lora` is the definition.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import module as every

from granite_switch import eager
from granite_switch.core.layout import SUFFIX, AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError, RoutingError
from granite_switch.hf.layers import Container, mix_in
from granite_switch.hf.routing import Routing, Scope


class Updates(nn.Module):
    """A and B of every adapter for one linear.

    Args:
        spec: the adapters.
        linear: the linear's path in the checkpoint.
        out, width: the linear's output and input sizes.
    """

    def __init__(self, spec: SwitchSpec, linear: str, out: int, width: int) -> None:
        super().__init__()
        self.reduce: Callable[[Tensor], Tensor] | None = None  # applied to A x under tensor parallelism
        self.adapters: dict[int, tuple[str, str, float]] = {}  # slot -> names of A and B, scale
        for slot, adapter in enumerate(spec.adapters, 1):
            if rank := adapter.ranks.get(linear):
                a, b = (AdapterTensor(adapter.name, linear, matrix).parameter for matrix in "AB")
                self.register_parameter(a, nn.Parameter(torch.empty(rank, width)))
                self.register_parameter(b, nn.Parameter(torch.empty(out, rank)))
                self.adapters[slot] = (a, b, adapter.scale_of(linear))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every adapter to a zero update: A as in PEFT's `LoraLayer.reset_lora_parameters`, B zero."""
        for a, b, _ in self.adapters.values():
            nn.init.kaiming_uniform_(getattr(self, a), a=math.sqrt(5))
            nn.init.zeros_(getattr(self, b))

    def forward(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Add each token's update to the linear's output.

        Args:
            x: [..., in], the linear's input.
            y: [..., out], its output; may be modified in place when no gradients are recorded.
            routing: the slots of these tokens.

        Returns:
            [..., out]. Rows in slot 0 equal y bit for bit.

        Raises:
            RoutingError: the input does not have one row per token.
        """
        flat, out = x.flatten(0, -2), y.flatten(0, -2)
        groups = routing.groups
        if len(flat) != routing.slots.numel():
            raise RoutingError(
                f"a linear with adapters got {len(flat)} rows for a batch of {routing.slots.numel()} tokens",
                hint="it does not see every token exactly once (an expert, for example): train without it in "
                "target_modules. If it runs on a static cache's positions, use a DynamicCache",
            )
        if groups is None or is_compiling():
            return self._fixed(flat, out, routing.slots.flatten()).view_as(y)
        if torch.is_grad_enabled():
            out = self._with_unused(out, groups)
        if self.reduce is None:
            keep = routing.decode and "_hf_hook" not in self.__dict__  # offloaded modules cache no blocks
            out = eager.add(flat, out, groups, self.pair, id(self) if keep else None)
        else:
            out = self._reduced(flat, out, groups)
        return out.view_as(y)

    def pair(self, slot: int) -> eager.Pair | None:
        """The current parameters of the adapter in a slot; None if it does not update this linear."""
        names = self.adapters.get(slot)
        if names is None:
            return None
        # nn.Module.__getattr__ is several times slower; FSDP1 without `use_orig_params` makes them plain attributes
        held: dict[str, Any] = self._parameters or self.__dict__
        return eager.Pair(held[names[0]], held[names[1]], names[2])

    def _fixed(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """Add the updates with shapes that do not depend on the routing: every adapter runs on all tokens, masked."""
        for slot, (a, b, scale) in self.adapters.items():
            hidden = torch.where((slots == slot)[:, None], self._low_rank(x, getattr(self, a)) * scale, 0)
            y = y + F.linear(hidden, getattr(self, b)).to(y.dtype)
        return y

    def _reduced(self, x: Tensor, y: Tensor, groups: eager.Groups) -> Tensor:
        """Add the updates under tensor parallelism. All processes reduce for the adapters in the same order."""
        for one in groups.groups:
            if (pair := self.pair(one.slot)) is not None:
                a, b, scale = pair
                rows = one.rows
                if isinstance(rows, slice):
                    rows = torch.arange(rows.start, rows.stop, device=x.device)
                delta = F.linear(self._low_rank(x.index_select(0, rows), a), b) * scale
                y = y.index_add(0, rows, delta.to(y.dtype))
        return y

    def _low_rank(self, x: Tensor, a: Tensor) -> Tensor:
        """A x, in A's dtype: [T, in] to [T, r]."""
        hidden = F.linear(x.to(a.dtype), a)
        return hidden if self.reduce is None else self.reduce(hidden)

    def _with_unused(self, y: Tensor, groups: eager.Groups) -> Tensor:
        """Return y, connected to the trainable adapters that no token uses, so that they get zero gradients.

        Otherwise DDP waits for their gradients, and FSDP2 mixes up the gradients of adapters of equal shape.
        """
        used = {one.slot for one in groups.groups}
        unused = [names[:2] for slot, names in self.adapters.items() if slot not in used]
        trainable = [p for names in unused for name in names if (p := getattr(self, name)).requires_grad]
        return _Unused.apply(y, *trainable) if trainable else y


class _Unused(torch.autograd.Function):
    """Identity on the first argument; zero gradients for the others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class Site:
    """A linear's path, its `Updates`, and the attached module, which adds the updates when it is called."""

    def __init__(self, path: str, parent: nn.Module, name: str, scope: Scope) -> None:
        self.path, self.parent, self.name, self.scope = path, parent, name, scope
        self.attached: nn.Module | None = None
        self.call: _Call | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """A copy; one that does nothing if the linear is copied alone, since its copy may end up in the linear's place.

        PEFT's `modules_to_save`, for example, puts it into a wrapper, to which the adapters are attached.
        """
        new = memo[id(self)] = copy.copy(self)
        if id(self.parent) in memo:
            vars(new).update(copy.deepcopy(vars(self), memo))
        else:
            new.attached = None
        return new

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the linear's output with the updates added, or None if there are none; a forward hook."""
        if module is not self.attached:  # it was replaced, and its replacement copied its hooks or calls it
            return None
        routing = self.scope.get()
        if routing is None:
            raise RoutingError(
                f"{self.path} was called outside the model's forward, so its tokens have no slots",
                hint="call or compile the model, its decoder or its layers, not a part of a layer alone",
            )
        routing.called.add(self.path)
        if args and isinstance(args[0], Tensor) and args[0].shape[:-1].numel() != routing.slots.numel():
            routing = routing.whole()  # latent attention: the linear sees all cached positions
        groups = routing.groups
        if groups is not None and not groups.groups and not torch.is_grad_enabled():
            return None
        if not args or not isinstance(output, Tensor):
            raise RoutingError(f"{self.path}: adapters need a linear that maps one positional tensor to a tensor")
        if output is args[0]:
            output = output.clone()  # an identity in the linear's place
        return self.updates(args[0], output, routing)

    @property
    def updates(self) -> Any:
        """The linear's `Updates`."""
        return self.parent._modules[self.name + SUFFIX]

    def current(self) -> Any:
        """The linear that currently has this path."""
        return self.parent._modules.get(self.name)

    def stale(self) -> bool:
        """Whether `attach` must be called: the linear was replaced, or another model attached it."""
        linear: Any = self.current()
        return linear is not self.attached or linear.__dict__.get("_call_impl") is not self.call

    def attach(self) -> None:
        """Let the linear that currently has this path add the updates."""
        self.refuse_graph()
        linear: Any = self.current()
        if linear is None:
            raise RoutingError(
                f"{self.path} is no longer in the model, so its adapters would do nothing",
                hint="reload the model; a module that fuses several linears into one cannot have adapters",
            )
        for key in [key for key, hook in linear._forward_hooks.items() if isinstance(hook, Site)]:
            del linear._forward_hooks[key]  # a replacement copied it
        if self.attached is not None and self.attached.__dict__.get("_call_impl") is self.call:
            del self.attached._call_impl
        self.attached, self.call = linear, _Call(self, linear)
        linear._call_impl = self.call
        if _has_hooks(linear):
            self.hook(linear)

    def hook(self, linear: Any) -> None:
        """Add the updates by a hook before all others, which see the output with the updates."""
        if linear._forward_hooks.get(_FIRST) is not self:
            self.refuse_graph()
            linear._forward_hooks[_FIRST] = self
            linear._forward_hooks.move_to_end(_FIRST, last=False)

    def refuse_graph(self) -> None:
        """Raise in a compiled graph, which cannot attach anything."""
        if is_compiling():
            raise RoutingError(
                f"{self.path} was replaced or got a hook, and its adapters are not attached to it",
                hint="before compiling, run one forward or call the decoder's attach_adapters()",
            )


class _Call:
    """Stands in for a linear's `_call_impl`, which torch calls when the linear is called.

    It adds the updates after `forward`, which accelerate and tensor parallelism replace. If there are other hooks, a
    hook does so, since they may change the linear's input. Hooks on every linear would double what the switch costs
    base traffic.
    """

    def __init__(self, site: Site, linear: nn.Module) -> None:
        self.site, self.linear = site, linear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        linear = self.linear
        hooked = _has_hooks(linear)
        if hooked:
            self.site.hook(linear)
        output = type(linear)._call_impl(linear, *args, **kwargs)
        added = None if hooked else self.site(linear, args, output)
        return output if added is None else added


_FIRST = -1  # key of a site's hook; torch counts up from 0


def _has_hooks(linear: Any) -> bool:
    return bool(
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or every._global_forward_pre_hooks
        or every._global_forward_hooks
        or every._global_backward_pre_hooks
        or every._global_backward_hooks
    )


def add_updates(model: nn.Module, spec: SwitchSpec, prefix: str, scope: Scope) -> list[Site]:
    """Register an `Updates` next to every linear that an adapter targets; return a site for each.

    Args:
        model: the module that contains the linears.
        spec: the adapters.
        prefix: prefix of the checkpoint's paths that the model's own paths lack.
        scope: passes the routing to the sites.

    Raises:
        CheckpointError: the model lacks targeted linears; lists them.
    """
    modules = dict(model.named_modules())
    sites, missing = [], []
    for linear in dict.fromkeys(path for adapter in spec.active for path in adapter.targets):
        path = _resolve(linear.removeprefix(prefix), modules)
        module = modules.get(path) if path else None
        out, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if path is None or out is None or width is None:
            missing.append(f"{linear}: {type(module).__name__ if module else 'no such module'}")
            continue
        parent, _, name = path.rpartition(".")
        if name.isdecimal():
            mix_in(Container, modules[parent])
        modules[parent].register_module(name + SUFFIX, Updates(spec, linear, out, width))
        sites.append(Site(path, modules[parent], name, scope))
    if missing:
        raise CheckpointError(
            f"adapters target linears that {type(model).__name__} does not have",
            problems=[*missing[:10], *([f"and {len(missing) - 10} more"] if len(missing) > 10 else [])],
            hint="config.json's `switch` was made for another base; compose the model again",
        )
    return sites


def _resolve(path: str, modules: dict[str, nn.Module]) -> str | None:
    """The module path for a checkpoint path: the same, or else the only one that ends alike from `layers.N` on."""
    if path in modules:
        return path
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    tail = "." + ".".join(parts[max(at - 1, 0) :])
    found = [name for name in modules if name.endswith(tail)]
    if len(found) > 1:  # another tower's layers
        found = [name for name in found if set(name.removesuffix(tail).split(".")) <= set(parts)]
    return found[0] if len(found) == 1 else None
