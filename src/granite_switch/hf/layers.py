"""Mixins for the base's own modules: decoder layers, and containers of linears with adapters.

The class of a module is replaced by a subclass of the same name, which copies and pickles keep.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.compiler import is_compiling

from granite_switch.core.layout import SUFFIX
from granite_switch.errors import RoutingError
from granite_switch.hf.routing import Routing, Scope

if TYPE_CHECKING:
    from granite_switch.hf.updates import Site

    _Module = nn.Module
else:
    _Module = object


class Container(_Module):
    """Mixin for `nn.Sequential` and `nn.ModuleList`: their elements do not include the updates."""

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for name, module in self._modules.items() if module and not name.endswith(SUFFIX))

    def __len__(self) -> int:
        return sum(not name.endswith(SUFFIX) for name in self._modules)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, Container)


class Layer(_Module):
    """Mixin for a decoder layer: passes the routing as an argument, so that recomputation gets it again.

    `__call__` adds the argument and `forward` removes it. Gradient checkpointing reruns `forward` with its original
    arguments, long after the model's forward has returned.
    """

    switch_scope: Scope
    switch_paths: set[str]  # paths of this layer's linears that have adapters

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
        if switch_routing is None or is_compiling():
            return output
        if not self.switch_paths <= switch_routing.called:
            raise RoutingError(
                f"{type(self).__name__} ran without calling linears that have adapters, so the adapters did nothing",
                problems=sorted(self.switch_paths - switch_routing.called),
                hint="a fused kernel bypasses them: load the model without it (use_kernels, Liger, Mamba kernels). Or "
                "the base itself reads their weights and ignores LoRA: train without them in target_modules",
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, Layer)


@cache
def mixed_class(mixin: Any, base: Any) -> type[nn.Module]:
    """The subclass of a module's class with a mixin, under the same name: device maps and FSDP match on it."""
    return type(base.__name__, (mixin, base), {"__module__": __name__, "__qualname__": base.__name__})


def mix_in(mixin: Any, module: Any) -> bool:
    """Add a mixin to the class of a module; returns whether it did not have it."""
    if isinstance(module, mixin):
        return False
    base: Any = type(module)
    module.__class__ = mixed_class(mixin, base)
    return True


def _reduced(module: Any, mixin: Any) -> Any:
    classes = type(module).__mro__
    return _new, (mixin, classes[classes.index(mixin) + 1]), module.__getstate__()


def _new(mixin: Any, base: Any) -> nn.Module:
    cls = mixed_class(mixin, base)
    return cls.__new__(cls)


def wrap_layers(model: nn.Module, sites: "Iterable[Site]") -> None:
    """Turn every decoder layer that contains a site into a `Layer`."""
    for site in sites:
        parts = site.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None or at == len(parts) - 1:  # in no layer
            continue
        layer: Any = model.get_submodule(".".join(parts[: at + 1]))
        if mix_in(Layer, layer):
            layer.switch_scope, layer.switch_paths = site.scope, set()
        layer.switch_paths.add(site.path)
