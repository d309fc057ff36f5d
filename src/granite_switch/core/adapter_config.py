"""Read PEFT's adapter_config.json, and refuse by name the features that cannot be composed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import regex

from granite_switch.core.border import Count, Number, Pattern, Record, TokenId, checked, read_json, shown
from granite_switch.core.files import inside
from granite_switch.errors import AdapterError, CheckpointError

_SECONDS = 0.25  # to match one pattern with one module's path; microseconds are usual

# keys of adapter_config.json that change more than a pair of matrices, and why they cannot be composed
_OFF: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base's weights; docs/train.md shows how to take a LoRA from the merged model",
    "use_qalora": "QALoRA pools the adapter's input",
    "lora_bias": "biases are not part of the update; train with lora_bias=False",
    "modules_to_save": "whole modules replace the base's; train LoRA on linears only",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "target_parameters": "LoRA on bare parameters (stacked experts); target attention and shared linears instead",
    "trainable_token_indices": "retrained embeddings replace the base's; use text that the tokenizer already has",
    "layer_replication": "the base's layers are repeated",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router over several adapters",
    "kasa_config": "the base's weights are truncated",
    "monteclora_config": "sampled matrices",
}
# keys that record the adapter's origin and training, without effect when it runs
_NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_INIT = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base's weights unchanged


class AdapterConfig(Record, extra="allow"):
    """adapter_config.json of a LoRA or aLoRA adapter (PEFT's `LoraConfig`), with features that can be composed."""

    r: Count = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    rank_pattern: dict[Pattern, Count] | None = None
    alpha_pattern: dict[Pattern, Number] | None = None
    target_modules: str | list[str] | None = None
    alora_invocation_tokens: list[TokenId] | None = None
    invocation_string: str | None = None  # written by older aLoRA trainers
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True
    bias: str = "none"

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, given its path (`model.layers.0.self_attn.q_proj`)."""
        return _matched(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """Return alpha of a module, given its path."""
        return _matched(self.alpha_pattern, module, self.lora_alpha)


V = TypeVar("V")


def _matched(patterns: Mapping[str, V] | None, path: str, default: V) -> V:
    """Return the value of the first pattern that matches the end of the path (PEFT `get_pattern_key`)."""
    return next((value for key, value in (patterns or {}).items() if matches(key, path)), default)


def matches(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches a module's path."""
    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=_SECONDS))
    except TimeoutError:
        raise AdapterError(
            f"adapter_config.json: the pattern {shown(pattern)} takes too long to match {path}",
            hint="write it without nested *",
        ) from None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: lists every key that is wrong or asks for an unsupported feature. Unknown keys must be off (null,
            false or empty), because a newer PEFT may compute differently with them.
    """
    path = folder / "adapter_config.json"
    hint = "a PEFT adapter folder contains adapter_config.json"
    try:
        data = read_json(inside(folder, path.name))
    except CheckpointError as error:
        raise AdapterError(error.message, hint=hint) from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: is not a JSON object", hint=hint)
    if data.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type {shown(data.get('peft_type'))} cannot be composed",
            hint="LoRA and activated LoRA can be; `peft.save_as_lora` converts many others to LoRA (docs/train.md)",
        )
    config = checked(AdapterConfig, data, path, AdapterError, "train or save it again, or correct the file")
    _refuse_features(path, config)
    return config


def _refuse_features(path: Path, config: AdapterConfig) -> None:
    extra = {key: value for key, value in (config.model_extra or {}).items() if key not in (*_NEUTRAL, "peft_type")}
    asked = {key: value for key, value in extra.items() if value not in (None, False, {}, [])}
    problems = [f"{key}: {_OFF[key]}" for key in asked if key in _OFF]
    problems += [f"{key}={shown(asked[key])}: is unknown to this release" for key in asked if key not in _OFF]
    if config.bias != "none":
        problems.append(f"bias={shown(config.bias)}: the base's biases are retrained; train with bias='none'")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _INIT:
        problems.append(
            f"init_lora_weights={shown(init)}: it changes the base's weights; PEFT's save_pretrained converts it with "
            "path_initial_model_for_weight_conversion"
        )
    if problems:
        raise AdapterError(
            f"{path.parent}: uses PEFT features that cannot be composed",
            problems=problems,
            hint="train it again without them, or convert it to plain LoRA with PEFT; a key that has no effect when "
            "the adapter runs can be removed from adapter_config.json",
        )
