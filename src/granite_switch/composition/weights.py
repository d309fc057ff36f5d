"""Read adapter_model.safetensors, and find the base's linear of each matrix.

Other tensors that trainers leave in the file are dropped if the base has the same (its own layers, an untrained
embedding), and refused by name if they would change what the model computes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from granite_switch.composition.base import Base
from granite_switch.composition.names import PEFT, Linears, explain, parse, unwrap
from granite_switch.composition.recognise import KOHYA_WAY, is_kohya
from granite_switch.core.checkpoint import CHUNK, Tensor, read_header, to_float32
from granite_switch.core.layout import AdapterTensor, fold
from granite_switch.errors import AdapterError, CheckpointError

BITS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}

_RENAMED = (
    "If transformers renames or splits the base's tensors on loading, compose with a base saved by "
    "save_pretrained(folder, save_original_format=False)"
)
_NO_VOCABULARY = (
    "leave embed_tokens and lm_head out of target_modules and modules_to_save (`all-linear` does), train again"
)
# patterns of tensor names that cannot be composed: what the tensors are, and how to avoid or convert them
_FOREIGN: Sequence[tuple[str, str]] = (
    (r"lora_magnitude_vector", "DoRA; docs/train.md shows how to take a LoRA from the merged model"),
    (r"lora_embedding_[AB]|(?:lm_head|embed_out|output)\.lora_[AB]", f"LoRA on the vocabulary; {_NO_VOCABULARY}"),
    (r"(?:embed_tokens|wte)\.lora_[AB]", f"LoRA on the vocabulary; {_NO_VOCABULARY}"),
    (r"trainable_tokens|token_adapter", f"retrained embeddings; {_NO_VOCABULARY}"),
    (r"modules_to_save", "a whole module; train LoRA on linears only"),
    (
        r"(?<!shared_)experts.*\.lora_[AB]",
        "LoRA on stacked experts; leave out target_parameters and target attention, train again",
    ),
    (r"conv.*\.lora_[AB]", "LoRA on a convolution; leave it out of target_modules and train again"),
    (r"bias$", "a bias; train with bias='none' and lora_bias=False"),
    (
        r"oft_|hada_|lokr_|ia3_|vera_|boft_",
        "not a LoRA; train again with PEFT's LoRA, or convert it with `peft.save_as_lora`",
    ),
)


@dataclass
class Weights:
    """An adapter's matrices, with notes and warnings about reading them."""

    tensors: dict[AdapterTensor, Tensor] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)  # linear -> the path that the adapter has for it
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_weights(path: Path, base: Base) -> Weights:
    """Return the adapter's matrices by linear, checked against the base's shapes.

    Args:
        path: adapter_model.safetensors.
        base: the base model.

    Raises:
        AdapterError: lists every tensor that does not fit.
    """
    try:
        header, about = read_header(path)
    except CheckpointError as error:
        raise AdapterError(error.message, problems=error.problems, hint=error.hint) from None
    if is_kohya([*header, *about]):
        raise AdapterError(f"{path}: is a kohya or LyCORIS file", hint=KOHYA_WAY)
    if empty := [name for name, tensor in header.items() if 0 in tensor.shape]:
        raise AdapterError(
            f"{path}: {len(empty)} of {len(header)} tensors are empty: saved under ZeRO-3 without gathering them",
            hint="save again with stage3_gather_16bit_weights_on_model_save, or from zero_to_fp32.py's output",
        )
    result = Weights()
    rest = _without_copies(path, header, base, result)
    _take(path, rest, base, result)
    return result


