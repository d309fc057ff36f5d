"""vLLM backend: a plugin that vLLM finds through the entry point `vllm.general_plugins`.

It runs in every vLLM process, so it registers only names; a model's class is made when a model is loaded.
"""

from typing import Any

_MODULE = f"{__name__}.model"
_DECODERS = ("ForCausalLM", "LMHeadModel")
_EARLIER = "_registered_before"  # suffix under which a model that already had one of our names stays registered


def register() -> None:
    """Register switch models of every decoder with vLLM and transformers. May be called more than once."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from granite_switch.core.spec import architecture
    from granite_switch.vllm.limits import limits

    models = ModelRegistry.models
    others = [name for name, model in models.items() if getattr(model, "module_name", "") != _MODULE]
    names = {architecture(base): base for base in [*others, *unlisted()] if base.endswith(_DECODERS)}
    for name, base in names.items():
        if base in names:
            continue  # already a switch model, of vLLM or another plugin
        if name in others:
            models[name + _EARLIER] = models[name]
            if name in MODELS_CONFIG_MAP:
                MODELS_CONFIG_MAP[name + _EARLIER] = MODELS_CONFIG_MAP[name]
        # vLLM caches facts about a class by file and name, but a base may change with vLLM's version
        ModelRegistry.register_model(name, f"{_MODULE}:{name}@{vllm.__version__}")
        MODELS_CONFIG_MAP[name] = limits(MODELS_CONFIG_MAP.get(base))
    _register_config()


def unlisted() -> list[str]:
    """Decoders of transformers that vLLM does not list, and serves with its Transformers backend."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return [name for name in names if isinstance(name, str) and name not in ModelRegistry.models]


def _register_config() -> None:
    """Let our class read configs of `granite_switch`; a config that is not ours goes to the class registered before."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from granite_switch.config import SwitchConfig
    from granite_switch.core import legacy

    kind = SwitchConfig.model_type
    earlier = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401  (`get` misses what was added)
    if kind in _CONFIG_REGISTRY:
        earlier = _CONFIG_REGISTRY[kind]
        del _CONFIG_REGISTRY[kind]
    if earlier is None or issubclass(earlier, SwitchConfig):
        AutoConfig.register(kind, earlier or SwitchConfig, exist_ok=True)
        return

    other: Any = earlier

    class OursOrEarlier(SwitchConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            if config_dict.get("switch") is not None or legacy.legacy_format(config_dict):
                return SwitchConfig.from_dict(config_dict, **kwargs)
            names = [name + _EARLIER for name in config_dict.get("architectures") or ()]
            return other.from_dict({**config_dict, "architectures": names}, **kwargs)

    AutoConfig.register(kind, OursOrEarlier, exist_ok=True)


def __getattr__(name: str) -> Any:
    """`AdapterModels`, the server's middleware, imported on demand."""
    if name == "AdapterModels":
        from granite_switch.vllm.serve import AdapterModels

        return AdapterModels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
