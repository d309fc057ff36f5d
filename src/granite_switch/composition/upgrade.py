"""Rewrite a checkpoint in a legacy format as format 1, without the adapters that it was composed from.

The checkpoint is split lazily into a base and adapters, which are composed as usual. The old chat template, rendered
without an adapter, becomes the base's.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter
from granite_switch.composition.base import Base
from granite_switch.composition.plan import Plan, assemble
from granite_switch.composition.reading import as_read, joined
from granite_switch.composition.sources import model_folder
from granite_switch.composition.tokenizer import without
from granite_switch.composition.write import write_model
from granite_switch.core import legacy
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.files import inside
from granite_switch.core.layout import AdapterTensor, Vocabulary, by_adapter, digest, io_config, parse_key, vocabulary
from granite_switch.core.progress import Progress
from granite_switch.core.records import AdapterIndex, read_adapter_index
from granite_switch.core.spec import AdapterSpec
from granite_switch.core.staging import check_target, staged
from granite_switch.core.tokenizer import BaseTokenizer, read_tokenizer, token_text
from granite_switch.errors import CheckpointError

_ADAPTER_MAP = re.compile(r"set adapter_map = (\{.*?\n\}) %\}", re.DOTALL)
# old templates place control tokens if `adapter_name` is set; without it they render the base's prompt
_WITHOUT_ADAPTER = "{% set adapter_name = '' +%}"
_TOKEN_LISTS = ("extra_special_tokens", "additional_special_tokens")


def upgrade(
    old: str | PathLike[str],
    new: str | PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Write a checkpoint in a legacy format as format 1.

    Args:
        old: folder or hub id.
        new: the folder to create; it appears only when it is complete.
        force: replace an existing folder.
        progress: called for each piece that is written.

    Returns:
        The plan that was carried out.

    Raises:
        SwitchError: lists everything that is wrong; no partial output is left.
    """
    check_target(Path(new), force=force)
    planned = prepare(model_folder(old))
    with staged(Path(new), force=force) as folder:
        write_model(planned, folder, progress)
    return planned


def prepare(folder: Path) -> Plan:
    """Split a legacy checkpoint and plan it as format 1. B is read once, to find linears without an update."""
    old = legacy.read(folder)
    tokenizer = read_tokenizer(folder)
    first = _first_control(old, tokenizer)
    index = read_adapter_index(folder)
    triggers = _invocations(old, tokenizer)
    pairs = by_adapter(old.tensors)
    slots = []
    for spec in old.spec.adapters:
        tokens = tuple(tokenizer.library.encode(triggers[spec.name], add_special_tokens=False).ids)
        slots.append(_adapter(old, spec, pairs.get(spec.name, {}), tokens, _io_yaml(folder, spec.name, index)))
    base_model = index.model_info.base_model or folder.resolve().name
    planned = assemble(_base(old, tokenizer, first), slots, base_model=base_model)
    _check_substitutes(old, planned)
    return planned


def _base(old: legacy.Old, tokenizer: BaseTokenizer, first: int) -> Base:
    """Return the base: config, tensors without the control tokens' rows, tokenizer and templates."""
    files: dict[str, dict[str, Tensor]] = {name: {} for name in old.checkpoint.files}
    homes = {tensor.path: name for name, tensors in old.checkpoint.files.items() for tensor in tensors.values()}
    names = _vocabulary(old).names
    for name, tensor in old.tensors.items():
        if not parse_key(name):
            rows = first if name in names else tensor.shape[0]
            files[homes[tensor.path]][name] = tensor[(slice(0, rows),)]
    config = {key: value for key, value in old.config.items() if key != "switch"}
    config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "vocab_size": first}
    plain = without(tokenizer, first)
    templates = {name: _WITHOUT_ADAPTER + text for name, text in tokenizer.templates.items()}
    settings = _without_tokens(joined(tokenizer, old.checkpoint.folder).config, plain.tokens)
    plain = as_read(replace(plain, config=settings, templates=templates), config, old.checkpoint.folder)
    checkpoint: Checkpoint = old.checkpoint.of({name: tensors for name, tensors in files.items() if tensors})
    return Base(old.checkpoint.folder, config, checkpoint, plain)


