"""Differences between the releases of transformers that this package takes; nothing else names a release."""

import inspect
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs, _flash_attention_forward
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

# 5.24 renamed the forward argument and the output `past_key_values` to `cache`; the old name ends with 5.40
CACHE_NAMES = ("cache", "past_key_values")

# arguments that every forward takes without naming them
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
    """What the base's forward calls its cache.

    Args:
        parameters: names of the forward's parameters.
    """
    return next((name for name in CACHE_NAMES if name in set(parameters)), CACHE_NAMES[-1])


def record_outputs(model: PreTrainedModel) -> None:
    """Have `output_hidden_states` and the like work after the model's class was exchanged: up to 5.23 they are
    looked up by the class, since then by the model itself."""
    if isinstance(_CAN_RECORD_REGISTRY, dict):
        _CAN_RECORD_REGISTRY[str(type(model))] = model._can_record_outputs


def accepted_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Every argument that the forward of some module of the model, its attention or its loss takes by name."""
    functions = [type(module).forward for module in model.modules()] + [_flash_attention_forward, ForCausalLMLoss]
    names: set[str] = set(_EVERYWHERE)
    for function in dict.fromkeys(functions):
        names.update(parameter_names(function))
    for kind in (TransformersKwargs, FlashAttentionKwargs):
        names.update(kind.__annotations__)
    return frozenset(names - {"self", "args", "kwargs"})


def parameter_names(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters, `self` and the variable ones left out."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(p.name for p in parameters if p.name != "self" and p.kind not in variable)
