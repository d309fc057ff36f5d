"""Differences between the supported releases of transformers; no other module depends on a release."""

import inspect
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs, _flash_attention_forward
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

# 5.24 renamed the forward argument and the output `past_key_values` (`cache_params` in models with only recurrent
# states) to `cache`; 5.40 drops the old names
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# arguments that a forward may take through **kwargs
_EVERYWHERE = {
    "return_dict",
    "use_cache",
    "cache_position",
    "is_causal",
    "output_router_logits",
    "debug_io",
    "base_only",
}


def cache_name(parameters: Iterable[str]) -> str:
    """The name of the cache among the parameter names of a base's forward."""
    return next((name for name in CACHE_NAMES if name in set(parameters)), "past_key_values")


def record_outputs(model: PreTrainedModel) -> None:
    """Register the outputs that `output_hidden_states` and the like record, after the model's class was replaced."""
    registry: Any = _CAN_RECORD_REGISTRY
    plain = type(registry) is dict  # up to 5.23; later releases derive the key from the model
    registry[str(type(model)) if plain else model] = model._can_record_outputs


def share_conversions(base: type, made: type) -> None:
    """Give a switch model its base's checkpoint conversions, which transformers registers by class name."""
    known = get_checkpoint_conversion_mapping(base.__name__)
    if known is not None:
        register_checkpoint_conversion_mapping(made.__name__, known, overwrite=True)


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments that the forward of any module of the model, its attention or its loss takes."""
    functions = [type(module).forward for module in model.modules()] + [_flash_attention_forward, ForCausalLMLoss]
    names: set[str] = set(_EVERYWHERE)
    for function in dict.fromkeys(functions):
        names.update(parameter_names(function))
    for kind in (TransformersKwargs, FlashAttentionKwargs):
        names.update(kind.__annotations__)
    return frozenset(names - {"self", "args", "kwargs"})


def parameter_names(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters, without `self`, `*args` and `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(p.name for p in parameters if p.name != "self" and p.kind not in variable)
