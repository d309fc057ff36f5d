"""vLLM backend: a plugin that vLLM finds by entry point (`vllm.general_plugins`).

It runs in each of vLLM's processes, so it only registers names; the model is imported when one is loaded.
"""

from typing import Any

ARCHITECTURE = "GraniteSwitchForCausalLM"


def register() -> None:
    """Tell vLLM and transformers about `granite_switch` checkpoints. May be called more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from granite_switch.config import GraniteSwitchConfig
    from granite_switch.vllm.limits import Limits

    AutoConfig.register(GraniteSwitchConfig.model_type, GraniteSwitchConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Limits


def __getattr__(name: str) -> Any:
    """`AdapterModels`, the server's middleware, imported where it is asked for."""
    if name == "AdapterModels":
        from granite_switch.vllm.serve import AdapterModels

        return AdapterModels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
