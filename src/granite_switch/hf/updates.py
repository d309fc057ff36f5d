"""The adapters' updates beside the linears of a decoder, whatever decoder it is.

One module is registered beside each linear that adapters target; a forward hook on the linear calls it. So the linear
stays as the base made it, for quantisers, tensor parallelism and offloading. A and B are direct parameters of the
module that uses them in its own call, because accelerate loads offloaded weights when a module is called. Hooks are
checked at every forward: a quantiser that replaces a linear removes its hook. `core.lora` is the definition.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granite_switch import eager
from granite_switch.core.layout import SUFFIX, AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError, RoutingError
from granite_switch.hf.routing import Routing, Scope


class Updates(nn.Module):
    """All adapters' A and B for one linear.

    Args:
        spec: the adapters.
        linear: the linear's path in the checkpoint.
        out, width: of the linear.
    """

    def __init__(self, spec: SwitchSpec, linear: str, out: int, width: int) -> None:
        super().__init__()
        # set where the linear is split over processes: what is to be done with A x
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.of: dict[int, tuple[str, str, float]] = {}  # slot -> names of A and B, scale
        for slot, adapter in enumerate(spec.adapters, 1):
            if rank := adapter.ranks.get(linear):
                a, b = (AdapterTensor(adapter.name, linear, matrix).parameter for matrix in "AB")
                self.register_parameter(a, nn.Parameter(torch.empty(rank, width)))
                self.register_parameter(b, nn.Parameter(torch.empty(out, rank)))
                self.of[slot] = (a, b, adapter.scale_of(linear))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A new adapter changes nothing: A as PEFT draws it (`LoraLayer.reset_lora_parameters`), B zero."""
        for a, b, _ in self.of.values():
            nn.init.kaiming_uniform_(getattr(self, a), a=math.sqrt(5))
            nn.init.zeros_(getattr(self, b))

    def forward(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Add each token's update to the linear's output.

        Args:
            x: [..., in], the linear's input.
            y: [..., out], its output; changed in place where no gradient is recorded.
            routing: the batch's slots.

        Returns:
            y with the updates. Tokens of slot 0 are what they were, bit for bit.

        Raises:
            RoutingError: the linear is not given the tokens of the batch one by one.
        """
        flat, out = x.flatten(0, -2), y.flatten(0, -2)
        if len(flat) != routing.slots.numel():
            raise RoutingError(
                f"a linear with adapters is given {len(flat)} rows where the batch has {routing.slots.numel()} tokens",
                hint="this linear does not see every token once, as an expert's; adapters cannot target it",
            )
        if routing.groups is None or torch.compiler.is_compiling():
            return self._fixed(flat, out, routing.slots.flatten()).view(y.shape)
        if torch.is_grad_enabled():
            out = self._with_unused(out, routing.groups)
        if routing.groups.groups:
            pairs = self._pairs(routing.groups)
            if self.reduce is None:
                keep = routing.decode and not hasattr(self, "_hf_hook")  # an offloaded module keeps no copies
                out = eager.add(flat, out, routing.groups, pairs, id(self) if keep else None)
            else:
                out = self._reduced(flat, out, routing.groups, pairs)
        return out.view(y.shape)

    def _pairs(self, groups: eager.Groups) -> dict[int, eager.Pair]:
        """The parameters, as they are now, of the adapters in the batch that update this linear."""
        pairs: dict[int, eager.Pair] = {}
        held = self._parameters  # a module's own lookup of attributes costs several times as much
        for one in groups.groups:
            if one.slot in self.of and one.slot not in pairs:
                a, b, scale = self.of[one.slot]
                pairs[one.slot] = eager.Pair(held[a], held[b], scale)  # type: ignore[arg-type]
        return pairs

    def _fixed(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """With shapes that do not depend on the routing: each adapter acts on all tokens, and what is not its is 0."""
        for slot, (a, b, scale) in self.of.items():
            hidden = torch.where((slots == slot)[:, None], self._low_rank(x, getattr(self, a)) * scale, 0)
            y = y + F.linear(hidden, getattr(self, b)).to(y.dtype)
        return y

    def _reduced(self, x: Tensor, y: Tensor, groups: eager.Groups, pairs: dict[int, eager.Pair]) -> Tensor:
        """Where A x is to be summed over processes, for every adapter of the batch in the same order."""
        for one in groups.groups:
            if one.slot in pairs:
                a, b, scale = pairs[one.slot]
                rows = one.rows
                if isinstance(rows, slice):
                    rows = torch.arange(rows.start, rows.stop, device=x.device)
                delta = F.linear(self._low_rank(x.index_select(0, rows), a), b) * scale
                y = y.index_add(0, rows, delta.to(y.dtype))
        return y

    def _low_rank(self, x: Tensor, a: Tensor) -> Tensor:
        """x A^T, in A's dtype."""
        hidden = F.linear(x.to(a.dtype), a)
        return hidden if self.reduce is None else self.reduce(hidden)

    def _with_unused(self, y: Tensor, groups: eager.Groups) -> Tensor:
        """Let trainable adapters that no token of the batch has take part, with gradients of zero.

        Otherwise DDP waits for them, and FSDP2 mixes up the gradients of adapters of equal shapes.
        """
        used = {one.slot for one in groups.groups}
        parameters = [getattr(self, name) for slot, names in self.of.items() if slot not in used for name in names[:2]]
        trainable = [p for p in parameters if p.requires_grad]
        return _Unused.apply(y, *trainable) if trainable else y


class _Unused(torch.autograd.Function):
    """The identity of its first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


class Hook:
    """The forward hook of one linear."""

    def __init__(self, site: "Site", scope: Scope) -> None:
        self.site, self.scope = site, scope

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        routing = self.scope.get()
        if routing is None:
            raise RoutingError(
                f"{self.site.path} was called outside the model's forward, where no slot is known",
                hint="call the model, or its decoder; a layer by itself cannot tell which adapter acts",
            )
        routing.called.add(self.site.path)
        if routing.groups is not None and not routing.groups.groups and not torch.is_grad_enabled():
            return None
        if not args or not isinstance(output, Tensor):
            raise RoutingError(f"{self.site.path} is not called as a linear is, with one tensor; adapters need that")
        return self.site.updates(args[0], output, routing)


class Site:
    """One linear with its updates, and the hook that joins them."""

    def __init__(self, path: str, parent: nn.Module, name: str) -> None:
        self.path, self.parent, self.name = path, parent, name
        self.hooked: nn.Module | None = None
        self.handle: Any = None

    @property
    def updates(self) -> Updates:
        return self.parent._modules[self.name + SUFFIX]  # type: ignore[return-value]

    def attach(self, scope: Scope) -> None:
        """Put the hook on the linear that is there now."""
        linear = self.parent._modules.get(self.name)
        if linear is self.hooked:
            return
        if linear is None:
            raise RoutingError(
                f"{self.path} is gone from the model, and its adapters with it",
                hint="load the model anew; a module that replaces several linears by one cannot carry adapters",
            )
        if self.handle is not None:
            self.handle.remove()
        self.handle = linear.register_forward_hook(Hook(self, scope))
        self.hooked = linear

    def check(self) -> None:
        """For compiled graphs, in which nothing can be attached."""
        if self.parent._modules.get(self.name) is not self.hooked:
            raise RoutingError(
                f"{self.path} was replaced, and its adapters are not attached to what is there now",
                hint="run one forward, or call attach_adapters() of the decoder, before compiling",
            )


def add_updates(model: nn.Module, spec: SwitchSpec, prefix: str) -> list[Site]:
    """Register an `Updates` beside every linear that an adapter targets.

    Args:
        model: holds the linears.
        spec: the adapters.
        prefix: what paths in the checkpoint have before the model's own.

    Raises:
        CheckpointError: with every target that the model has no linear for.
    """
    modules = dict(model.named_modules())
    sites, missing = [], []
    for linear in dict.fromkeys(path for adapter in spec.active for path in adapter.targets):
        path = _resolve(linear.removeprefix(prefix), modules)
        module = modules.get(path) if path else None
        out, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if path is None or out is None or width is None:
            missing.append(f"{linear}: {type(module).__name__ if module else 'no module of this path'}")
            continue
        parent, _, name = path.rpartition(".")
        modules[parent].register_module(name + SUFFIX, Updates(spec, linear, out, width))
        sites.append(Site(path, modules[parent], name))
    if missing:
        raise CheckpointError(
            f"adapters target linears that {type(model).__name__} does not have",
            problems=[*missing[:10], *([f"and {len(missing) - 10} more"] if len(missing) > 10 else [])],
            hint="the checkpoint's `switch` is of another base; compose the model anew",
        )
    return sites


def _resolve(path: str, modules: dict[str, nn.Module]) -> str | None:
    """A path of the checkpoint as the module's: equal, or the only one with the same end from its layers on."""
    if path in modules:
        return path
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    tail = "." + ".".join(parts[max(at - 1, 0) :])
    found = [name for name in modules if name.endswith(tail)]
    return found[0] if len(found) == 1 else None


if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class Layer(_Module):
    """What a decoder layer gains: it takes the routing as an argument, so that recomputation has its own again.

    The argument is added where the layer is called and taken off where its forward runs: gradient checkpointing repeats
    the forward with the arguments of the first run, long after the model's forward has ended.
    """

    switch_scope: Scope
    switch_paths: set[str]  # of the linears with adapters in this layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.switch_scope.get()
        if routing is not None and "switch_routing" not in kwargs:
            kwargs["switch_routing"] = routing
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, switch_routing: Routing | None = None, **kwargs: Any) -> Any:
        token = self.switch_scope.enter(switch_routing)
        try:
            output = super().forward(*args, **kwargs)
        finally:
            self.switch_scope.leave(token)
        if switch_routing is None or torch.compiler.is_compiling():
            return output
        if left_out := self.switch_paths - switch_routing.called:
            raise RoutingError(
                f"{type(self).__name__} ran without calling linears that have adapters, so they did nothing",
                problems=sorted(left_out),
                hint="a fused kernel replaces them; load the model without it (use_kernels, Liger, Mamba's)",
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        classes = type(self).__mro__
        return _new_layer, (classes[classes.index(Layer) + 1],), self.__getstate__()


@cache
def layer_class(base: type[Any]) -> type[nn.Module]:
    """A decoder layer's class with what `Layer` adds. It keeps the base's name, which placing and wrapping go by."""
    return type(base.__name__, (Layer, base), {"__module__": __name__, "__qualname__": base.__name__})


def _new_layer(base: Any) -> nn.Module:
    cls = layer_class(base)
    return cls.__new__(cls)


def wrap_layers(model: nn.Module, sites: list[Site], scope: Scope) -> None:
    """Make a `Layer` of every decoder layer that holds one of the sites."""
    for site in sites:
        parts = site.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            continue
        layer: Any = model.get_submodule(".".join(parts[: at + 1]))
        if not isinstance(layer, Layer):
            layer.__class__ = layer_class(layer.__class__)
            layer.switch_scope, layer.switch_paths = scope, set()
        layer.switch_paths.add(site.path)
