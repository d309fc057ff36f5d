"""Read one PEFT adapter and say all that keeps it from being composed.

PEFT itself is not imported: its files are two, and their meaning is a few rules, each named after the PEFT function it
follows. The tests hold the composed model against PEFT.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from granite_switch.compose.base import Base
from granite_switch.compose.sources import PROVENANCE, Found
from granite_switch.core.border import check_name, checked, read, read_yaml, shown
from granite_switch.core.checkpoint import CHUNK, Tensor, read_header, sha256, to_float32
from granite_switch.core.files import inside
from granite_switch.core.layout import AdapterTensor, digest, natural
from granite_switch.core.records import AdapterConfig, IoConfig, Provenance, read_adapter_config
from granite_switch.errors import AdapterError, CheckpointError, SwitchError

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_BITS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter that fits the base, with its patterns resolved for each linear."""

    name: str
    technology: str
    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    invocation_tokens: tuple[int, ...]
    tensors: Mapping[AdapterTensor, Tensor]
    source: str
    sha256: str
    digest: str
    io_yaml: Path | None
    invocation_placement: Literal["", "prefix", "suffix"] = ""  # where a missing invocation text is written
    file: Path | None = None  # of a composed model, where it holds these tensors under this adapter's name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Retired:
    """What a removed adapter leaves: its slot and its token stay taken."""

    name: str
    substitute_token_id: int | None  # None: the base's own


def read_adapter(found: Found, base: Base) -> Adapter:
    """Read and check an adapter folder.

    Args:
        found: the folder and the adapter's name.
        base: the base model.

    Raises:
        AdapterError: with everything that is wrong, and what to do.
    """
    where = str(found.folder)
    check_name(found.name)
    config = read_adapter_config(found.folder)
    weights = found.folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = sorted(p.name for p in found.folder.glob("*.bin")) + sorted(p.name for p in found.folder.glob("*.pt"))
        if pickled:
            raise AdapterError(
                f"{where}: its weights are pickled ({', '.join(pickled)})",
                hint="pickles can run code; load it with PEFT and save_pretrained it again to get safetensors",
            )
        raise AdapterError(f"{weights}: no such file", hint="download or copy the adapter again")
    try:
        tensors = _tensors(inside(found.folder, weights.name), base)
    except CheckpointError as error:
        raise AdapterError(error.message, problems=error.problems, hint=error.hint) from None
    ranks, problems = _ranks(tensors, config)
    if problems:
        raise AdapterError(f"{weights}: does not fit its adapter_config.json", problems=problems)
    _refuse_nonfinite(weights, tensors)
    rank, rank_pattern = _compact(ranks, config.r)
    alpha, alpha_pattern = _alphas(ranks, config)
    invocation = _invocation(where, config, base.vocab_size)
    if found.invocation_placement and not invocation:
        raise AdapterError(f"{found.name}: has no invocation text to place; it is a LoRA and acts from the first token")
    io_yaml = found.folder / "io.yaml"
    if io_yaml.is_file() and (problem := io_problem(io_yaml)):
        raise AdapterError(problem, hint="clients could not load it; add the keys (null will do), or remove the file")
    contents = digest(tensors)
    source, file_hash = _provenance(found, contents) or (found.source, sha256(weights))
    return Adapter(
        name=found.name,
        technology="alora" if invocation else "lora",
        rank=rank,
        alpha=alpha,
        use_rslora=config.use_rslora,
        targets=tuple(ranks),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        invocation_tokens=invocation,
        tensors=tensors,
        source=source,
        sha256=file_hash,
        digest=contents,
        io_yaml=io_yaml if io_yaml.is_file() else None,
        invocation_placement=found.invocation_placement,
    )


def read_retired(found: Found, base: Base) -> Retired:
    """Check a manifest's entry for a removed adapter."""
    check_name(found.name)
    token = found.substitute_token_id
    if token is not None and not 0 <= token < base.vocab_size:
        raise AdapterError(f"{found.name}: substitute_token_id {token} is not in the base's vocabulary")
    return Retired(found.name, token)


def io_problem(path: Path) -> str:
    """What keeps clients such as Mellea from loading an io.yaml; "" if nothing does."""
    try:
        checked(IoConfig, read_yaml(inside(path.parent, path.name)), path)
    except SwitchError as error:
        return f"{error.message}{': ' if error.problems else ''}{', '.join(error.problems)}"
    return ""


def _provenance(found: Found, contents: str) -> tuple[str, str] | None:
    """Source and sha256 of an adapter that came out of a composed model, if its weights are still the same."""
    path = found.folder / PROVENANCE
    if not path.is_file():
        return None
    record = read(inside(found.folder, PROVENANCE), Provenance, AdapterError, "remove the file, or extract it again")
    return (record.source, record.sha256) if record.digest == contents else None


