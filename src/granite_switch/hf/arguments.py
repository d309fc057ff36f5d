"""A forward's arguments: read as the base names them, refused where nobody takes them, shown to tools as the base's."""

import inspect
from typing import Any

from granite_switch.hf.releases import CACHE_NAMES


class Arguments:
    """Reads a forward's arguments as the base names them."""

    _parameters_of_base: tuple[str, ...]
    _cache_name: str
    _accepted: frozenset[str]

    def accepted_arguments(self) -> frozenset[str]:
        """Names of the arguments that some part of the model takes."""
        return self._accepted

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, the cache under the name that this release has for it.

        Raises:
            TypeError: an argument is given twice, or no part of the model takes it.
        """
        if len(args) > len(self._parameters_of_base):
            raise TypeError(f"{type(self).__name__}.forward: {len(args)} positional arguments")
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
        known = self.accepted_arguments()
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward: no part of the model takes {', '.join(map(repr, unknown))}"
            )
        return kwargs


def with_signature(forward: Any, base: Any) -> Any:
    """A forward that tools see with the parameters of the base's, and `base_only`."""

    def switched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    signature = inspect.signature(base)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter("base_only", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    switched.__signature__ = signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # type: ignore[attr-defined]
    switched.__name__, switched.__qualname__ = "forward", "forward"
    switched.__annotations__ = {**getattr(base, "__annotations__", {}), "base_only": bool}
    switched.__doc__ = """As the base's.

    Args:
        base_only: with `inputs_embeds`, from which no control token can be read: all tokens are the base's.

    Raises:
        RoutingError: `inputs_embeds` without token ids and without `base_only`.
        TypeError: an argument that no part of the model takes.
    """
    return switched
