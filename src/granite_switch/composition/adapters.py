"""Read one PEFT adapter, and list everything that prevents composing it.

PEFT itself is not imported: an adapter is two files and a few rules, each named after the PEFT function that it
follows. The tests compare composed models with PEFT. `recognise.py` identifies other libraries' files; `names.py` and
`weights.py` read the tensors.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import regex
import yaml

from granite_switch.composition.base import Base
from granite_switch.composition.effect import effect_warnings
from granite_switch.composition.recognise import refuse_foreign, without_weights
from granite_switch.composition.sources import PROVENANCE, Found
from granite_switch.composition.weights import Weights, nonfinite, read_weights
from granite_switch.core.adapter_config import AdapterConfig, matches, read_adapter_config
from granite_switch.core.border import check_name, checked, read, read_yaml, shown
from granite_switch.core.checkpoint import Tensor, sha256
from granite_switch.core.files import inside
from granite_switch.core.layout import AdapterTensor, digest, natural
from granite_switch.core.records import IoConfig, Provenance
from granite_switch.core.spec import AdapterSpec
from granite_switch.errors import AdapterError, SwitchError

_QUANTISED = re.compile(r"(?:-unsloth)?-(?:bnb-)?(?:4bit|8bit|int4|int8|fp8|nf4|gptq|awq).*$")
UNSET = -1  # a token id that `plan.assemble` sets
_PACKAGED = re.compile(r"@.*$|\.git$")


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the base, or a removed one, whose slot and token stay reserved (`spec.retired`)."""

    spec: AdapterSpec  # of a new adapter: without tokens and texts, which `plan.assemble` adds
    tensors: Mapping[AdapterTensor, Tensor]
    io_yaml: Path | None
    file: Path | None = None  # of a composed model, if it contains these tensors under this adapter's name
    made_for: str = ""  # its `base_model_name_or_path`
    notes: tuple[str, ...] = ()  # where it was read differently from what its files say

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(found: Found, base: Base) -> Adapter:
    """Read and check an adapter folder.

    Args:
        found: the folder and the adapter's name.
        base: the base model.

    Raises:
        AdapterError: lists everything that is wrong and how to fix it.
    """
    check_name(found.name)
    refuse_foreign(found.folder)
    config = read_adapter_config(found.folder)
    path = found.folder / "adapter_model.safetensors"
    if not path.is_file():
        raise without_weights(found.folder)
    weights = read_weights(inside(found.folder, path.name), base)
    tensors = weights.tensors
    ranks, problems = _ranks(weights, config)
    if problems:
        raise AdapterError(f"{path}: does not fit its adapter_config.json", problems=problems)
    _refuse_nonfinite(path, tensors)
    rank, rank_pattern = _compact(ranks, config.r)
    alphas = {linear: config.alpha_of(weights.paths[linear]) for linear in ranks}
    invocation, notes = _invocation(found.folder, config, base)
    if found.invocation_placement and not invocation:
        raise AdapterError(f"{found.name}: has no invocation text to place; a LoRA acts from the first token")
    io_yaml = found.folder / "io.yaml"
    notes += _io_notes(io_yaml) if io_yaml.is_file() else []
    contents = digest(tensors)
    source, file_hash = _provenance(found, contents) or (found.source, sha256(path))
    spec = AdapterSpec(
        name=found.name,
        technology="alora" if invocation else "lora",
        token="",
        token_id=UNSET,
        substitute_token_id=UNSET,
        rank=rank,
        alpha=config.lora_alpha,
        targets=tuple(ranks),
        use_rslora=config.use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern={linear: value for linear, value in alphas.items() if value != config.lora_alpha},
        invocation_tokens=invocation,
        invocation_placement=found.invocation_placement,
        source=source,
        sha256=file_hash,
        digest=contents,
    )
    warnings = [found.note] if found.note else []
    warnings += [*weights.warnings, *_config_warnings(config, weights)]
    warnings += effect_warnings(spec, tensors, base.checkpoint)
    return Adapter(
        replace(spec, warnings=tuple(warnings)),
        tensors,
        io_yaml if io_yaml.is_file() else None,
        made_for=config.base_model_name_or_path or "",
        notes=(*weights.notes, *notes),
    )


