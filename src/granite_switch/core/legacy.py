"""Legacy formats 1 to 3: distinguish them, read them as format 1, and split their tensors.

All three fuse q, k, v and gate, up into one matrix, stack the adapters' A and B padded to the largest rank, and store
B already scaled. Only `split` undoes this; transformers, vLLM, GGUF and `upgrade` use it. docs/legacy-formats.md has
the history and says what each format computes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from granite_switch.core.border import checked, shown
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.files import inside
from granite_switch.core.layout import AdapterTensor, natural, parse_key
from granite_switch.core.records import LegacyConfig, read_config
from granite_switch.core.spec import (
    BASE_TOKEN,
    MODEL_TYPE,
    AdapterSpec,
    Hiding,
    SwitchSpec,
    architecture,
    control_token,
)
from granite_switch.errors import CheckpointError

UPGRADE = "granite-switch upgrade OLD NEW"

# fused module -> the linears in its rows, in order; paths are relative to a layer
_FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    "shared_mlp.output_linear": ("mlp.down_proj",),
}
# entries of `lora_target_modules` -> fused module
_TARGETS: Mapping[str, str] = {
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "shared_input_linear": "shared_mlp.input_linear",
    "shared_output_linear": "shared_mlp.output_linear",
}
_MODULES = "|".join(re.escape(module) for module in _FUSED)
_FUSED_TENSOR = re.compile(
    rf"model\.layers\.(\d+)\.({_MODULES})\.(?:(base_layer\.)?(weight|bias)|lora_([AB])(?:_slices\.(\d+))?)"
)
_PLAIN_TENSOR = re.compile(
    r"lm_head\.weight|model\.norm\.weight|model\.embed_tokens\.weight"
    r"|model\.layers\.\d+\.(?:input|post_attention)_layernorm\.weight"
)
# lookup tables that older releases stored; the config determines them all
_TABLES = re.compile(r"model\.(?:adapter_token_ids|token_to_group_mask|adapter_hiding_matrix|switch\..+)")

# the keys of a legacy config that belong to a Granite config
_GRANITE_KEYS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_parameters", "rope_theta"),
    *("rope_scaling", "attention_bias", "attention_dropout", "embedding_multiplier", "logits_scaling"),
    *("residual_multiplier", "attention_multiplier", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "dtype", "torch_dtype", "quantization_config", "transformers_version"),
)
_SWITCH_KEYS = {
    *("num_adapters", "adapter_names", "adapter_ranks", "adapter_token_ids", "adapter_substitute_token_ids"),
    *("adapter_third_party", "control_dims", "control_token_gain", "hiding_groups", "hiding_policy"),
    *("lora_target_modules", "max_lora_rank", "ms_code_m", "ms_code_type", "ms_counting_head_dim", "ms_memory_gain"),
    *("switch_head_dim", "switch_type", "cross_stream_rank", "dual_stream", "adapter_kinds"),
    *("asr_enabled", "asr_model_id", "asr_device", "asr_dtype", "asr_pipeline_kwargs", "asr_generate_kwargs"),
    *("asr_max_audio_clips", "asr_chunk_length_s", "asr_chunk_overlap_s", "asr_self_chunks"),  # of a separate model
}
_SWITCH_PREFIXES = (
    *("adapter_", "control_", "cross_stream", "dual_", "hiding_", "lora_", "ms_", "switch_", "asr_"),
    *("classifier_", "label_", "audio_", "shadow_", "sr_"),
)
_RELEASES = ("granite_switch_version", "composer_version")  # keys that name the release that wrote a config


class Sliceable(Protocol):
    """A tensor in memory or in a file: of torch, of numpy, a slice of safetensors, or `checkpoint.Tensor`."""

    def __getitem__(self, index: Any, /) -> Any: ...


T = TypeVar("T", bound=Sliceable)
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Old:
    """A checkpoint in a legacy format, read as format 1."""

    format_version: int  # 1 to 3
    config: Mapping[str, Any]  # Granite's keys and `switch`
    spec: SwitchSpec
    checkpoint: Checkpoint  # the files, with legacy tensor names
    tensors: Mapping[str, Tensor]  # with the tensor names of format 1


def legacy_format(config: Mapping[str, Any]) -> int:
    """Return the legacy format of a config.json, 1 to 3; 0 for format 1 and for other models."""
    if config.get("model_type") != MODEL_TYPE or config.get("switch") is not None:
        return 0
    if "ms_code_m" in config or "adapter_kinds" in config or config.get("switch_type") == "multi":
        return 3
    if config.get("adapter_substitute_token_ids") is not None:
        return 2
    if "hiding_groups" in config or "control_dims" in config:
        return 1
    if "num_adapters" in config and not config["num_adapters"]:
        return 2
    return 0


def format_1_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config.json of a legacy format to format 1: Granite's keys and the `switch` object.

    Args:
        config: of legacy format 1, 2 or 3.

    Raises:
        CheckpointError: lists everything that format 1 cannot express.
    """
    _check(config)
    result = {key: config[key] for key in _GRANITE_KEYS if key in config}
    result["num_hidden_layers"] = config["num_hidden_layers"] - _extra_layers(config)
    result["intermediate_size"] = config.get("shared_intermediate_size") or config["intermediate_size"]
    result.setdefault("tie_word_embeddings", True)  # transformers 4 omitted it if true
    head = config.get("projection_head_dim")
    if head and head * config["num_attention_heads"] != config["hidden_size"]:
        result["head_dim"] = head
    spec = _spec(config)
    return {
        **result,
        "model_type": MODEL_TYPE,
        "architectures": [architecture("GraniteForCausalLM")],
        "switch": spec.to_dict(),
    }


