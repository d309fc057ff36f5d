"""vLLM backend: a plugin that vLLM finds by entry point (`vllm.general_plugins`).

It runs in each of vLLM's processes, so it only registers names; a model's class is made when one is loaded.
"""


def register() -> None:
    """Tell vLLM and transformers about switch models of every decoder. May be called more than once."""
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from granite_switch.config import SwitchConfig
    from granite_switch.core.spec import architecture
    from granite_switch.vllm.limits import limits

    AutoConfig.register(SwitchConfig.model_type, SwitchConfig, exist_ok=True)
    bases = [base for base in ModelRegistry.get_supported_archs() if base.endswith(("ForCausalLM", "LMHeadModel"))]
    for base in bases:
        name = architecture(base)
        # vLLM caches what it learnt of a class by file and name; a base may change with vLLM's version
        ModelRegistry.register_model(name, f"{__name__}.model:{name}@{vllm.__version__}")
        MODELS_CONFIG_MAP[name] = limits(MODELS_CONFIG_MAP.get(base))