def read_retired(found: Found, base: Base) -> Adapter:
    """Check a manifest's entry for a removed adapter."""
    check_name(found.name)
    token = found.substitute_token_id
    if token is not None and not 0 <= token < base.vocab_size:
        raise AdapterError(f"{found.name}: substitute_token_id {token} is not in the base's vocabulary")
    return retired(found.name, UNSET if token is None else token)


def retired(name: str, substitute_token_id: int) -> Adapter:
    """Return the slot of a removed adapter."""
    return Adapter(AdapterSpec(name, "lora", "", UNSET, substitute_token_id, 0, 0, (), retired=True), {}, None)


def _io_notes(path: Path) -> list[str]:
    """Check an adapter's io.yaml; return a note on keys that are added to it."""
    if missing := io_missing(path):
        return [f"io.yaml lacks {', '.join(missing)}, which clients require; written as null"]
    if problem := io_problem(path):
        raise AdapterError(problem, hint="clients cannot load it; add the keys (as null if unused) or remove the file")
    return []


def io_problem(path: Path) -> str:
    """Return the reason that clients such as Mellea cannot load an io.yaml; "" if they can."""
    try:
        checked(IoConfig, read_yaml(inside(path.parent, path.name)), path)
    except SwitchError as error:
        return f"{error.message}{': ' if error.problems else ''}{', '.join(error.problems)}"
    return ""


def io_missing(path: Path) -> list[str]:
    """Return the missing keys of an io.yaml, if appending them as null makes it valid; otherwise an empty list."""
    try:
        data = read_yaml(inside(path.parent, path.name))
        missing = [key for key in IoConfig.model_fields if key not in data] if isinstance(data, dict) else []
        same = yaml.safe_load(_extended(path, missing)) == {**data, **dict.fromkeys(missing)} if missing else False
    except (SwitchError, yaml.YAMLError):
        return []
    return missing if same else []


def io_text(path: Path) -> bytes:
    """Return the contents of an io.yaml, with missing keys appended."""
    return _extended(path, missing) if (missing := io_missing(path)) else path.read_bytes()


def _extended(path: Path, missing: Sequence[str]) -> bytes:
    text = path.read_bytes()
    return b"".join([text, b"" if text.endswith(b"\n") else b"\n", *(f"{key}: null\n".encode() for key in missing)])


def other_base(made_for: str, base_model: str) -> str:
    """Return the warning for an adapter that was trained on another model; "" if it was not, or if that is unknown.

    Owners are ignored (`unsloth/X` is `ibm-granite/X`), and so is quantisation. Local paths are not compared.
    """
    local = made_for.startswith(("/", ".", "~", "\\")) or made_for.count("/") > 1 or ":" in made_for
    if not made_for or local or os.path.exists(made_for) or _model(made_for) == _model(base_model):
        return ""
    return f"trained on {made_for} (base_model_name_or_path), composed with {base_model}"


def _model(name: str) -> str:
    return _QUANTISED.sub("", _PACKAGED.sub("", name.strip().rstrip("/").lower()).rpartition("/")[2])


def _provenance(found: Found, contents: str) -> tuple[str, str] | None:
    """Return the original source and sha256 of an extracted adapter, if its weights have not changed."""
    path = found.folder / PROVENANCE
    if not path.is_file():
        return None
    record = read(inside(found.folder, PROVENANCE), Provenance, AdapterError, "remove the file, or extract it again")
    return (record.source, record.sha256) if record.digest == contents else None