def _tensors(weights: Path, base: Base) -> dict[AdapterTensor, Tensor]:
    """The adapter's matrices by linear, all checked against the base's shapes."""
    header, _ = read_header(weights)
    result: dict[AdapterTensor, Tensor] = {}
    unknown, wrong = [], []
    for name, tensor in header.items():
        match = _KEY.fullmatch(name)
        linear = _linear(match[1], base.linears) if match else None
        if match and not linear and _elsewhere(match[1], base.linears):
            wrong.append(f"{name}: the base has {base.layers} layers")
            continue
        if not match or not linear:
            unknown.append(f"{name} {list(tensor.shape)}")
            continue
        matrix, (out, width) = match[2], base.linears[linear]
        if len(tensor.shape) != 2 or tensor.shape[matrix == "A"] != (width if matrix == "A" else out):
            expected = f"[r, {width}]" if matrix == "A" else f"[{out}, r]"
            wrong.append(f"{name}: {list(tensor.shape)} where the base needs {expected}")
        elif tensor.dtype not in _BITS:
            wrong.append(f"{name}: dtype {tensor.dtype}; F32, F16 and BF16 can be composed")
        else:
            result[AdapterTensor("", linear, matrix)] = tensor
    if unknown:
        raise AdapterError(
            f"{weights}: tensors that no linear of this base takes",
            problems=unknown,
            hint=f"adapters can target {', '.join(dict.fromkeys(p.rpartition('.')[2] for p in base.linears))}",
        )
    if wrong:
        raise AdapterError(f"{weights}: made for another base model", problems=wrong)
    if not result:
        raise AdapterError(f"{weights}: holds no tensor")
    return result


def _linear(path: str, linears: Mapping[str, Any]) -> str | None:
    """The base's linear of this path, or the only one whose path ends so; None if there is none."""
    if path in linears:
        return path
    ends = [linear for linear in linears if linear.endswith(f".{path}")]
    return ends[0] if len(ends) == 1 else None


def _elsewhere(path: str, linears: Mapping[str, Any]) -> bool:
    """Whether another layer has this linear."""
    return any(_without_numbers(linear).endswith(_without_numbers(path)) for linear in linears)


def _without_numbers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", f".{path}")


def _ranks(tensors: Mapping[AdapterTensor, Tensor], config: AdapterConfig) -> tuple[dict[str, int], list[str]]:
    """Rank of each linear, in natural order, and where pairs or ranks do not agree."""
    ranks: dict[str, int] = {}
    problems = []
    for linear in sorted({key.linear for key in tensors}, key=natural):
        a, b = (tensors.get(AdapterTensor("", linear, matrix)) for matrix in "AB")
        if a is None or b is None:
            problems.append(f"{linear}: lora_{'A' if a is None else 'B'} is missing")
            continue
        expected = config.rank_of(linear)
        if not a.shape[0] == b.shape[1] == expected:
            problems.append(f"{linear}: A has rank {a.shape[0]}, B has rank {b.shape[1]}, the config says {expected}")
        ranks[linear] = a.shape[0]
    return ranks, problems


def _compact(ranks: Mapping[str, int], default: int) -> tuple[int, dict[str, int]]:
    rank = default if default in ranks.values() else max(ranks.values())
    return rank, {linear: value for linear, value in ranks.items() if value != rank}


def _alphas(ranks: Mapping[str, int], config: AdapterConfig) -> tuple[float, dict[str, float]]:
    default = config.lora_alpha
    alphas = {linear: config.alpha_of(linear) for linear in ranks}
    return default, {linear: value for linear, value in alphas.items() if value != default}


def _invocation(where: str, config: AdapterConfig, vocab_size: int) -> tuple[int, ...]:
    tokens = config.alora_invocation_tokens or ()
    if bad := [token for token in tokens if token >= vocab_size]:
        raise AdapterError(f"{where}: alora_invocation_tokens {shown(bad)} are not in the base's vocabulary")
    return tuple(tokens)


def _refuse_nonfinite(weights: Path, tensors: Mapping[AdapterTensor, Tensor]) -> None:
    if bad := [problem for tensor in tensors.values() if (problem := nonfinite(tensor))]:
        raise AdapterError(f"{weights}: weights that are not finite", problems=bad, hint="train or save it again")


def nonfinite(tensor: Tensor) -> str:
    """How many NaN and inf a tensor holds, in words; "" if none, or if its dtype cannot tell.

    They have an exponent of all ones: a test of bits, so that no dtype needs converting.
    """
    if tensor.dtype not in _BITS:
        return ""
    dtype, exponent = _BITS[tensor.dtype]
    nan = inf = 0
    for start in range(0, tensor.nbytes, CHUNK):
        data = tensor.read(start, min(CHUNK, tensor.nbytes - start))
        if (np.frombuffer(data, dtype) & exponent == exponent).any():
            values = to_float32(data, tensor.dtype)
            nan, inf = nan + int(np.isnan(values).sum()), inf + int(np.isinf(values).sum())
    return f"{tensor.name}: {nan} NaN, {inf} inf" if nan or inf else ""
