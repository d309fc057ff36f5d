"""Plan an export: read and check everything before a byte is written.

This includes checks that the engine lacks: src/models/granite-switch.cpp loads unknown control tokens without an error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from granite_switch.core import legacy
from granite_switch.core.border import read, read_text
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.files import inside
from granite_switch.core.model import shape_problems
from granite_switch.core.records import GenerationConfig, read_adapter_index, read_config
from granite_switch.core.spec import MODEL_TYPE, SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import CheckpointError
from granite_switch.gguf.dialects import Decoder, read_decoder
from granite_switch.gguf.pretokenizer import NAMES, detect
from granite_switch.gguf.tensors import EMBEDDING, HEAD, TYPES, Target, expected, max_rank, same, targets
from granite_switch.gguf.vocabulary import Vocabulary, vocabulary

MOST_ADAPTERS = MOST_RANK = 4096
OUTTYPES = tuple(TYPES)
_UNUSED = ".rotary_emb.inv_freq"  # stored in old checkpoints, but derived from the config
_OWN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Plan:
    """A checked export, ready to write."""

    decoder: Decoder
    spec: SwitchSpec
    targets: tuple[Target, ...]
    vocabulary: Vocabulary
    pre: str
    outtype: str
    io_configs: Mapping[str, str]  # adapter -> its io.yaml
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(target.nbytes for target in self.targets)


def prepare(model: str | PathLike[str], *, outtype: str = "", pre: str = "") -> Plan:
    """Plan an export without writing anything.

    Args:
        model: folder of a composed model, or of one in legacy format 2 or 3.
        outtype: one of `OUTTYPES`; the model's own dtype by default.
        pre: llama.cpp's name of the pre-tokenizer; detected by default.

    Raises:
        CheckpointError: the model cannot be exported; lists all reasons.
    """
    folder = Path(model)
    if outtype not in ("", *OUTTYPES):
        raise CheckpointError(f"outtype {outtype!r} is not one of {', '.join(OUTTYPES)}")
    config, spec, tensors = _read(folder)
    decoder, problems = read_decoder(config, spec.base_model_type)
    problems += [*_switch_problems(decoder, spec), *_tensor_problems(decoder, spec, tensors)]
    tokenizer = read_tokenizer(folder)
    if EMBEDDING in tensors and tensors[EMBEDDING].shape[:1] == (decoder.vocab_size,):
        words, more, warnings = vocabulary(tokenizer, decoder.vocab_size, spec, _end_tokens(folder, config))
        problems += more
    if problems:
        raise CheckpointError(f"{folder} cannot be exported to llama.cpp", problems=problems)
    outtype = outtype or _OWN[tensors[EMBEDDING].dtype]
    pre, doubt = _pre(folder, detect(tokenizer.data), pre)
    return Plan(
        decoder=decoder,
        spec=spec,
        targets=tuple(targets(decoder, spec, tensors, outtype)),
        vocabulary=words,
        pre=pre,
        outtype=outtype,
        io_configs=_io_configs(folder, spec),
        warnings=(*warnings, *doubt),
    )


def _read(folder: Path) -> tuple[dict[str, Any], SwitchSpec, Mapping[str, Tensor]]:
    """config.json, its `switch`, and the tensors under format 1's names; also for legacy formats."""
    config = read_config(inside(folder, "config.json"))
    if legacy.legacy_format(config):
        old = legacy.read(folder)
        if old.spec.hiding:
            raise CheckpointError(
                f"{folder} has legacy format 1, which hides control tokens; the GGUF export needs substitutes",
                hint=f"{legacy.UPGRADE}, then export NEW",
            )
        return dict(old.config), _with_technologies(folder, old.spec), old.tensors
    if config["model_type"] != MODEL_TYPE or "switch" not in config:
        raise CheckpointError(
            f"{folder} is not a composed model",
            hint="make one with granite-switch compose; to export plain Granite, use llama.cpp's convert_hf_to_gguf.py",
        )
    return config, SwitchSpec.from_dict(config["switch"]), Checkpoint(folder).tensors


def _with_technologies(folder: Path, spec: SwitchSpec) -> SwitchSpec:
    """Set each adapter's technology from adapter_index.json, which legacy configs do not contain."""
    kinds = {record.adapter_name: record.technology for record in read_adapter_index(folder).adapters}
    adapters = tuple(replace(a, technology=kinds.get(a.name) or a.technology) for a in spec.adapters)
    return replace(spec, adapters=adapters)


def _switch_problems(decoder: Decoder, spec: SwitchSpec) -> Iterator[str]:
    """Problems that the engine would not report, or only when it runs."""
    size, rank = decoder.vocab_size, max_rank(spec)
    if not spec.active:
        yield "it has no adapters; export the base with llama.cpp's convert_hf_to_gguf.py"
    if len(spec.active) > MOST_ADAPTERS or rank > MOST_RANK:
        most = f"llama.cpp supports at most {MOST_ADAPTERS} of rank {MOST_RANK}"
        yield f"{len(spec.active)} adapters of rank up to {rank}; {most}"
    for adapter in spec.active:
        for what, token in (("control token", adapter.token_id), ("substitute", adapter.substitute_token_id)):
            if not 0 <= token < size:
                yield f"{adapter.name}: {what} {token} is not in the vocabulary of {size}"


def _tensor_problems(decoder: Decoder, spec: SwitchSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    wanted, linears = expected(decoder, spec), decoder.linears()
    used = {name: t for name, t in tensors.items() if name in wanted or not (name == HEAD or name.endswith(_UNUSED))}
    problems = []
    for adapter in spec.active:
        elsewhere = [path for path in adapter.ranks if path not in linears]
        problems += [f"{adapter.name}: llama.cpp's architecture has no adapters on {path}" for path in elsewhere]
    shapes = {name: tensor.shape for name, tensor in used.items()}
    problems += shape_problems(shapes, wanted, "llama.cpp's architecture has no such tensor")
    dtypes = {name: tensor.dtype for name, tensor in used.items() if name in wanted and tensor.dtype not in _OWN}
    problems += [f"{name}: dtype {dtype}; only {', '.join(_OWN)} can be exported" for name, dtype in dtypes.items()]
    if decoder.tied and HEAD in tensors and not same(tensors[HEAD], tensors[EMBEDDING]):
        problems.append("tie_word_embeddings: config.json says true, but lm_head.weight differs from the embedding")
    return problems[:20]


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> list[int]:
    path = inside(folder, "generation_config.json")
    found = read(path, GenerationConfig).eos_token_id if path.is_file() else None
    found = config.get("eos_token_id") if found is None else found
    return found if isinstance(found, list) else [] if found is None else [found]


def _pre(folder: Path, detected: str | None, chosen: str) -> tuple[str, list[str]]:
    if chosen and chosen not in NAMES and chosen != detected:
        raise CheckpointError(f"--pre {chosen}: llama.cpp has no such pre-tokenizer", hint="one of " + ", ".join(NAMES))
    if not chosen and not detected:
        raise CheckpointError(
            f"{folder}: no pre-tokenizer of llama.cpp is known to split text as this tokenizer does",
            hint="pass --pre with the one that does: " + ", ".join(NAMES),
        )
    if chosen and detected and chosen != detected:
        return chosen, [f"--pre {chosen}: but the tokenizer splits text as {detected} does"]
    return chosen or str(detected), []


def _io_configs(folder: Path, spec: SwitchSpec) -> dict[str, str]:
    paths = {name: inside(folder, f"io_configs/{name}/io.yaml") for name in spec.names}
    return {name: read_text(path) if path.is_file() else "" for name, path in paths.items()}
