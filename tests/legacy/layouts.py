"""Writes checkpoints in the legacy formats from a base and PEFT adapters, as docs/legacy-formats.md describes them.

Independent of `core.legacy`, which reads them: fused rows, stacks padded to the largest rank, B scaled.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

FUSED = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.o_proj": ["self_attn.o_proj"],
    "shared_mlp.input_linear": ["mlp.gate_proj", "mlp.up_proj"],
    "shared_mlp.output_linear": ["mlp.down_proj"],
}
EXTRA_LAYERS = {1: 1, 2: 1, 3: 2}
RESET = "<|base_reset|>"


def write_old(
    folder: Path,
    version: int,
    base: Path,
    adapters: Path,
    names: Sequence[str],
    *,
    reset: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    hiding: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        version: legacy format 1, 2 or 3.
        adapters: holds a PEFT adapter folder for each name.
        reset: legacy format 3: include the token that returns to the base.
        shards: number of files.
        hiding: legacy format 1: `hiding_groups` and `hiding_policy`; by default every slot hides every control token.
    """
    config = json.loads((base / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    records = [json.loads((adapters / name / "adapter_config.json").read_text()) for name in names]
    weights = [load_file(adapters / name / "adapter_model.safetensors") for name in names]
    ranks = [record["r"] for record in records]
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = [*([RESET] if reset else []), *(f"<|{name}|>" for name in names)]
    first = tokenizer.get_vocab_size()
    ids = list(range(first, first + len(texts)))

    old = dict(_embeddings(tensors, first, len(texts)))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            old[f"{at}.{norm}.weight"] = tensors[f"{at}.{norm}.weight"]
        for module, parts in FUSED.items():
            rows = [tensors[f"{at}.{part}.weight"] for part in parts]
            old[f"{at}.{module}.base_layer.weight"] = torch.cat(rows)
            for index, part in enumerate(parts):
                suffix = f"_slices.{index}" if len(parts) > 1 else ""
                a, b = _stacks(records, weights, f"{at}.{part}", rows[index].shape, max(ranks))
                old[f"{at}.{module}.lora_A{suffix}"], old[f"{at}.{module}.lora_B{suffix}"] = a, b
    tables, keys = _switch(version, ids, names, records, first, reset, hiding)
    old |= tables
    _save(folder, {name: t.to(dtype) if t.is_floating_point() else t for name, t in old.items()}, shards)

    width = config.pop("intermediate_size")
    config |= {"model_type": "granite_switch", "architectures": ["GraniteSwitchForCausalLM"]}
    config |= {"vocab_size": first + len(texts), "shared_intermediate_size": width, "intermediate_size": width}
    config["num_hidden_layers"] += EXTRA_LAYERS[version]
    config |= {"num_adapters": len(names), "adapter_names": list(names), "adapter_token_ids": ids}
    config |= {"adapter_ranks": ranks, "max_lora_rank": max(ranks), "num_local_experts": 0}
    config |= {"position_embedding_type": "rope", "switch_head_dim": 32, "control_token_gain": 15.0, **keys}
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder, base, tokenizer, texts)
    _template(folder, base, tokenizer, names, records)
    return folder


def _embeddings(tensors: Mapping[str, torch.Tensor], first: int, count: int) -> Mapping[str, torch.Tensor]:
    """Embeddings as the old composer wrote them: cut to the tokenizer's length, with random rows for control tokens."""
    result = {"model.norm.weight": tensors["model.norm.weight"]}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            result[name] = torch.cat([tensors[name][:first], torch.randn(count, tensors[name].shape[1]) * 0.1])
    return result


def _stacks(records: list, weights: list, path: str, shape: torch.Size, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.zeros(len(records), 1, rank, shape[1]), torch.zeros(len(records), 1, shape[0], rank)
    for i, (record, tensors) in enumerate(zip(records, weights, strict=True)):
        key = f"base_model.model.{path}"
        if f"{key}.lora_A.weight" in tensors:
            r = record["r"]
            a[i, 0, :r] = tensors[f"{key}.lora_A.weight"]
            b[i, 0, :, :r] = tensors[f"{key}.lora_B.weight"] * record["lora_alpha"] / r
    return a, b


def _switch(
    version: int, ids: list[int], names: Sequence[str], records: list, first: int, reset: bool, hiding: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The stored tables, with wrong values (all follow from the config), and the keys of the switch."""
    if version == 1:
        groups = {"hiding_groups": {"all": list(names)}, "hiding_policy": {n: ["all"] for n in ("base", *names)}}
        tables = {
            "model.adapter_token_ids": torch.zeros(len(ids), dtype=torch.int64),
            "model.token_to_group_mask": torch.zeros(first + len(ids), 1, dtype=torch.bool),
            "model.adapter_hiding_matrix": torch.zeros(len(names) + 1, 1, dtype=torch.bool),
        }
        return tables, {"control_dims": 32, **(groups if hiding is None else hiding)}
    # a LoRA's substitute opens a turn: token 2 in the tests' tokenizer
    substitutes = [(record.get("alora_invocation_tokens") or [2])[0] for record in records]
    keys: dict[str, Any] = {"adapter_substitute_token_ids": [2, *substitutes] if reset else substitutes}
    tables = {"model.switch.control_to_substitute_lut": torch.zeros(first + len(ids), dtype=torch.int64)}
    if version == 3:
        tables["model.switch.codebook"] = torch.zeros(8, 8)
        keys |= {"ms_code_m": 6, "ms_code_type": "kerdock", "ms_memory_gain": 28.0, "ms_counting_head_dim": 32}
    return tables, keys


def _save(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    folder.mkdir(parents=True)
    if shards == 1:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return
    index = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {k: t.contiguous() for i, (k, t) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    total = sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _tokenizer(folder: Path, base: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = [*config.get("extra_special_tokens", ()), *texts]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def _template(folder: Path, base: Path, tokenizer: Tokenizer, names: Sequence[str], records: list) -> None:
    """A template like the old composer's: a table of adapters, code that places control tokens, the base's template."""
    lines = []
    for name, record in zip(names, records, strict=True):
        tokens = record.get("alora_invocation_tokens")
        entry = {"token": f"<|{name}|>", "type": "alora" if tokens else "lora"}
        if tokens:
            entry["invocation_text"] = tokenizer.decode(tokens, skip_special_tokens=False)
        lines.append(f"    {name!r}: {entry!r}")
    table = "{%- set adapter_map = {\n" + ",\n".join(lines) + "\n} %}\n"
    place = "{%- if adapter_name is defined and adapter_name in adapter_map %}{{- adapter_map[adapter_name]['token'] }}"
    text = table + place + "{%- endif %}\n" + (base / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text)
