"""Split a composed model back into its base and the adapter of each slot.

To change a model is to compose it again from these parts, so unchanged parts have the same bytes by construction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter, io_problem, retired
from granite_switch.composition.base import Base, resized
from granite_switch.composition.tokenizer import without
from granite_switch.core import legacy
from granite_switch.core.border import shown
from granite_switch.core.chat import unwrap
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.files import inside
from granite_switch.core.layout import adapter_file, by_adapter, decoder_config, io_config, parse_key, vocabulary
from granite_switch.core.linears import linears
from granite_switch.core.model import read_model, shape_problems
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.core.tokenizer import BaseTokenizer, read_tokenizer
from granite_switch.errors import CheckpointError

VERIFY = "granite-switch verify"


@dataclass(frozen=True)
class Composed:
    """A composed model, split into base and adapters."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    base: Base  # without control tokens and their rows; templates are unwrapped
    slots: tuple[Adapter, ...]
    spec: SwitchSpec

    @property
    def adapters(self) -> dict[str, Adapter]:
        return {slot.name: slot for slot in self.slots if not slot.spec.retired}


def read_composed(folder: Path) -> Composed:
    """Split a composed model. Only headers and small files are read.

    Raises:
        CheckpointError: it is not in format 1, or its files contradict each other.
    """
    config, spec = read_model(folder)
    if spec.hiding or spec.base_token_id < 0:
        raise CheckpointError(
            f"{folder}: was saved by transformers from a legacy checkpoint",
            hint=f"upgrade the checkpoint that it was loaded from: {legacy.UPGRADE}",
        )
    checkpoint = Checkpoint(folder)
    if problems := tensor_problems(checkpoint, spec, config):
        raise CheckpointError(
            f"{folder}: its files contradict each other", problems=problems, hint=f"{VERIFY} {folder}"
        )
    tokenizer = read_tokenizer(folder)
    first = min(spec.control_slots)
    added = {token["content"] for token in tokenizer.data.get("added_tokens", ())}
    if beyond := {text: i for text, i in tokenizer.tokens.items() if i >= (spec.rows if text in added else first)}:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: {len(beyond)} tokens have ids of control tokens or above {spec.rows - 1}",
            problems=[f"{shown(text)} has id {i}" for text, i in beyond.items()],
            hint=f"{VERIFY} {folder}",
        )
    base = Base(
        folder,
        _base_config(config, spec),
        _base_checkpoint(checkpoint, config, first),
        replace(without(tokenizer, first), templates=unwrapped(folder, tokenizer)),
    )
    slots = tuple(_slot(folder, adapter, checkpoint) for adapter in spec.adapters)
    return Composed(folder, config, base, slots, spec)


def _base_config(config: Mapping[str, Any], spec: SwitchSpec) -> dict[str, Any]:
    """Return the base's config.json, with a vocabulary that ends before the first control token."""
    base = {key: value for key, value in config.items() if key != "switch"}
    base |= {"model_type": spec.base_model_type, "architectures": [spec.base_architecture]}
    return resized(base, min(spec.control_slots))


def tensor_problems(checkpoint: Checkpoint, spec: SwitchSpec, config: Mapping[str, Any]) -> list[str]:
    """Return the differences between the tensors and those that config.json implies."""
    shapes = linears(checkpoint.tensors, config)
    homes = {adapter_file(adapter.name): adapter for adapter in spec.active}
    expected = {f"{file}: {t.key}": shape for file, a in homes.items() for t, shape in a.tensors(shapes).items()}
    found = {
        f"{file}: {name}": tensor.shape
        for file, tensors in checkpoint.files.items()
        for name, tensor in tensors.items()
        if file in homes or parse_key(name)
    }
    return [
        *(f"{a.name}: the base has no linear {path}" for a in spec.active for path in a.targets if path not in shapes),
        *shape_problems(found, expected, "belongs to no adapter in config.json, or to another file"),
        *_row_problems(checkpoint, spec, config),
    ]


def _row_problems(checkpoint: Checkpoint, spec: SwitchSpec, config: Mapping[str, Any]) -> list[str]:
    controls = sorted(spec.control_slots)
    rows = spec.rows
    problems = []
    if controls != list(range(controls[0], controls[-1] + 1)):
        problems.append(f"config.json: the control tokens' ids {controls} have gaps")
    size = decoder_config(config)["vocab_size"]
    if size < rows:
        return [
            *problems,
            f"config.json: vocab_size {size} is too small for the last control token, {controls[-1]}, and "
            f"{spec.reserved} reserved rows",
        ]
    names = vocabulary(checkpoint.tensors, size)
    if not names:
        return [*problems, f"no tensor is a token embedding of {size} rows"]
    return problems + [
        f"{name} has {checkpoint[name].shape[0]} rows, not {size}"
        for name in names.names
        if checkpoint[name].shape[0] != size
    ]


def unwrapped(folder: Path, tokenizer: BaseTokenizer) -> dict[str, str]:
    """Return the base's templates from a composed model's."""
    templates = {name: unwrap(text) for name, text in tokenizer.templates.items()}
    if foreign := [name for name, text in templates.items() if text is None]:
        raise CheckpointError(
            f"{folder}: chat template {', '.join(foreign)} was not written by compose",
            hint="restore chat_template.jinja, or compose the model again",
        )
    return {name: text for name, text in templates.items() if text is not None}


def _base_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any], first: int) -> Checkpoint:
    """Return the base's tensors, without the rows from `first` on."""
    files: dict[str, dict[str, Tensor]] = {}
    names = vocabulary(checkpoint.tensors, decoder_config(config)["vocab_size"])
    for name, tensors in checkpoint.files.items():
        kept = {key: tensor for key, tensor in tensors.items() if not parse_key(key)}
        for key in names.names if names else ():
            if key in kept:
                kept[key] = kept[key][(slice(first),)]
        if kept:
            files[name] = kept
    return checkpoint.of(files)


def _slot(folder: Path, adapter: AdapterSpec, checkpoint: Checkpoint) -> Adapter:
    if adapter.retired:
        return retired(adapter.name, adapter.substitute_token_id)
    io_yaml = inside(folder, io_config(adapter.name))
    there = io_yaml.is_file()
    if there and (problem := io_problem(io_yaml)):
        raise CheckpointError(problem, hint=f"{VERIFY} {folder}")
    file = adapter_file(adapter.name)
    return Adapter(adapter, by_adapter(checkpoint.files[file])[adapter.name], io_yaml if there else None, folder / file)
