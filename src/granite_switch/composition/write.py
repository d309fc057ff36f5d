"""Carry out a plan: link or stream shards, copy adapters, and write the small files.

Tensors are copied from file to file as bytes, so memory use is one chunk.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter, io_text
from granite_switch.composition.card import model_card
from granite_switch.composition.plan import Plan
from granite_switch.composition.proof import Prover, check
from granite_switch.composition.tokenizer import extended_config
from granite_switch.core.border import write_json
from granite_switch.core.checkpoint import (
    INDEX,
    SINGLE,
    Entry,
    Tensor,
    copy_of,
    read_header,
    write,
    write_index,
)
from granite_switch.core.files import inside
from granite_switch.core.layout import EMBEDDINGS, AdapterTensor, adapter_file, io_config
from granite_switch.core.progress import Progress
from granite_switch.core.remote import write_module
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.staging import link_or_copy
from granite_switch.errors import CheckpointError

# base files that are rewritten, or that describe the base's own packaging
_REPLACED = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"}
_REPLACED |= {"README.md", INDEX, "added_tokens.json", "special_tokens_map.json", "adapter_index.json"}
_REPLACED |= {"adapter_config.json"}  # of an adapter merged into the base: with it, transformers loads another model
_KEPT = {".json", ".txt", ".model"}

# loaders would take `model.safetensors` for the whole model; a base's shard may have the same name as ours
_RENAMED = {SINGLE: "model-00001-of-00001.safetensors", EMBEDDINGS: f"model-{EMBEDDINGS}"}

# an io.yaml that changes neither request nor answer; clients require these keys
_IO_YAML = b"model: null\nresponse_format: null\ntransformations: null\n"


def write_model(
    plan: Plan, folder: Path, progress: Progress | None = None, *, prover: Prover | None = None, same_rows: bool = False
) -> None:
    """Write the composed model into an empty folder.

    Args:
        plan: the model.
        folder: an existing, empty folder.
        progress: called for each piece that is written.
        prover: proves that the tokenizer is read like the base's. A base that is itself a composed model needs none.
        same_rows: the base's files are a composed model's, whose embedding already has the rows that this one needs.
    """
    _write_small_files(plan, folder)
    differences = prover.start(folder, plan.base.folder) if prover else list  # runs while files are copied
    growing, total = plan.grown, plan.nbytes
    files: dict[str, Mapping[str, Tensor]] = {}

    def advance(count: int) -> None:
        if progress:
            progress(count, total)

    def link(source: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
        link_or_copy(source, folder / name)
        files[name] = tensors
        advance(sum(tensor.nbytes for tensor in tensors.values()))

    def put(name: str, entries: Sequence[Entry], about: Mapping[str, str]) -> None:
        write(folder / name, entries, advance, about)
        files[name] = read_header(folder / name)[0]

    grown: list[Entry] = []
    metadata: dict[str, str] = {}
    for name, tensors in plan.checkpoint.files.items():
        source = plan.checkpoint.folder / name
        header, about = read_header(source)
        rest = {key: tensor for key, tensor in tensors.items() if key not in growing}
        if same_rows and name == EMBEDDINGS and not rest:
            link(source, name, header)
            continue
        if len(rest) < len(tensors):
            grown += [_entry(plan, tensor) for key, tensor in tensors.items() if key in growing]
            metadata |= about
        target = _RENAMED.get(name, name)
        if rest == header:
            link(source, target, header)
        elif rest:
            put(target, [copy_of(tensor) for tensor in rest.values()], about)
    if grown:
        put(EMBEDDINGS, sorted(grown, key=lambda entry: entry.name), metadata)
    for name, adapter in plan.adapters.items():
        if adapter.file:
            link(adapter.file, adapter_file(name), read_header(adapter.file)[0])
        else:
            put(adapter_file(name), _adapter_entries(adapter), {})
    write_index(folder, files)
    check(differences())


def _adapter_entries(adapter: Adapter) -> list[Entry]:
    """Return an adapter's tensors with their names in the checkpoint, in the natural order of linears."""
    ordered = sorted(adapter.tensors, key=AdapterTensor.order)
    return [copy_of(adapter.tensors[t], replace(t, adapter=adapter.name).key) for t in ordered]


def _entry(plan: Plan, tensor: Tensor) -> Entry:
    """Return an embedding with rows for new and reserved tokens, which copy their substitutes' rows."""
    rows, *width = tensor.shape
    copied = plan.spec.copied_rows
    if max(copied) >= rows:
        raise CheckpointError(f"{tensor.path}: {tensor.name} has {rows} rows; token {max(copied)} has none to copy")
    filler = bytes((plan.spec.rows - len(copied) - rows) * (tensor.nbytes // rows))
    new = b"".join(tensor.row(i) for i in copied)
    return Entry(tensor.name, tensor.dtype, (plan.spec.rows, *width), (tensor, filler + new))


def _write_small_files(plan: Plan, folder: Path) -> None:
    write_json(folder / "config.json", plan.config)
    write_module(folder)
    write_json(folder / "tokenizer.json", plan.tokenizer_data)
    write_json(folder / "tokenizer_config.json", extended_config(plan.base.tokenizer, plan.tokenizer_data))
    for name, template in plan.templates.items():
        path = folder / "chat_template.jinja"
        if name != "default":
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(template.encode())
    for path in sorted(plan.base.folder.iterdir()):
        keep = path.suffix in _KEPT or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and keep and path.name not in _REPLACED and not path.name.endswith(".index.json"):
            shutil.copyfile(inside(plan.base.folder, path.name), folder / path.name)
    for name, adapter in plan.adapters.items():
        if adapter.io_yaml or plan.create_io_yaml:
            target = folder / io_config(name)
            target.parent.mkdir(parents=True)
            target.write_bytes(io_text(adapter.io_yaml) if adapter.io_yaml else _IO_YAML)
    write_json(folder / "adapter_index.json", adapter_index(plan.spec, folder))
    (folder / "README.md").write_text(model_card(plan.spec, plan.adapters), encoding="utf-8", newline="\n")


def adapter_index(spec: SwitchSpec, folder: Path) -> dict[str, Any]:
    """Return adapter_index.json, in which clients such as Mellea find the adapters."""
    records = []
    for slot, adapter in enumerate(spec.adapters, 1):
        if adapter.retired:
            continue
        record: dict[str, Any] = {"adapter_index": slot, "adapter_name": adapter.name}
        record |= {"technology": adapter.technology}
        record |= {"control_token": {"token": adapter.token, "id": adapter.token_id}}
        if (folder / io_config(adapter.name)).is_file():
            record["io_config"] = io_config(adapter.name)
        records.append(record)
    info = {"num_adapters": len(records), "base_model": spec.base_model}
    return {"model_info": info, "adapters": records}
