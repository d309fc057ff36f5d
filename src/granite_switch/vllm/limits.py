"""vLLM options that a switch model does not support, refused before anything is loaded."""

from typing import TYPE_CHECKING, Any

from granite_switch.core.legacy import UPGRADE
from granite_switch.errors import ServingError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_CACHES = ("auto", "float16", "bfloat16")
_CACHES_ON_CPU = (*_CACHES, "fp8", "fp8_e4m3", "fp8_e5m2")  # exact on CPU, where queries stay unquantised
# loaders that fill the parameters, or share them between processes, without passing the adapters to the model
_LOADERS = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "modelexpress")
# weight transfer that writes to parameters, sends differences, or replays one load: not whole tensors to the model
_TRANSFERS = ("sparse_nccl", "sharded_rdt", "nccl_m2n", "modelexpress")
_DRAFTS = ("ngram", "suffix")  # draft from the text alone, without a model


def limits(base: Any) -> type:
    """The configuration hook of a switch model's architecture, for vLLM's `MODELS_CONFIG_MAP`.

    Args:
        base: the hook of the base's architecture, which runs first; None if there is none.
    """

    class Limits:
        @staticmethod
        def verify_and_update_model_config(model_config: "ModelConfig") -> None:
            if base is not None:
                base.verify_and_update_model_config(model_config)
            if model_config.runner_type == "draft":
                _refuse(["as a draft model: use its base"])

        @staticmethod
        def verify_and_update_config(vllm_config: "VllmConfig") -> None:
            """Refuse options that would give wrong answers.

            Raises:
                ServingError: lists all such options.
            """
            if base is not None:
                base.verify_and_update_config(vllm_config)
            _refuse(_of_engine(vllm_config))

    return Limits


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ServingError("a switch model cannot be served with these settings", problems=problems)


def _of_engine(vllm_config: "VllmConfig") -> list[str]:
    import torch
    from vllm.platforms import current_platform

    from granite_switch.vllm.lora import RANKS
    from granite_switch.vllm.switch import POSITIONS, SLOTS

    problems, model_config = [], vllm_config.model_config
    cpu, cache = current_platform.is_cpu(), vllm_config.cache_config.cache_dtype
    spec = model_config.hf_config.switch_spec
    if model_config.runner_type != "generate":
        problems.append(f"--runner {model_config.runner_type}: only text generation was tried")
    if getattr(model_config, "enable_prompt_embeds", False):
        problems.append("--enable-prompt-embeds: control tokens are read from token ids")
    if vllm_config.lora_config is not None:
        problems.append("--enable-lora: the adapters are in the checkpoint; add another with granite-switch add")
    allowed = _CACHES_ON_CPU if cpu else _CACHES
    if cache not in allowed:
        problems.append(f"--kv-cache-dtype {cache}: slots are known to be exact only in {', '.join(allowed)}")
    loader = vllm_config.load_config.load_format
    if loader in _LOADERS:
        problems.append(f"--load-format {loader}: does not pass the adapters to the model; use auto")
    transfer = vllm_config.weight_transfer_config
    if transfer is not None and transfer.backend in _TRANSFERS:
        problems.append(
            f"--weight-transfer-config {transfer.backend}: does not pass whole tensors to the model; use nccl or ipc"
        )
    draft = vllm_config.speculative_config
    if draft is not None and draft.method not in _DRAFTS:
        problems.append(
            f"speculative decoding with {draft.method}: {' and '.join(_DRAFTS)} work; draft models were not tried"
        )
    if model_config.max_model_len > POSITIONS:
        problems.append(f"--max-model-len: at most {POSITIONS:,} positions")
    if model_config.use_mla:
        problems.append(
            "multi-head latent attention: its cache has no room for the switch's attention layer, and it does not call "
            "kv_b_proj in decode; use the transformers backend"
        )
    if spec.hiding:
        problems.append(f"legacy format 1 hides tokens from attention; upgrade the checkpoint: {UPGRADE}")
    if len(spec.adapters) >= SLOTS:
        problems.append(f"{len(spec.adapters):,} adapters; at most {SLOTS - 1:,} are supported")
    rank = max((rank for adapter in spec.adapters for rank in adapter.ranks.values()), default=0)
    if not cpu and rank > RANKS[-1]:
        problems.append(f"an adapter has rank {rank}; vLLM's LoRA kernels support at most {RANKS[-1]}")
    if not cpu and model_config.dtype == torch.float32:
        problems.append("--dtype float32: vLLM's LoRA kernels support only float16 and bfloat16")
    return problems
