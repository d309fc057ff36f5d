"""A forward's arguments: named as in the base, rejected if nothing takes them, with the base's signature for tools."""

import inspect
from typing import Any

from granite_switch.errors import RoutingError
from granite_switch.hf.releases import CACHE_NAMES

_STATES = ("state", "mems", "past_buckets_states")  # forward arguments of bases that use no transformers cache


class Arguments:
    """Mixin that names and checks the arguments of a model's forward."""

    _parameters_of_base: tuple[str, ...]
    _cache_name: str
    _accepted: frozenset[str]

    def accepted_arguments(self) -> frozenset[str]:
        """Names of the arguments that any part of the model takes."""
        return self._accepted

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, the cache under the name that the base's forward uses.

        Raises:
            TypeError: an argument is given twice, or no part of the model takes it.
            RoutingError: the model or an argument of it has no place for slots.
        """
        if len(args) > (most := len(self._parameters_of_base)):
            raise TypeError(f"{type(self).__name__}.forward: {len(args)} positional arguments, at most {most} expected")
        for name, value in zip(self._parameters_of_base, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__}.forward: {name!r} is given twice")
            kwargs[name] = value
        for alias in CACHE_NAMES:
            if alias in kwargs and alias != self._cache_name:
                value = kwargs.pop(alias)
                if value is not None and kwargs.get(self._cache_name) is not None:
                    raise TypeError(f"{type(self).__name__}.forward: {' and '.join(CACHE_NAMES)} are the same argument")
                if value is not None:
                    kwargs[self._cache_name] = value
        if "_is_replica" in self.__dict__:
            raise RoutingError(
                "replicas of nn.DataParallel would call the linears of the model itself",
                hint="DistributedDataParallel (torchrun), or one device (CUDA_VISIBLE_DEVICES)",
            )
        if states := [name for name in _STATES if kwargs.get(name) is not None]:
            raise RoutingError(
                f"this model continues from `{states[0]}`, which cannot store the adapter of the positions before",
                hint="use_cache=False",
            )
        known = self.accepted_arguments()
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward: no part of the model takes {', '.join(map(repr, unknown))}"
            )
        return kwargs


def with_signature(forward: Any, base: Any) -> Any:
    """`forward`, for inspection with the base's signature plus `base_only`."""

    def switched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    signature = inspect.signature(base)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter("base_only", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    switched.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # type: ignore[attr-defined]
    switched.__name__, switched.__qualname__ = "forward", "forward"
    switched.__annotations__ = {**getattr(base, "__annotations__", {}), "base_only": bool}
    switched.__doc__ = """As the base's forward.

    Args:
        base_only: run `inputs_embeds` without `input_ids` on the base model: embeddings show no control tokens.

    Raises:
        RoutingError: neither `input_ids` nor `inputs_embeds` with `base_only` are given.
        TypeError: no part of the model takes an argument.
    """
    return switched
