"""Check a composed model and list everything that is wrong with it.

The comparison with PEFT needs torch; it is in `granite_switch.hf.verify`.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from granite_switch.composition import placement as place
from granite_switch.composition import proof
from granite_switch.composition.adapters import io_problem
from granite_switch.composition.composed import tensor_problems, unwrapped
from granite_switch.composition.sources import model_folder
from granite_switch.composition.weights import nonfinite
from granite_switch.composition.write import adapter_index
from granite_switch.core.border import read, read_json
from granite_switch.core.checkpoint import INDEX, SINGLE, Checkpoint
from granite_switch.core.files import inside, steady
from granite_switch.core.layout import by_adapter, decoder_config, digest, io_config, vocabulary
from granite_switch.core.model import read_model
from granite_switch.core.records import ShardIndex
from granite_switch.core.remote import AUTO_MAP, MODULE
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import BaseTokenizer, read_tokenizer
from granite_switch.errors import CheckpointError, SwitchError

T = TypeVar("T")


def verify(model: str | PathLike[str], *, deep: bool = False, prove: bool = True) -> SwitchSpec:
    """Check a composed model's files against each other.

    Args:
        model: local folder or hub id.
        deep: read every weight; check adapters against their digests, all tensors for NaN and inf, and the control
            tokens' rows.
        prove: have transformers read the tokenizer, if it is installed; importing it takes seconds.

    Returns:
        The `switch` object of its config.json.

    Raises:
        CheckpointError: lists everything that is wrong.
    """
    folder = model_folder(model)
    problems, spec = steady(
        folder, lambda: (find_problems(folder, deep=deep, prove=prove), _attempt([], read_model, folder))
    )
    if problems or not spec:
        raise CheckpointError(
            f"{folder}: {len(problems)} thing{'s are' if len(problems) > 1 else ' is'} wrong",
            problems=problems,
            hint="restore the files, or compose the model again",
        )
    return spec[1]


def find_problems(folder: Path, *, deep: bool = False, prove: bool = True) -> list[str]:
    """Return everything that is wrong with a composed model, one problem per line."""
    problems: list[str] = []
    read = _attempt(problems, read_model, folder)
    checkpoint = _attempt(problems, Checkpoint, folder)
    tokenizer = _attempt(problems, read_tokenizer, folder)
    if checkpoint:
        problems += _index_problems(checkpoint)
    if not read:
        return problems
    config, spec = read
    if checkpoint:
        problems += tensor_problems(checkpoint, spec, config)
        if deep:
            problems += _deep_problems(checkpoint, spec, config)
    if tokenizer:
        found = _token_problems(tokenizer, spec)
        if prove and not found:
            found = [f"AutoTokenizer: {line}" for line in proof.differences(folder)]
        problems += found
        problems += _template_problems(folder, tokenizer, spec)
    return problems + _client_problems(folder, config, spec)


def _attempt(problems: list[str], step: Callable[..., T], *args: Any) -> T | None:
    try:
        return step(*args)
    except SwitchError as error:
        problems += error.problems or [error.message]
    return None


def _index_problems(checkpoint: Checkpoint) -> list[str]:
    folder = checkpoint.folder
    problems = [
        f"{path.name} is not in {INDEX}, so it is not loaded"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in checkpoint.files
    ]
    if SINGLE in checkpoint.files:
        return [*problems, f"{SINGLE} exists; loaders take it and ignore {INDEX}"]
    index = read(folder / INDEX, ShardIndex)
    listed = index.weight_map
    for file, tensors in checkpoint.files.items():
        problems += [f"{file} contains {name}, which {INDEX} does not list" for name in tensors if name not in listed]
    total = (index.metadata or {}).get("total_size")
    if total is not None and total != checkpoint.nbytes:
        problems.append(f"{INDEX}: total_size is {total}, but the tensors have {checkpoint.nbytes} bytes")
    return problems


def _deep_problems(checkpoint: Checkpoint, spec: SwitchSpec, config: Mapping[str, Any]) -> list[str]:
    problems = [problem for tensor in checkpoint.tensors.values() if (problem := nonfinite(tensor))]
    own = by_adapter(checkpoint.tensors)
    problems += [
        f"{adapter.name}: its weights differ from those that were composed (by their digest)"
        for adapter in spec.active
        if adapter.digest and digest(own.get(adapter.name, {})) != adapter.digest
    ]
    names = vocabulary(checkpoint.tensors, decoder_config(config)["vocab_size"])
    for name in names.names if names else ():
        matrix = checkpoint[name]
        for row, source in enumerate(spec.copied_rows, min(spec.control_slots)):
            if max(row, source) < matrix.shape[0] and matrix.row(row) != matrix.row(source):
                problems.append(f"{name}: row {row} is not a copy of its substitute's row {source}")
    return problems


def _token_problems(tokenizer: BaseTokenizer, spec: SwitchSpec) -> list[str]:
    problems = []
    special = {token["content"] for token in tokenizer.data.get("added_tokens", ()) if token.get("special")}
    for text, token_id in [(spec.base_token, spec.base_token_id), *((a.token, a.token_id) for a in spec.adapters)]:
        found = tokenizer.tokens.get(text)
        if found != token_id:
            problems.append(f"tokenizer.json: {text} is {found}; config.json says {token_id}")
        elif text not in special:
            problems.append(f"tokenizer.json: {text} is not a special token")
    if tokenizer.size > spec.rows:
        problems.append(f"tokenizer.json: has {tokenizer.size} tokens, more than the {spec.rows} rows of the model")
    return problems


def _template_problems(folder: Path, tokenizer: BaseTokenizer, spec: SwitchSpec) -> list[str]:
    problems: list[str] = []
    if not tokenizer.templates:
        return []
    bases = _attempt(problems, unwrapped, folder, tokenizer)
    if bases and "default" in bases:
        _attempt(problems, _prove, folder, tokenizer, spec, bases, problems)
    return problems


def _prove(
    folder: Path, tokenizer: BaseTokenizer, spec: SwitchSpec, bases: Mapping[str, str], problems: list[str]
) -> None:
    """Prove every adapter's placement on sample chats, with the folder's own template."""
    samples = place.chats(bases["default"], tokenizer.special_tokens)
    first, turn = place.opening(samples, tokenizer.library), place.turn(bases["default"], samples, tokenizer.library)
    if turn.id != spec.base_substitute_token_id:
        wanted = spec.base_substitute_token_id
        problems.append(f"the template opens turns with token {turn.id}; config.json says {wanted}")
    placements = [place.placement(adapter, first.text, tokenizer.library) for adapter in spec.active]
    for name, wrapped in place.templates(bases, spec, placements, tokenizer.library).items():
        if wrapped != tokenizer.templates[name]:
            problems.append(f"chat template {name}: does not place the adapters of config.json as compose writes it")
    place.prove(spec, placements, tokenizer.templates["default"], bases["default"], samples, tokenizer.library)


def _client_problems(folder: Path, config: Mapping[str, Any], spec: SwitchSpec) -> list[str]:
    problems: list[str] = []
    index = _attempt(problems, lambda: read_json(inside(folder, "adapter_index.json")))
    if index is not None and index != adapter_index(spec, folder):
        problems.append("adapter_index.json: does not match config.json's adapters and their io.yaml files")
    if config.get("auto_map") == AUTO_MAP["auto_map"] and not inside(folder, MODULE).is_file():
        problems.append(f"{MODULE} is missing, which config.json's auto_map names")
    paths = [folder / io_config(adapter.name) for adapter in spec.active]
    return problems + [problem for path in paths if path.is_file() and (problem := io_problem(path))]
