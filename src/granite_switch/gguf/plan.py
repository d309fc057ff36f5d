"""Read and check everything about an export before a byte is written.

What the engine does not check is checked here: src/models/granite-switch.cpp loads duplicate or unknown control tokens
without a word.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from granite_switch.core import legacy
from granite_switch.core.checkpoint import Checkpoint, Tensor, read_json
from granite_switch.core.layout import EMBEDDING, HEAD, widths
from granite_switch.core.spec import MODEL_TYPE, SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import CheckpointError
from granite_switch.gguf.pretokenizer import NAMES, detect
from granite_switch.gguf.tensors import TYPES, Target, expected, max_rank, targets
from granite_switch.gguf.vocabulary import Vocabulary, vocabulary

MOST_ADAPTERS = MOST_RANKS = 4096
OUTTYPES = tuple(TYPES)
_OWN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# transformers' GraniteConfig, for what a config.json leaves out
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Plan:
    """An export that can be written."""

    config: Mapping[str, Any]
    spec: SwitchSpec
    targets: tuple[Target, ...]
    vocabulary: Vocabulary
    pre: str
    outtype: str
    io_configs: Mapping[str, str]  # adapter -> its io.yaml
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(target.nbytes for target in self.targets)


def prepare(model: str | PathLike[str], *, outtype: str = "", pre: str = "") -> Plan:
    """Read and check everything, and write nothing.

    Args:
        model: folder of a composed model, also of an older generation that exchanges tokens.
        outtype: one of `OUTTYPES`; the model's own dtype by default.
        pre: llama.cpp's name of the pre-tokenizer; worked out by default.

    Raises:
        CheckpointError: with all that keeps the model from being exported.
    """
    folder = Path(model)
    if outtype not in ("", *OUTTYPES):
        raise CheckpointError(f"outtype {outtype!r} is none of {', '.join(OUTTYPES)}")
    config, spec, tensors = _read(folder)
    config = {**_DEFAULTS, **config}
    if problems := list(_pattern_problems(config, spec)):
        raise CheckpointError(f"{folder}: config.json contradicts itself", problems=problems)
    problems = [*_base_problems(config), *_switch_problems(config, spec), *_tensor_problems(config, spec, tensors)]
    tokenizer = read_tokenizer(folder)
    words, more, warnings = vocabulary(tokenizer, config["vocab_size"], spec, _end_tokens(folder, config))
    problems += more
    if problems:
        raise CheckpointError(f"{folder}: cannot be exported to llama.cpp", problems=problems)
    outtype = outtype or _OWN[tensors[EMBEDDING].dtype]
    pre, doubt = _pre(folder, detect(tokenizer.data), pre)
    return Plan(
        config=config,
        spec=spec,
        targets=tuple(targets(config, spec, tensors, outtype)),
        vocabulary=words,
        pre=pre,
        outtype=outtype,
        io_configs=_io_configs(folder, spec),
        warnings=(*warnings, *doubt),
    )


def _read(folder: Path) -> tuple[dict[str, Any], SwitchSpec, Mapping[str, Tensor]]:
    """config.json, its switch and the tensors under format 1's names; of older generations too."""
    config = read_json(folder / "config.json")
    if legacy.generation(config):
        old = legacy.read(folder)
        if old.spec.hiding:
            raise CheckpointError(
                f"{folder}: is of generation 1, which hides control tokens; llama.cpp exchanges them",
                hint=f"{legacy.UPGRADE}, and export NEW",
            )
        return dict(old.config), _with_technologies(folder, old.spec), old.tensors
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE or "switch" not in config:
        raise CheckpointError(
            f"{folder}: is not a composed model",
            hint="granite-switch compose makes one; llama.cpp's own convert_hf_to_gguf.py exports plain Granite",
        )
    return config, SwitchSpec.from_dict(config["switch"]), Checkpoint(folder).tensors


def _with_technologies(folder: Path, spec: SwitchSpec) -> SwitchSpec:
    """Older configs do not say which adapters are aLoRA; adapter_index.json does."""
    index = read_json(folder / "adapter_index.json") if (folder / "adapter_index.json").is_file() else {}
    kinds = {record.get("adapter_name"): record.get("technology") for record in index.get("adapters", ())}
    adapters = tuple(replace(a, technology=kinds.get(a.name) or a.technology) for a in spec.adapters)
    return replace(spec, adapters=adapters)


