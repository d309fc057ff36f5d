"""`save_pretrained` in format 1: the base's tensors as transformers shards them, and a file for each adapter.

transformers writes first, because it handles quantised, offloaded and sharded models; then the adapters' tensors are
moved from its shards into their own files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granite_switch.core.border import read_json
from granite_switch.core.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    Tensor,
    copy_of,
    read_header,
    write,
    write_index,
)
from granite_switch.core.files import inside
from granite_switch.core.layout import (
    EMBEDDINGS,
    AdapterTensor,
    adapter_file,
    digest,
    parse_key,
    vocabulary,
)
from granite_switch.core.remote import AUTO_MAP, write_module
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import OutputError

_HUB_OPTIONS = ("repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision")
_FLOATS = {"F32", "F16", "BF16"}


def save_switch_model(model: Any, folder: Any, save: Callable[..., None], **options: Any) -> None:
    """Write a model as a format 1 checkpoint.

    Args:
        model: a switch model.
        folder: the folder to write.
        save: transformers' own `save_pretrained`, bound to the model.
        options: for `save`; the hub's are used here.
    """
    push = options.pop("push_to_hub", False)
    hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    target = Path(folder)
    save(folder, **options)
    if not options.get("is_main_process", True) or not ((target / SINGLE).exists() or (target / INDEX).exists()):
        return
    spec = model.config.switch_spec
    source = Path(model.config._name_or_path)
    _split(target, spec, source, model.config.get_text_config().vocab_size)
    if source.is_dir() and source.resolve() != target.resolve():
        _copy_companions(source, target, spec)
    if push:
        _push(target, hub)


def _push(folder: Path, hub: dict[str, Any]) -> None:
    """Upload a saved model. `private` and `token` concern the repository, the other options the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=hub.pop("token", None))
    name, private = hub.pop("repo_id", None) or folder.resolve().name, hub.pop("private", None)
    repository = api.create_repo(name, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repository).private:
        raise OutputError(f"{repository}: private=True, but the repository is public", hint="choose another name")
    hub.setdefault("commit_message", "Upload Granite Switch model")
    api.upload_folder(repo_id=repository, folder_path=folder, **hub)


def _split(folder: Path, spec: SwitchSpec, source: Path, rows: int) -> None:
    """Move the adapters' tensors and the embeddings from transformers' shards to their own files."""
    checkpoint = Checkpoint(folder)
    found = vocabulary(checkpoint.tensors, rows)
    vocabulary_names = found.names if found else ()
    adapters: dict[str, dict[AdapterTensor, Tensor]] = {name: {} for name in spec.names}
    for name, tensor in checkpoint.tensors.items():
        if key := parse_key(name):
            adapters[key.adapter][key] = tensor
    files: dict[str, dict[str, Tensor]] = {}
    rewritten: list[tuple[Path, Path]] = []
    for adapter, own in adapters.items():
        target = adapter_file(adapter)
        partial = folder / f".{target}"
        original = source / target
        if original.is_file() and _unchanged(original, own):
            shutil.copyfile(original, partial)
        else:
            write(partial, [copy_of(own[key]) for key in sorted(own, key=AdapterTensor.order)])
        rewritten.append((partial, folder / target))
    embeddings: list[Entry] = []
    metadata: dict[str, str] = {}
    for name, tensors in checkpoint.files.items():
        target = "model-00001-of-00001.safetensors" if name == SINGLE else name
        about = read_header(folder / name)[1]
        grown = [copy_of(tensors[key]) for key in vocabulary_names if key in tensors]
        rest = [copy_of(t) for key, t in tensors.items() if key not in vocabulary_names and not parse_key(key)]
        embeddings += grown
        metadata |= about if grown else {}
        if rest:
            write(folder / f".{target}", rest, metadata=about)
            rewritten.append((folder / f".{target}", folder / target))
    write(folder / f".{EMBEDDINGS}", sorted(embeddings, key=lambda entry: entry.name), metadata=metadata)
    rewritten.append((folder / f".{EMBEDDINGS}", folder / EMBEDDINGS))
    for partial, final in rewritten:
        partial.replace(final)
        files[final.name] = read_header(final)[0]
    for name in checkpoint.files.keys() - files.keys():
        (folder / name).unlink()
    write_index(folder, files)
    write_module(folder)
    _record(folder, {name: files[adapter_file(name)] for name in adapters})


def _record(folder: Path, adapters: dict[str, dict[str, Tensor]]) -> None:
    """Record the digests of adapters that were trained further, and drop the digests of their sources.

    Also point `auto_map` to the module in this folder; in a model loaded from the hub it points to the hub.
    """
    config = read_json(folder / "config.json") | AUTO_MAP
    for adapter in config["switch"]["adapters"]:
        tensors = {key: t for name, t in adapters.get(adapter["name"], {}).items() if (key := parse_key(name))}
        if adapter.get("digest") and tensors and adapter["digest"] != digest(tensors):
            adapter.update(digest=digest(tensors), sha256="")
            adapter.pop("warnings", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unchanged(original: Path, tensors: dict[AdapterTensor, Tensor]) -> bool:
    """Whether a file holds these tensors, up to rounding to the dtype that the model was loaded in."""
    header, _ = read_header(original)
    if header.keys() != {key.key for key in tensors}:
        return False
    for key, tensor in tensors.items():
        before = header[key.key]
        if before.shape != tensor.shape or not {before.dtype, tensor.dtype} <= _FLOATS:
            return False
        if before.dtype == tensor.dtype:
            same = before.read() == tensor.read()
        else:
            same = bool((_rounded(before, tensor.dtype) == tensor.float32()).all())
        if not same:
            return False
    return True


def _rounded(tensor: Tensor, dtype: str) -> Any:
    """A tensor's values rounded to a dtype, as float32."""
    import torch

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return torch.from_numpy(tensor.float32().copy()).to(kind).float().numpy()


def _copy_companions(source: Path, target: Path, spec: SwitchSpec) -> None:
    """Copy adapter_index.json and the io.yaml files, if the source has them."""
    for name in ("adapter_index.json", *(f"io_configs/{adapter}/io.yaml" for adapter in spec.names)):
        if (path := inside(source, name)).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