def _take(path: Path, header: Mapping[str, Tensor], base: Base, result: Weights) -> None:
    """Assign every matrix to its linear."""
    linears = Linears(base.linears)
    unknown: dict[str, str] = {}
    wrong, twice, paths, prefixes, adapters = [], [], [], set(), set()
    for name, tensor in header.items():
        found = parse(name)
        linear = linears.find(found.path) if found else None
        if not found or not linear:
            if found and not _foreign(name) and linears.in_another_layer(found.path):
                wrong.append(f"{name}: the base has {base.layers} layers")
            else:
                unknown[name] = found.path if found else unwrap(name)[0]
            continue
        prefixes.add(found.prefix)
        adapters.add(found.adapter)
        paths.append((found.path, linear))
        key = AdapterTensor("", linear, found.matrix)
        if key in result.tensors:
            twice.append(f"{name}: {result.tensors[key].name} is for the same linear")
        elif problem := _shape_problem(name, tensor, found.matrix, base.linears[linear]):
            wrong.append(problem)
        else:
            result.tensors[key] = tensor
            result.paths[linear] = found.path
    if unknown:
        raise _unknown(path, unknown, header, linears)
    if len(adapters) > 1:
        names = ", ".join(sorted(adapter or "(none)" for adapter in adapters))
        raise AdapterError(
            f"{path}: contains several adapters: {names}",
            hint="save each in its own folder with PEFT's save_pretrained",
        )
    if wrong:
        raise AdapterError(f"{path}: was made for another base model", problems=wrong)
    if twice:
        raise AdapterError(f"{path}: has two tensors for one matrix", problems=twice)
    if not result.tensors:
        raise AdapterError(f"{path}: contains no tensors")
    result.notes += _name_notes(prefixes, adapters, paths)


def _shape_problem(name: str, tensor: Tensor, matrix: str, shape: tuple[int, int]) -> str:
    out, width = shape
    if len(tensor.shape) != 2 or tensor.shape[matrix == "A"] != (width if matrix == "A" else out):
        expected = f"[r, {width}]" if matrix == "A" else f"[{out}, r]"
        return f"{name}: {list(tensor.shape)}, but the base needs {expected}"
    return "" if tensor.dtype in BITS else f"{name}: dtype {tensor.dtype}; F32, F16 and BF16 can be composed"


def _name_notes(prefixes: set[str], adapters: set[str], paths: Sequence[tuple[str, str]]) -> list[str]:
    """Return notes on names that differ from PEFT's, and how they were read."""
    notes = []
    if other := sorted(prefixes - {PEFT}):
        notes.append(f"names begin with {', '.join(repr(p) if p else 'no prefix' for p in other)}, not with {PEFT!r}")
    if other := sorted(adapters - {"", "default"}):
        notes.append(f"names contain the adapter's name, {', '.join(other)}")
    moved = dict.fromkeys(pair for pair in paths if pair[0] != pair[1])
    if moved:
        first, linear = next(iter(moved))
        notes.append(f"{len(moved)} modules have other paths than the base's: {first} is read as {linear}")
    return notes


def _foreign(name: str) -> str:
    return next((why for pattern, why in _FOREIGN if re.search(pattern, name)), "")


def _unknown(path: Path, unknown: Mapping[str, str], header: Mapping[str, Tensor], linears: Linears) -> AdapterError:
    reasons = {name: _foreign(name) for name in unknown}
    if len(unknown) == len(header) and not any(reasons.values()):
        return AdapterError(
            f"{path}: no tensor fits: {explain(dict.fromkeys(unknown.values()), linears)}",
            problems=[f"{name} {list(header[name].shape)}" for name in unknown] if len(unknown) <= 4 else (),
            hint=f"was it trained on this base? Adapters can target {_targets(linears)}. {_RENAMED}",
        )
    problems = [f"{name} {list(header[name].shape)}{why and ': '}{why}" for name, why in reasons.items()]
    return AdapterError(
        f"{path}: contains tensors that match no linear of this base",
        problems=problems,
        hint=f"adapters can target {_targets(linears)}. {_RENAMED}",
    )


def _targets(linears: Linears) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in linears.paths}))


