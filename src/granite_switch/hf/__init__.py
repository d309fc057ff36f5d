"""The transformers backend. Importing it registers switch models with the Auto classes."""

from typing import Any

from transformers import AutoConfig

from granite_switch import config
from granite_switch.config import SwitchConfig
from granite_switch.hf import models
from granite_switch.hf.conversation import Conversation

__all__ = [
    "Conversation",
    "GraniteSwitchConfig",
    "GraniteSwitchForCausalLM",
    "GraniteSwitchModel",
    "GraniteSwitchPreTrainedModel",
]


AutoConfig.register(SwitchConfig.model_type, SwitchConfig, exist_ok=True)
config.on_config_class(models.register)


_OLD = {
    "load_model": "use transformers' AutoModelForCausalLM.from_pretrained",
    "MultiSwitch": "the model routes by itself",
}


def __getattr__(name: str) -> Any:
    """Switch classes of any base, by name: `GraniteSwitchForCausalLM`, `Qwen3SwitchConfig`."""
    if name in _OLD:
        raise ImportError(f"{name} was removed after granite-switch 0.1.1; {_OLD[name]} (docs/migrate.md)")
    found = getattr(config if name.endswith("Config") else models, name, None) if "Switch" in name else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
