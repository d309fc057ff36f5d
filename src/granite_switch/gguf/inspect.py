"""Summarise a `graniteswitch` GGUF file, including files from other converters."""

import json
import os
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType, ReaderTensor

from granite_switch.errors import CheckpointError
from granite_switch.gguf.write import ARCH


def describe(path: Path) -> dict[str, Any]:
    """A summary of a GGUF file's model and adapters, in JSON types.

    Args:
        path: a GGUF file.

    Returns:
        `file`, `bytes`, `architecture`, `base_model`, `outtype`, `pre_tokenizer`, `layers`, `context`, `vocab_size`,
        `lora_rank` (to which all adapters are padded), `adapter_bytes` (padded), and `adapters`, a list of records with
        `slot`, `name`, `control_token`, `token_id`, `substitute`, `substitute_token_id`, and if this project wrote the
        file `technology`, `rank`, `alpha`, `target_modules`, `invocation_text`, `source`, `sha256`, `io_config`.

    Raises:
        CheckpointError: it is not a GGUF file, or has another architecture.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(f"{path} is not a GGUF file, or is truncated ({error})") from None
    wanted = ("tokenizer.ggml.tokens", "tokenizer.ggml.pre")
    keys = {n: f.contents() for n, f in reader.fields.items() if n in wanted or not n.startswith("tokenizer.")}
    architecture = keys.get("general.architecture")
    if architecture != ARCH:
        raise CheckpointError(
            f"{path} has no adapters: its architecture is {architecture!r}, not {ARCH!r}",
            hint="export one that has: granite-switch export gguf MODEL --output FILE",
        )
    tokens = keys.get("tokenizer.ggml.tokens", [])
    stacks = [tensor for tensor in reader.tensors if tensor.name.endswith((".lora_a", ".lora_b"))]
    switch = json.loads(keys.get("granite_switch.switch", "{}"))
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": architecture,
        "base_model": switch.get("base_model", ""),
        "outtype": _outtype(keys.get("general.file_type"), reader.tensors),
        "pre_tokenizer": keys.get("tokenizer.ggml.pre", ""),
        "layers": keys[f"{ARCH}.block_count"],
        "context": keys[f"{ARCH}.context_length"],
        "vocab_size": len(tokens) or keys.get(f"{ARCH}.vocab_size"),
        "lora_rank": keys[f"{ARCH}.adapters.lora_rank"],
        "adapter_bytes": sum(int(tensor.n_bytes) for tensor in stacks),
        "adapters": _adapters(keys, tokens, switch),
    }


def _adapters(keys: dict[str, Any], tokens: list[str], switch: dict[str, Any]) -> list[dict[str, Any]]:
    known = [record for record in switch.get("adapters", ()) if not record.get("retired")]
    io_configs = keys.get("granite_switch.adapters.io_configs", ())
    result = []
    activate, substitute = (keys[f"{ARCH}.adapters.token_ids_{kind}"] for kind in ("activate", "substitute"))
    for i, (token, other) in enumerate(zip(activate, substitute, strict=True)):
        text = tokens[token] if token < len(tokens) else ""
        record = {"slot": i + 1, "name": text.removeprefix("<|").removesuffix("|>"), "control_token": text}
        record |= {"token_id": token, "substitute": tokens[other] if tokens else "", "substitute_token_id": other}
        if i < len(known):
            own = ("name", "technology", "alpha", "target_modules", "invocation_text", "source", "sha256")
            record |= {key: known[i][key] for key in own if key in known[i]}
            record |= {"rank": keys["granite_switch.adapters.ranks"][i], "io_config": io_configs[i]}
        result.append(record)
    return result


def _outtype(file_type: int | None, tensors: list[ReaderTensor]) -> str:
    if file_type is None:
        return tensors[0].tensor_type.name.lower()
    return LlamaFileType(file_type).name.removeprefix("ALL_").removeprefix("MOSTLY_").lower()