def _without_copies(path: Path, header: Mapping[str, Tensor], base: Base, result: Weights) -> dict[str, Tensor]:
    """Return the tensors without copies of the base's own: its layers, embedding and head."""
    rest, dropped, problems, unlike = {}, [], [], []
    for name, tensor in header.items():
        original = _copied(name, base)
        if not original:
            rest[name] = tensor
        elif original not in base.checkpoint or base.checkpoint[original].dtype not in (*BITS, "F64"):
            unlike.append(name)
        elif problem := _difference(tensor, base.checkpoint[original]):
            problems.append(f"{name}: {problem}")
        else:
            dropped.append(name.rpartition(".")[0])
    if problems:
        raise AdapterError(
            f"{path}: contains weights of the base model that differ from this base's",
            problems=problems,
            hint="tokens added in training need a base with their rows: save the trained model whole and compose with "
            f"that as the base; or {_NO_VOCABULARY}",
        )
    if dropped:
        result.notes.append(
            f"copies of the base's own weights are dropped: {', '.join(list(fold(dict.fromkeys(dropped)))[:4])}"
        )
    if unlike:
        result.warnings.append(
            f"{len(unlike)} copies of the base's weights are dropped unchecked: this base's are quantised"
        )
    return rest


def _copied(name: str, base: Base) -> str:
    """Return the base's tensor that a tensor in an adapter's file is a copy of; "" if it is not a copy."""
    bare = unwrap(name)[0]
    if ".modules_to_save" in bare or ".lora_" in bare or "token_adapter" in bare:
        return ""
    if ".base_layer." in bare:
        linear = Linears(base.linears).find(bare.partition(".base_layer.")[0])
        return f"{linear}.{bare.rpartition('.')[2]}" if linear else ""
    last = bare.split(".")[-2:]
    if last == ["embed_tokens", "weight"] or last == ["wte", "weight"]:
        return base.vocabulary.embedding
    if last == ["lm_head", "weight"]:
        return base.vocabulary.head or base.vocabulary.embedding
    return ""


def _difference(copy: Tensor, original: Tensor) -> str:
    """Describe how a tensor differs from the base's; "" if it does not. Values are compared in the narrower dtype."""
    if copy.shape[1:] != original.shape[1:] or (len(copy.shape) < 2 and copy.shape < original.shape):
        return f"{list(copy.shape)}, but the base has {list(original.shape)}"
    rows, of_base = copy.shape[0], original.shape[0]
    if rows > of_base:
        return f"{rows} rows, but the base has {of_base}: tokens were added in training"
    width, other = copy.nbytes // rows, original.nbytes // of_base
    step = max(1, CHUNK // width)
    unlike: list[int] = []
    for row in range(0, rows, step):
        count = min(step, rows - row)
        left, right = copy.read(row * width, count * width), original.read(row * other, count * other)
        if copy.dtype != original.dtype or left != right:
            a, b = (
                _narrow(data, t.dtype, copy, original).reshape(count, -1)
                for data, t in ((left, copy), (right, original))
            )
            unlike += (row + np.flatnonzero((a != b).any(axis=1))).tolist()
    return f"{len(unlike)} rows differ from the base's, from row {unlike[0]} on: they were trained" if unlike else ""


def _narrow(data: bytes, dtype: str, *both: Tensor) -> npt.NDArray[np.float32]:
    """Decode values to float32, rounded to the narrower of the two tensors' dtypes."""
    values = to_float32(data, dtype)
    dtypes = {tensor.dtype for tensor in both}
    if "F16" in dtypes:
        values = values.astype(np.float16).astype(np.float32)
    if "BF16" in dtypes:
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        values = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def nonfinite(tensor: Tensor) -> str:
    """Return the number of NaN and inf in a tensor, as text; "" if there are none, or for other dtypes than in `BITS`.

    Their exponents are all ones, which can be tested on the bits without converting dtypes.
    """
    if tensor.dtype not in BITS:
        return ""
    dtype, exponent = BITS[tensor.dtype]
    nan = inf = 0
    for start in range(0, tensor.nbytes, CHUNK):
        data = tensor.read(start, min(CHUNK, tensor.nbytes - start))
        if (np.frombuffer(data, dtype) & exponent == exponent).any():
            values = to_float32(data, tensor.dtype)
            nan, inf = nan + int(np.isnan(values).sum()), inf + int(np.isinf(values).sum())
    return f"{tensor.name}: {nan} NaN, {inf} inf" if nan or inf else ""
