"""The transformers backend: importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from granite_switch.config import GraniteSwitchConfig
from granite_switch.hf.conversation import Conversation
from granite_switch.hf.modeling_granite_switch import (
    GraniteSwitchForCausalLM,
    GraniteSwitchModel,
    GraniteSwitchPreTrainedModel,
)

__all__ = [
    "Conversation",
    "GraniteSwitchConfig",
    "GraniteSwitchForCausalLM",
    "GraniteSwitchModel",
    "GraniteSwitchPreTrainedModel",
]

AutoConfig.register(GraniteSwitchConfig.model_type, GraniteSwitchConfig, exist_ok=True)
AutoModel.register(GraniteSwitchConfig, GraniteSwitchModel, exist_ok=True)
AutoModelForCausalLM.register(GraniteSwitchConfig, GraniteSwitchForCausalLM, exist_ok=True)