def _ranks(weights: Weights, config: AdapterConfig) -> tuple[dict[str, int], list[str]]:
    """Return the rank of each linear, in natural order, and a list of mismatches."""
    ranks: dict[str, int] = {}
    problems = []
    for linear in sorted({key.linear for key in weights.tensors}, key=natural):
        a, b = (weights.tensors.get(AdapterTensor("", linear, matrix)) for matrix in "AB")
        if a is None or b is None:
            problems.append(f"{linear}: lora_{'A' if a is None else 'B'} is missing")
            continue
        expected = config.rank_of(weights.paths[linear])
        if not a.shape[0] == b.shape[1] == expected:
            problems.append(f"{linear}: A has rank {a.shape[0]}, B has rank {b.shape[1]}, the config says {expected}")
        ranks[linear] = a.shape[0]
    return ranks, problems


def _compact(ranks: Mapping[str, int], default: int) -> tuple[int, dict[str, int]]:
    rank = default if default in ranks.values() else max(ranks.values())
    return rank, {linear: value for linear, value in ranks.items() if value != rank}


def _invocation(folder: Path, config: AdapterConfig, base: Base) -> tuple[tuple[int, ...], list[str]]:
    """Return the invocation tokens, and notes on what was converted.

    Older aLoRA trainers wrote only `invocation_string`, and their adapters act after its first token. That equals
    PEFT's aLoRA with the tokens from the second one on, since the adapter then acts on the same tokens.
    """
    if tokens := config.alora_invocation_tokens:
        if bad := [token for token in tokens if token >= base.vocab_size]:
            raise AdapterError(f"{folder}: alora_invocation_tokens {shown(bad)} are not in the base's vocabulary")
        return tuple(tokens), []
    text = config.invocation_string
    if not text:
        return (), []
    library = base.tokenizer.library
    ids = library.encode(text, add_special_tokens=False).ids
    if library.decode(ids, skip_special_tokens=False) != text:
        raise AdapterError(f"{folder}: the base's tokenizer cannot represent invocation_string {shown(text)}")
    if len(ids) < 2:
        raise AdapterError(
            f"{folder}: invocation_string {shown(text)} is one token, and an older aLoRA acts after its first token",
            hint="a control token cannot replace the token that follows; train it again with PEFT's "
            "alora_invocation_tokens, or set that key if it was trained to act from this token on",
        )
    rest = tuple(ids[1:])
    acts_from = library.decode(list(rest), skip_special_tokens=False)
    return rest, [
        f"invocation_string {shown(text)} is an older aLoRA's, which acts after its first token: {shown(acts_from)}"
    ]


def _config_warnings(config: AdapterConfig, weights: Weights) -> list[str]:
    """Return warnings for keys of adapter_config.json that do not match the weights."""
    modules = {*weights.paths, *weights.paths.values()}
    result = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key) or {}
        result += [
            f"{key}: {shown(pattern)} matches none of its modules"
            for pattern in patterns
            if not any(matches(pattern, module) for module in modules)
        ]
    targets = config.target_modules
    if isinstance(targets, list):
        absent = [t for t in targets if not any(_is_target(module, [t]) for module in modules)]
        if absent:
            result.append(f"target_modules has {', '.join(absent[:8])}, for which there are no weights")
    more = [
        linear
        for linear, path in weights.paths.items()
        if not (_is_target(path, targets) or _is_target(linear, targets))
    ]
    if targets and more:
        names = dict.fromkeys(linear.rpartition(".")[2] for linear in more)
        result.append(
            f"the weights include {', '.join(names)}, which target_modules does not name; PEFT would ignore them"
        )
    return result


def _is_target(module: str, targets: str | list[str] | None) -> bool:
    """Whether `target_modules` names a module (PEFT `check_target_module_exists`)."""
    if isinstance(targets, list):
        return any(module == t or module.endswith(f".{t}") for t in targets)
    try:
        return targets in (None, "all-linear") or bool(regex.fullmatch(targets or "", module, timeout=0.25))
    except (regex.error, TimeoutError):
        return True


def _refuse_nonfinite(path: Path, tensors: Mapping[AdapterTensor, Tensor]) -> None:
    if bad := [problem for tensor in tensors.values() if (problem := nonfinite(tensor))]:
        raise AdapterError(f"{path}: has weights that are not finite", problems=bad, hint="train or save it again")
