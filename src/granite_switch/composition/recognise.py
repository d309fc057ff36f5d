"""Identify folders and files that are not PEFT adapters, and say how to get an adapter from them.

Trainers and hubs leave many things that look like adapters: other libraries' formats, whole models, optimizer states.
Each is a row of `_KINDS`: a test, a description and a hint. Nothing is converted here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from granite_switch.core.border import read_json
from granite_switch.core.checkpoint import read_header
from granite_switch.errors import AdapterError, SwitchError

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Folder:
    """A folder to identify: file names, small JSON files and tensor names."""

    path: Path

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.path.iterdir())

    def ends(self, *endings: str) -> bool:
        return any(name.endswith(endings) for name in self.names)

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object in the folder; empty if it is missing or invalid."""
        try:
            data = read_json(self.path / name)
        except SwitchError:
            return {}
        return data if isinstance(data, dict) else {}

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of the tensors in the folder's safetensors files."""
        return frozenset(n for name in self.names if name.endswith(".safetensors") for n in keys(self.path / name))


@dataclass(frozen=True)
class Kind:
    """Something that is not a PEFT adapter."""

    is_one: Callable[[Folder], bool]
    what: str
    way: str


def keys(path: Path) -> list[str]:
    """Return the names in a safetensors file's header and metadata; empty if it cannot be read."""
    try:
        header, about = read_header(path)
    except (OSError, ValueError, SwitchError):
        return []
    return [*header, *about]


def is_kohya(names: Iterable[str]) -> bool:
    """Whether names of tensors or metadata come from kohya or LyCORIS."""
    marks = (".lora_down.", ".lora_up.", ".hada_w", ".lokr_w", "ss_network_module", "lora_unet_", "lora_te")
    return any(mark in name for name in names for mark in marks)


def _whole_model(folder: Folder) -> bool:
    weights = any(
        n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin")) for n in folder.names
    )
    return bool(folder.json("config.json").get("model_type")) and weights


_MLX_WAY = "docs/train.md shows how to convert it to PEFT's form: A and B transposed, lora_alpha = scale * rank"
KOHYA_WAY = "these are for image models; a LyCORIS adapter of a language model must be trained again with PEFT's LoRA"
_KINDS = (
    Kind(
        lambda f: "fine_tune_type" in f.json(_CONFIG) or "lora_parameters" in f.json(_CONFIG),
        "an MLX adapter (fine_tune_type in adapter_config.json), not PEFT's",
        _MLX_WAY,
    ),
    Kind(
        lambda f: "adapters.safetensors" in f.names and _CONFIG not in f.names,
        "an MLX adapter (adapters.safetensors), not PEFT's",
        _MLX_WAY,
    ),
    Kind(
        lambda f: f.json("config.json").get("model_type") == "granite_switch",
        "a composed model",
        "`granite-switch extract MODEL NAME --output FOLDER` extracts an adapter from it",
    ),
    Kind(
        lambda f: _WEIGHTS not in f.names and is_kohya(f.tensors),
        "a kohya or LyCORIS file",
        KOHYA_WAY,
    ),
    Kind(
        lambda f: "pytorch_lora_weights.safetensors" in f.names,
        "a LoRA of the diffusers library, for image models",
        "only adapters of language models can be composed",
    ),
    Kind(
        lambda f: f.ends(".gguf"),
        "llama.cpp's GGUF (a LoRA converted with convert_lora_to_gguf.py, or a model)",
        "compose from the PEFT adapter that it was converted from",
    ),
    Kind(
        lambda f: bool({"pytorch_adapter.bin", "head_config.json"} & f.names),
        "an adapter of the `adapters` library (adapter-transformers), not PEFT's",
        "train it again with PEFT, as LoRA",
    ),
    Kind(
        lambda f: _whole_model(f) and "trainer_state.json" in f.names,
        "a Trainer checkpoint of a whole model (a full fine-tune), with no LoRA in it",
        "give it as the base model, or train a LoRA with PEFT (docs/train.md)",
    ),
    Kind(
        _whole_model,
        "a whole model (a full fine-tune, or an adapter merged into its base), not an adapter",
        "give it as the base model, or find the adapter before it was merged",
    ),
    Kind(
        lambda f: (
            any(n.startswith(("global_step", "pytorch_model_fsdp")) for n in f.names)
            or bool({"zero_to_fp32.py", ".metadata"} & f.names)
        ),
        "a sharded training state (DeepSpeed or FSDP) without the adapter's own file",
        "load it in the trainer and call save_pretrained, or merge it with `accelerate merge-weights`",
    ),
    Kind(
        lambda f: bool({"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"} & f.names),
        "a Trainer folder with training state and no adapter",
        "give the checkpoint that contains adapter_model.safetensors, or call model.save_pretrained in the trainer",
    ),
    Kind(
        lambda f: _WEIGHTS in f.names,
        "adapter_model.safetensors without its adapter_config.json",
        "copy adapter_config.json into the folder; only it has rank, alpha and targets",
    ),
    Kind(
        lambda f: f.ends(".pth", ".ckpt", ".nemo", ".pt", ".bin"),
        "pickled weights of a trainer",
        "pickles can run code; load them in the trainer, and save the adapter with PEFT's save_pretrained",
    ),
)


def refuse(path: Path, source: str, kinds: Sequence[Kind] = _KINDS) -> None:
    """Raise an error that says what a folder is, if it is known not to be a PEFT adapter.

    Args:
        path: the folder.
        source: the user's name for it.
        kinds: the kinds to look for.
    """
    folder = Folder(path)
    for kind in kinds:
        if kind.is_one(folder):
            raise AdapterError(f"{source}: is {kind.what}", hint=kind.way)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder whose adapter_config.json is another library's."""
    refuse(path, str(path), _KINDS[:1])


def without_weights(path: Path) -> AdapterError:
    """Return the error for an adapter_config.json without weights beside it."""
    names = sorted(entry.name for entry in path.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and "arg" not in name]
    if "adapter_model.bin" in pickled or (pickled and not any(n.startswith("optimizer") for n in pickled)):
        return AdapterError(
            f"{path}: its weights are pickled ({', '.join(pickled)})",
            hint="pickles can run code; load it with PEFT and call save_pretrained to get safetensors",
        )
    try:
        refuse(path, str(path))
    except AdapterError as error:
        error.message = f"{path / _WEIGHTS}: no such file; the folder is {error.message.partition(': is ')[2]}"
        return error
    return AdapterError(f"{path / _WEIGHTS}: no such file", hint="download or copy the adapter again")


def what_file_is(path: Path) -> str:
    """Describe a single file that was given as a source."""
    if path.suffix == ".gguf":
        return "is llama.cpp's GGUF; compose from the PEFT adapter that it was converted from"
    if path.suffix == ".safetensors":
        if is_kohya(keys(path)):
            return f"is a kohya or LyCORIS file: {KOHYA_WAY}"
        return "is one file of an adapter, which is a folder with adapter_config.json"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "is pickled; pickles can run code: save the adapter with PEFT's save_pretrained"
    return "is neither a folder nor a YAML manifest"