def split(tensors: Iterable[tuple[str, T]], config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Split a legacy checkpoint's tensors: yield names of format 1 and slices of the given tensors.

    Lookup tables are omitted. Each result is a single `[...]` of a tensor, so lazy tensors stay lazy.

    Args:
        tensors: (name, tensor) pairs of the checkpoint, in any order.
        config: of format 1 (`format_1_config`).

    Raises:
        CheckpointError: after the last tensor; lists all unknown names.
    """
    spec, rows = SwitchSpec.from_dict(config["switch"]), _rows(config)
    unknown = []
    for name, tensor in tensors:
        if found := _FUSED_TENSOR.fullmatch(name):
            for new, index in _pieces(found, spec, rows):
                yield new, tensor[index]
        elif _PLAIN_TENSOR.fullmatch(name):
            yield name, tensor[()]
        elif not _TABLES.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            "the checkpoint contains tensors that no legacy format has",
            problems=unknown[:20],
            hint="pip install --upgrade granite-switch, if a newer release wrote it",
        )


def is_fused(names: Iterable[str]) -> bool:
    """Whether these are tensor names of a legacy format. Lookup tables do not count."""
    return any((found := _FUSED_TENSOR.fullmatch(name)) and not _is_format_1(found) for name in names)


def read(folder: Path) -> Old:
    """Open a checkpoint in a legacy format, without reading tensors.

    Raises:
        CheckpointError: it is not in a legacy format, or its files contradict its config.
    """
    old = read_config(inside(folder, "config.json"))
    number = legacy_format(old)
    if not number:
        raise CheckpointError(f"{folder}: is not a checkpoint in a legacy format")
    config = format_1_config(old)
    checkpoint = Checkpoint(folder)
    spec = SwitchSpec.from_dict(config["switch"])
    _check_stacks(checkpoint, spec, _rows(config))
    tensors = {name: tensor.named(name) for name, tensor in split(checkpoint.tensors.items(), config)}
    return Old(number, config, spec, checkpoint, tensors)


def describe(folder: Path) -> list[str]:
    """Describe a checkpoint in a legacy format and what upgrading would change, in lines of text."""
    old = read(folder)
    stacks = [t for t in old.checkpoint.tensors.values() if len(t.shape) == 4]
    pairs = [t for name, t in old.tensors.items() if name not in old.checkpoint]
    kept = sum(t.nbytes for t in pairs if parse_key(t.name))
    back = f"adds {BASE_TOKEN}"
    if old.spec.base_token:
        back = f"renames {old.spec.base_token} to {BASE_TOKEN}"
    lines = [
        f"legacy format {old.format_version} ({_TITLES[old.format_version]}): {len(old.spec.adapters)} adapters, "
        f"{old.config['num_hidden_layers']} layers",
        f"loads unchanged in transformers{' and vLLM' if old.format_version > 1 else ''}; to upgrade: {UPGRADE}",
        "upgrading splits q, k, v and gate, up, and writes each adapter to its own file "
        f"({sum(t.nbytes for t in stacks):,} bytes of stacks, {kept:,} without padding)",
        f"upgrading {back} and wraps the chat template",
    ]
    if old.format_version == 1:
        lines.append(
            "upgrading puts a control token in place of its substitute, whereas this format inserts it and hides it: "
            "prompts become one token shorter"
        )
    return lines


_TITLES = {1: "control tokens hidden", 2: "token substitution", 3: "token substitution, any number of switches"}


def _rows(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of rows of each linear that is fused with others, from a Granite config."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    attention = dict(zip(_FUSED["self_attn.qkv_proj"], (heads * head, keys, keys), strict=True))
    return {**attention, **dict.fromkeys(_FUSED["shared_mlp.input_linear"], config["intermediate_size"])}


def _pieces(found: re.Match[str], spec: SwitchSpec, rows: Mapping[str, int]) -> Iterator[tuple[str, Index]]:
    """Yield the names of the tensors within a fused tensor, as in format 1, and the index of each."""
    layer, module, _, kind, matrix, part = found.groups()
    linears = [f"model.layers.{layer}.{path}" for path in _FUSED[module]]
    if kind:
        start = 0
        for linear, path in zip(linears, _FUSED[module], strict=True):
            index: Index = ()
            if len(linears) > 1:
                index = (slice(start, start := start + rows[path]),)
            yield f"{linear}.{kind}", index
        return
    linear = linears[int(part or 0)]
    for i, adapter in enumerate(spec.adapters):
        if rank := adapter.ranks.get(linear):
            key = AdapterTensor(adapter.name, linear, matrix).key
            yield key, (i, 0, slice(0, rank)) if matrix == "A" else (i, 0, slice(None), slice(0, rank))


def _is_format_1(found: re.Match[str]) -> bool:
    """Whether format 1 has the same name: `self_attn.o_proj.weight` is called so in every format."""
    return found[2] == "self_attn.o_proj" and bool(found[4]) and not found[3]


def _spec(config: Mapping[str, Any]) -> SwitchSpec:
    count = config.get("num_adapters") or 0
    names = config.get("adapter_names") or [f"adapter_{i}" for i in range(count)]
    tokens = list(config.get("adapter_token_ids") or ())
    substitutes = list(config.get("adapter_substitute_token_ids") or tokens)
    back = (tokens.pop(0), substitutes.pop(0)) if len(tokens) == count + 1 else (-1, -1)
    modules = config.get("lora_target_modules")
    fused = {_TARGETS[entry] for entry in (_TARGETS if modules is None else modules)}
    layers = config["num_hidden_layers"] - _extra_layers(config)
    targets = tuple(
        f"model.layers.{layer}.{path}"
        for layer in range(layers)
        for module, paths in _FUSED.items()
        if module in fused
        for path in paths
    )
    adapters = tuple(
        AdapterSpec(
            name=name,
            technology="lora",  # not recorded in the config; only the template depends on it
            token=control_token(name),
            token_id=token,
            substitute_token_id=substitute,
            rank=rank,
            alpha=rank,  # B is stored scaled
            targets=tuple(sorted(targets, key=natural)),
        )
        for name, token, substitute, rank in zip(
            names, tokens, substitutes, config.get("adapter_ranks") or (), strict=True
        )
    )
    return SwitchSpec(
        adapters=adapters,
        base_token="<|base_reset|>" if back[0] >= 0 else "",
        base_token_id=back[0],
        base_substitute_token_id=back[1],
        generatable=True,  # older releases did not suppress control tokens
        hiding=_hiding(config, dict(zip(names, tokens, strict=True))) if legacy_format(config) == 1 else None,
    )


def _extra_layers(config: Mapping[str, Any]) -> int:
    """Return how many of the config's layers belong to the old switch."""
    return {1: 1, 2: 1, 3: 2}[legacy_format(config)] if config.get("num_adapters") else 0


def _hiding(config: Mapping[str, Any], tokens: Mapping[str, int]) -> Hiding:
    """Resolve the names in legacy format 1's groups and policies to token ids and group indices."""
    groups, policy = config.get("hiding_groups") or {}, config.get("hiding_policy") or {}
    order = list(groups)
    return Hiding(
        groups=tuple(tuple(tokens[name] for name in groups[group] if name in tokens) for group in order),
        policy=tuple(
            tuple(i for i, group in enumerate(order) if group in policy.get(name, ())) for name in ("base", *tokens)
        ),
    )


def _check(config: Mapping[str, Any]) -> None:
    """Refuse a config that format 1 cannot express, listing every reason."""
    checked(LegacyConfig, config, "config.json")
    count = config.get("num_adapters") or 0
    known = {*_SWITCH_KEYS, *_RELEASES}
    problems = [f"unknown key {key!r}" for key in config if key.startswith(_SWITCH_PREFIXES) and key not in known]
    names = config.get("adapter_names") or range(count)
    for name, kind in zip(names, config.get("adapter_kinds") or (), strict=False):
        if kind != "lora":
            what = "a label head, which outputs classes, not text" if kind == "classifier" else "an unknown kind"
            problems.append(f"adapter_kinds: {name} is {shown(kind)}: {what}; only 'lora' can be read")
    if config.get("switch_type") not in (None, "single", "multi"):
        problems.append(f"switch_type {config['switch_type']!r} is unknown")
    if config.get("dual_stream") or config.get("cross_stream_rank") or config.get("unfused_qkv"):
        problems.append("its adapters are of kind `dual_stream`, which is neither LoRA nor aLoRA")
    if config.get("num_local_experts"):
        problems.append(f"its base has {config['num_local_experts']} experts; only dense Granite is supported")
    if config.get("position_embedding_type") not in (None, "rope"):
        problems.append(f"its base has position_embedding_type {config['position_embedding_type']!r}, not 'rope'")
    if config.get("qk_norm"):
        problems.append("its base normalises queries and keys (`qk_norm`), which Granite does not")
    if len(config.get("hiding_groups") or ()) > 62:
        problems.append("it has more than 62 hiding groups")
    if other := sorted(set(config.get("layer_types") or ()) - {"attention", "full_attention"}):
        problems.append(f"its base has layers of type {', '.join(other)}")
    if config["num_hidden_layers"] <= _extra_layers(config):
        problems.append(f"num_hidden_layers {config['num_hidden_layers']} leaves no layer for the decoder")
    problems += [f"unknown target module {m!r}" for m in config.get("lora_target_modules") or () if m not in _TARGETS]
    for key in ("adapter_kinds", "adapter_names", "adapter_ranks", "adapter_token_ids", "adapter_substitute_token_ids"):
        value = config.get(key)
        allowed = (count, count + 1) if key.endswith("_ids") and legacy_format(config) == 3 else (count,)
        required = bool(count) and key in ("adapter_ranks", "adapter_token_ids")
        if (value is None and required) or (value is not None and len(value) not in allowed):
            problems.append(f"{key} must have {count} entries: {value}")
    ids, substitutes = config.get("adapter_token_ids"), config.get("adapter_substitute_token_ids")
    if ids and substitutes and len(ids) != len(substitutes):
        problems.append(f"adapter_substitute_token_ids has {len(substitutes)} entries, adapter_token_ids {len(ids)}")
    if problems:
        raise CheckpointError(
            f"config.json: cannot be read as a legacy format of this project's checkpoints{_release(config)}",
            problems=problems,
            hint="pip install --upgrade granite-switch, or compose the model again from its adapters",
        )


def _release(config: Mapping[str, Any]) -> str:
    """Return which release wrote a config, in parentheses; empty if it does not say."""
    for key in _RELEASES:
        if value := config.get(key):
            return f" (written by granite-switch {shown(value)})"
    value = config.get("transformers_version")
    return f" (written with transformers {value})" if isinstance(value, str) else ""


def _check_stacks(checkpoint: Checkpoint, spec: SwitchSpec, rows: Mapping[str, int]) -> None:
    """Check that each stack holds every adapter at its rank, and each fused weight the rows of its linears."""
    count, rank = len(spec.adapters), max((a.rank for a in spec.adapters), default=0)
    problems = []
    for name, tensor in checkpoint.tensors.items():
        found = _FUSED_TENSOR.fullmatch(name)
        paths = _FUSED[found[2]] if found and found[4] else ()
        if len(paths) > 1 and tensor.shape[:1] != (sum(rows[path] for path in paths),):
            problems.append(f"{name}: {list(tensor.shape)}; config.json says {sum(rows[path] for path in paths)} rows")
        if found and found[5]:
            have = tensor.shape[-2 if found[5] == "A" else -1] if len(tensor.shape) == 4 else 0
            if len(tensor.shape) != 4 or tensor.shape[0] != count or have < rank:
                problems.append(f"{name}: {list(tensor.shape)}, for {count} adapters of rank up to {rank}")
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: its tensors contradict its config", problems=problems[:20])