def _adapter(
    old: legacy.Old,
    spec: AdapterSpec,
    tensors: Mapping[AdapterTensor, Tensor],
    invocation: tuple[int, ...],
    io_yaml: Path | None,
) -> Adapter:
    """Return an adapter without the zero pairs that stacking it with others added."""
    used = {key.linear for key, tensor in tensors.items() if key.matrix == "B" and not _zero(tensor)}
    used = used or {key.linear for key in tensors}  # an adapter that is all zero keeps its pairs
    kept = {key: tensor for key, tensor in tensors.items() if key.linear in used}
    contents = digest(kept)
    spec = replace(
        spec,
        targets=tuple(linear for linear in spec.targets if linear in used),
        invocation_tokens=invocation,
        source=f"{old.checkpoint.folder.resolve().name}, legacy format {old.format_version}",
        sha256=contents,
        digest=contents,
    )
    return Adapter(spec, kept, io_yaml)


def _zero(tensor: Tensor) -> bool:
    data = tensor.read()
    return data.count(0) == len(data)


def _io_yaml(folder: Path, name: str, index: AdapterIndex) -> Path | None:
    named = [record.io_config for record in index.adapters if record.adapter_name == name and record.io_config]
    path = inside(folder, named[0] if named else io_config(name))
    return path if path.is_file() else None


def _vocabulary(old: legacy.Old) -> Vocabulary:
    names = vocabulary(old.tensors, old.config["vocab_size"])
    if names is None:
        raise CheckpointError(f"{old.checkpoint.folder}: has no token embedding")
    return names


def _first_control(old: legacy.Old, tokenizer: BaseTokenizer) -> int:
    """Return the first control token's id. From it on, embedding and tokenizer must contain only control tokens."""
    controls = set(old.spec.control_slots)
    rows = old.tensors[_vocabulary(old).embedding].shape[0]
    first = min(controls, default=rows)
    others = {i: text for text, i in tokenizer.tokens.items() if i >= first and i not in controls}
    problems = [f"token {i} is {text!r}" for i, text in sorted(others.items())]
    problems += [f"embedding row {i} belongs to no control token" for i in range(first, rows) if i not in controls][:9]
    if problems:
        raise CheckpointError(
            f"{old.checkpoint.folder}: its control tokens are not the last in the vocabulary", problems=problems[:20]
        )
    return first


def _invocations(old: legacy.Old, tokenizer: BaseTokenizer) -> Mapping[str, str]:
    """Return every adapter's invocation text, "" for a LoRA, from the table at the beginning of old templates."""
    found = _ADAPTER_MAP.search(tokenizer.templates.get("default", ""))
    try:
        table = ast.literal_eval(found[1]) if found else {}
        triggers = {name: table[name].get("invocation_text") or "" for name in old.spec.names if name in table}
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError):
        triggers = {}
    if missing := [name for name in old.spec.names if not isinstance(triggers.get(name), str)]:
        raise CheckpointError(
            f"{old.checkpoint.folder}: its chat template does not say what turns on {', '.join(missing)}",
            hint="the old composer's template begins with a table of adapters; restore it as it was published",
        )
    return triggers


def _check_substitutes(old: legacy.Old, new: Plan) -> None:
    """Check that no control token's substitute changes."""
    problems = [
        f"{a.name}: token {before.substitute_token_id} in the old checkpoint, {a.substitute_token_id} by its template"
        for before, a in zip(old.spec.adapters, new.spec.adapters, strict=True)
        if not old.spec.hiding and before.substitute_token_id != a.substitute_token_id
    ]
    if problems:
        raise CheckpointError(
            f"{old.checkpoint.folder}: its config and its chat template give a control token different substitutes",
            problems=problems,
        )


def _without_tokens(config: Mapping[str, Any], kept: Mapping[str, int]) -> dict[str, Any]:
    """Return a tokenizer's config without the special tokens that are not in `kept`."""
    result = dict(config)
    for key in _TOKEN_LISTS:
        if isinstance(tokens := result.get(key), list):
            result[key] = [token for token in tokens if token_text(token) in kept]
    return result
