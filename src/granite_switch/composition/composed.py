"""Split a composed model back into its base and the adapter of each slot.

To change a model is to compose it again from these parts, so unchanged parts have the same bytes by construction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter, Retired, io_problem
from granite_switch.composition.base import Base
from granite_switch.composition.tokenizer import without
from granite_switch.composition.write import io_config
from granite_switch.core import legacy
from granite_switch.core.border import shown
from granite_switch.core.chat import unwrap
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.files import inside
from granite_switch.core.layout import AdapterTensor, adapter_file, decoder_config, parse_key, vocabulary
from granite_switch.core.linears import linears
from granite_switch.core.model import read_model
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
    slots: tuple[Adapter | Retired, ...]
    spec: SwitchSpec

    @property
    def adapters(self) -> dict[str, Adapter]:
        return {slot.name: slot for slot in self.slots if isinstance(slot, Adapter)}


def read_composed(folder: Path) -> Composed:
    """Split a composed model. Only headers and small files are read.

    Raises:
        CheckpointError: it is not in format 1, or its files contradict each other.
    """
    config, spec = read_model(folder)
    if spec.hiding or spec.base_token_id < 0:
        raise CheckpointError(
            f"{folder}: is a checkpoint in a legacy format that transformers loaded and saved",
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
    slots = tuple(_slot(folder, adapter, checkpoint, spec) for adapter in spec.adapters)
    return Composed(folder, config, base, slots, spec)


def _base_config(config: Mapping[str, Any], spec: SwitchSpec) -> dict[str, Any]:
    """Return the base's config.json, with a vocabulary that ends before the first control token."""
    base = {key: value for key, value in config.items() if key != "switch"}
    base |= {"model_type": spec.base_model_type, "architectures": [spec.base_architecture]}
    size = {"vocab_size": min(spec.control_slots)}
    inner = decoder_config(base)
    return base | (size if inner is base else {"text_config": {**inner, **size}})


def tensor_problems(checkpoint: Checkpoint, spec: SwitchSpec, config: Mapping[str, Any]) -> list[str]:
    """Return the differences between the tensors and those that config.json implies."""
    expected: dict[str, tuple[str, tuple[int, int]]] = {}
    shapes = linears(checkpoint.tensors, config)
    problems = []
    for adapter in spec.active:
        unknown = [linear for linear in adapter.targets if linear not in shapes]
        problems += [f"{adapter.name}: the base has no linear {linear}" for linear in unknown]
        for key, shape in adapter.tensors(shapes).items():
            expected[key.key] = (adapter_file(adapter.name), shape)
    for file, tensors in checkpoint.files.items():
        for name, tensor in tensors.items():
            if name in expected:
                home, shape = expected.pop(name)
                if file != home:
                    problems.append(f"{name}: is in {file}, not in {home}")
                if tensor.shape != shape:
                    problems.append(f"{file}: {name} is {list(tensor.shape)}; config.json says {list(shape)}")
            elif parse_key(name):
                problems.append(f"{file}: {name} belongs to no adapter in config.json")
            elif file in {adapter_file(adapter.name) for adapter in spec.active}:
                problems.append(f"{file}: {name} does not belong to an adapter")
    problems += [f"{file}: {name} is missing" for name, (file, _) in expected.items()]
    return problems + _row_problems(checkpoint, spec, config)


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


def _slot(folder: Path, adapter: AdapterSpec, checkpoint: Checkpoint, spec: SwitchSpec) -> Adapter | Retired:
    if adapter.retired:
        same = adapter.substitute_token_id == spec.base_substitute_token_id
        return Retired(adapter.name, None if same else adapter.substitute_token_id)
    file, io_yaml = adapter_file(adapter.name), folder / io_config(adapter.name)
    if io_yaml.is_file() and (problem := io_problem(io_yaml)):
        raise CheckpointError(problem, hint=f"{VERIFY} {folder}")
    tensors: dict[AdapterTensor, Tensor] = {}
    for name, tensor in checkpoint.files[file].items():
        if key := parse_key(name):
            tensors[replace(key, adapter="")] = tensor
    return Adapter(
        name=adapter.name,
        technology=adapter.technology,
        rank=adapter.rank,
        alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        targets=adapter.targets,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
        invocation_tokens=adapter.invocation_tokens,
        tensors=tensors,
        source=adapter.source,
        sha256=adapter.sha256,
        digest=adapter.digest,
        io_yaml=inside(folder, io_config(adapter.name)) if io_yaml.is_file() else None,
        invocation_placement=adapter.invocation_placement,
        file=folder / file,
        warnings=adapter.warnings,
    )