def _base_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What of the base `graniteswitch` cannot express."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"{key}: llama.cpp's architecture has no biases"
    if config["hidden_act"] != "silu":
        yield f"hidden_act {config['hidden_act']!r}: llama.cpp computes silu"
    if config.get("quantization_config"):
        yield "the base is quantised: compose from the base in full precision and choose --outtype q8_0"
    head = widths(config)["query"] // config["num_attention_heads"]
    if head % 2:
        yield f"head size {head} is odd"
    try:
        rope_scaling(config)
    except ValueError as error:
        yield f"rotary embeddings: {error}"


def _switch_problems(config: Mapping[str, Any], spec: SwitchSpec) -> Iterator[str]:
    """What the engine would load without a word, or fail on later."""
    size, rank = config["vocab_size"], max_rank(spec, config["num_hidden_layers"])
    if not spec.active:
        yield "it has no adapters: export the base itself with llama.cpp's convert_hf_to_gguf.py"
    if len(spec.active) > MOST_ADAPTERS or rank > MOST_RANKS:
        yield f"{len(spec.active)} adapters of rank up to {rank}; llama.cpp takes {MOST_ADAPTERS} of {MOST_RANKS}"
    ids = [adapter.token_id for adapter in spec.active]
    for adapter in spec.active:
        for what, token in (("control token", adapter.token_id), ("substitute", adapter.substitute_token_id)):
            if not 0 <= token < size:
                yield f"{adapter.name}: {what} {token} is not in the vocabulary of {size}"
        if ids.count(adapter.token_id) > 1:
            yield f"{adapter.name}: control token {adapter.token_id} belongs to another adapter too"


def _pattern_problems(config: Mapping[str, Any], spec: SwitchSpec) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    for adapter in spec.active:
        for what, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
            for name, values in pattern.items():
                if len(values) != layers:
                    yield f"{adapter.name}: {what} of {name} has {len(values)} entries for {layers} layers"


def _tensor_problems(config: Mapping[str, Any], spec: SwitchSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    wanted = expected(config, spec)
    problems = [f"{name}: missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name]:
            problems.append(f"{name}: {list(tensor.shape)}, where config.json says {list(wanted[name])}")
        elif name in wanted and tensor.dtype not in _OWN:
            problems.append(f"{name}: dtype {tensor.dtype}; {', '.join(_OWN)} can be exported")
        elif name not in wanted and name != HEAD:
            problems.append(f"{name}: llama.cpp's architecture has no such tensor")
    return problems[:20]


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> list[int]:
    path = folder / "generation_config.json"
    found = (read_json(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    return found if isinstance(found, list) else [] if found is None else [found]


def _pre(folder: Path, detected: str | None, chosen: str) -> tuple[str, list[str]]:
    if chosen and chosen not in NAMES:
        raise CheckpointError(f"--pre {chosen}: llama.cpp has no such pre-tokenizer", hint="one of " + ", ".join(NAMES))
    if not chosen and not detected:
        raise CheckpointError(
            f"{folder}: no pre-tokenizer of llama.cpp is known to split text as this tokenizer does",
            hint="say with --pre which one does, one of " + ", ".join(NAMES),
        )
    if chosen and detected and chosen != detected:
        return chosen, [f"--pre {chosen}: the tokenizer splits text as {detected} does"]
    return chosen or str(detected), []


def _io_configs(folder: Path, spec: SwitchSpec) -> dict[str, str]:
    paths = {name: folder / "io_configs" / name / "io.yaml" for name in spec.names}
    return {name: path.read_text(encoding="utf-8") if path.is_file() else "" for name, path in paths.items()}


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope.scaling.*` for a config's rotary embeddings, as transformers' modeling_rope_utils defines them.

    Raises:
        ValueError: llama.cpp cannot compute them in this architecture.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("only a part of each head is turned")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"type": "linear", "factor": float(rope["factor"])}
    if kind != "yarn":
        raise ValueError(f"type {kind!r} is not in llama.cpp's architecture")
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)) != (32, 1, True):
        raise ValueError("llama.cpp reads no beta_fast, beta_slow and truncate for yarn here")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
    usual, own = _mscale(factor), rope.get("attention_factor")
    if own is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        own = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    result = {"type": "yarn", "factor": factor, "original_context_length": original}
    return result if own is None else {**result, "attn_factor": own / usual}  # on top of yarn's own


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
