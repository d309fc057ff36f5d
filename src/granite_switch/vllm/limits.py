"""What the switch does not run with: refused when vLLM puts its configuration together, before anything is loaded."""

from typing import TYPE_CHECKING

from granite_switch.core.legacy import UPGRADE
from granite_switch.errors import ServingError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Limits:
    """vLLM's hook for a model's configuration (`vllm.model_executor.models.config.MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: object) -> None:
        """Nothing here depends on the model alone."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what would give wrong answers.

        Raises:
            ServingError: with all that is wrong at once.
        """
        import torch
        from vllm.platforms import current_platform

        from granite_switch.vllm.switch import POSITIONS, SLOTS

        problems = []
        if vllm_config.lora_config is not None:
            problems.append("--enable-lora: the adapters are in the checkpoint; add another with granite-switch add")
        if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
            problems.append("--enable-prompt-embeds: control tokens are read from token ids")
        if vllm_config.cache_config.cache_dtype.startswith("fp8") and not current_platform.is_cpu():
            problems.append("--kv-cache-dtype fp8: slots are exact only where queries stay unquantised; leave it out")
        if vllm_config.model_config.max_model_len > POSITIONS:
            problems.append(f"--max-model-len: at most {POSITIONS:,} positions")
        spec = vllm_config.model_config.hf_config.switch_spec
        if spec.hiding:
            problems.append(f"the checkpoint is of generation 1, which hides tokens from attention; first: {UPGRADE}")
        if len(spec.adapters) >= SLOTS:
            problems.append(f"more than {SLOTS - 1:,} adapters")
        if vllm_config.model_config.dtype == torch.float32 and not current_platform.is_cpu():
            problems.append("--dtype float32: vLLM's LoRA kernels take float16 and bfloat16")
        if problems:
            raise ServingError("a switch model cannot be served like this", problems=problems)
