"""Summarise a `graniteswitch` GGUF file, including files from other converters."""

import json
import os
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType, ReaderTensor
from pydantic import Field

from granite_switch.core.border import LIMIT, Count, Natural, Record, TokenId, checked
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError
from granite_switch.gguf.write import ARCH


class Keys(Record):
    """The keys that are read: llama.cpp's, and those that this project's files have beside them."""

    file_type: int | None = Field(None, alias="general.file_type")
    layers: Count = Field(alias="graniteswitch.block_count")
    context: Count = Field(alias="graniteswitch.context_length")
    vocab_size: Count | None = Field(None, alias="graniteswitch.vocab_size")
    rank: Natural = Field(alias="graniteswitch.adapters.lora_rank")
    activate: list[TokenId] = Field(alias="graniteswitch.adapters.token_ids_activate")
    substitute: list[TokenId] = Field(alias="graniteswitch.adapters.token_ids_substitute")
    tokens: list[str] = Field([], alias="tokenizer.ggml.tokens")
    pre: str = Field("", alias="tokenizer.ggml.pre")
    switch: str = Field("", alias="granite_switch.switch")
    ranks: list[int] = Field([], alias="granite_switch.adapters.ranks")
    io_configs: list[str] = Field([], alias="granite_switch.adapters.io_configs")


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
        CheckpointError: it is not a GGUF file, has another architecture, or has wrong keys.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    fields, tensors = _read(path)
    architecture = fields.get("general.architecture")
    if architecture != ARCH:
        raise CheckpointError(
            f"{path} has no adapters: its architecture is {architecture!r}, not {ARCH!r}",
            hint="export one that has: granite-switch export gguf MODEL --output FILE",
        )
    keys = checked(Keys, fields, path)
    spec = _spec(path, keys)
    stacks = [tensor for tensor in tensors if tensor.name.endswith((".lora_a", ".lora_b"))]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": architecture,
        "base_model": spec.base_model if spec else "",
        "outtype": _outtype(keys.file_type, tensors),
        "pre_tokenizer": keys.pre,
        "layers": keys.layers,
        "context": keys.context,
        "vocab_size": len(keys.tokens) or keys.vocab_size,
        "lora_rank": keys.rank,
        "adapter_bytes": sum(int(tensor.n_bytes) for tensor in stacks),
        "adapters": _adapters(keys, spec),
    }


class _Reader(GGUFReader):
    """The library's reader, which takes what lies behind the end of a file for nothing, and counts on."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError(f"it ends before byte {offset}")
        return found


def _read(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
    """Every key with its value, and the tensors."""
    try:
        reader = _Reader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors
    except Exception as error:  # of a damaged file the library raises whatever its steps do
        raise CheckpointError(f"{path} is not a GGUF file, or is truncated ({str(error)[:200]})") from None


def _spec(path: Path, keys: Keys) -> SwitchSpec | None:
    """The `switch` object that this project's files hold; None in others'."""
    try:
        spec = SwitchSpec.from_dict(json.loads(keys.switch)) if keys.switch else None
    except (ValueError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{path}: granite_switch.switch: {str(error)[:1000]}") from None
    count, size = len(keys.activate), len(keys.tokens) or LIMIT
    lists = (keys.substitute, *((keys.ranks, keys.io_configs, spec.active) if spec else ()))
    if any(len(one) != count for one in lists) or max((*keys.activate, *keys.substitute), default=0) >= size:
        raise CheckpointError(f"{path}: the adapters' keys contradict each other")
    return spec


def _adapters(keys: Keys, spec: SwitchSpec | None) -> list[dict[str, Any]]:
    result = []
    for i, (token, other) in enumerate(zip(keys.activate, keys.substitute, strict=True)):
        text = keys.tokens[token] if keys.tokens else ""
        record = {"slot": i + 1, "name": text.removeprefix("<|").removesuffix("|>"), "control_token": text}
        record |= {"token_id": token, "substitute": keys.tokens[other] if keys.tokens else ""}
        record |= {"substitute_token_id": other}
        if spec:
            own = spec.active[i]
            record |= {"name": own.name, "technology": own.technology, "alpha": own.alpha, "source": own.source}
            record |= {"target_modules": list(own.modules), "invocation_text": own.invocation_text}
            record |= {"sha256": own.sha256, "rank": keys.ranks[i], "io_config": keys.io_configs[i]}
        result.append(record)
    return result


def _outtype(file_type: int | None, tensors: list[ReaderTensor]) -> str:
    if file_type is None:
        return tensors[0].tensor_type.name.lower() if tensors else ""
    known = file_type in LlamaFileType.__members__.values()
    return LlamaFileType(file_type).name.removeprefix("ALL_").removeprefix("MOSTLY_").lower() if known else ""
