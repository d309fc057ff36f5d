"""Decide everything about a composed model before a byte is written.

Everything that can be refused is refused here: the plan of a composition that can succeed is what `write.py` carries
out and what `--dry-run` prints.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from granite_switch.compose import placement as place
from granite_switch.compose.adapters import Adapter, read_adapter
from granite_switch.compose.sources import Found
from granite_switch.compose.tokenizer import BaseTokenizer, extended, read_tokenizer
from granite_switch.core.chat import Placement, wrap
from granite_switch.core.checkpoint import Checkpoint, Tensor, read_json
from granite_switch.core.layout import GRANITE, MODEL_TYPES
from granite_switch.core.spec import ARCHITECTURE, BASE_TOKEN, MODEL_TYPE, AdapterSpec, SwitchSpec, control_token
from granite_switch.errors import AdapterError, BaseModelError, CheckpointError, SwitchError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Plan:
    """A composition that can be written."""

    base: Path
    base_config: Mapping[str, Any]
    checkpoint: Checkpoint
    tokenizer: BaseTokenizer
    tokenizer_data: Mapping[str, Any]  # tokenizer.json with the control tokens
    templates: Mapping[str, str]  # composed chat templates by name; empty if the base has none
    spec: SwitchSpec
    adapters: Mapping[str, Adapter]
    warnings: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return max(self.spec.control_slots) + 1

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the composed model."""
        head = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "vocab_size": self.vocab_size}
        base = {key: value for key, value in self.base_config.items() if key not in ("auto_map", "_name_or_path")}
        return {**base, **head, "switch": self.spec.to_dict()}

    @property
    def grown(self) -> dict[str, Tensor]:
        """The tensors that gain a row for each new token."""
        return {name: self.checkpoint[name] for name in (EMBEDDING, HEAD) if name in self.checkpoint}

    @property
    def adapter_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters.values())


def plan(
    base: Path, found: Sequence[Found], *, base_name: str, base_source: str = "", generatable: bool = False
) -> Plan:
    """Read the base and every adapter and work out the composed model.

    Args:
        base: the base model's folder.
        found: the adapters, in the order of their slots.
        base_name: how the base is called in the records.
        base_source: hub id or name under which it is recorded; `base_name` by default.
        generatable: let the model generate control tokens.

    Raises:
        BaseModelError, AdapterError: all that is wrong, at once for all adapters.
    """
    config = read_base_config(base)
    try:
        checkpoint = Checkpoint(base)
    except CheckpointError as error:
        raise BaseModelError(error.message, problems=error.problems, hint=error.hint) from None
    _check_base(base, config, checkpoint)
    tokenizer = read_tokenizer(base)
    adapters = _read_all(found, config)
    base_template = tokenizer.templates.get("default")
    warnings = []
    library = Tokenizer.from_str(json.dumps(tokenizer.data))
    if base_template is None:
        samples: list[place.Chat] = []
        text, opening_id = "", _first_token(config, tokenizer)
        warnings.append(
            f"{base}: there is no chat template; `adapter_name` needs one. Place control tokens by hand: "
            "a LoRA's first, an aLoRA's in the place of its invocation sequence's first token"
        )
    else:
        samples = place.chats(base_template, tokenizer.special_tokens)
        text, opening_id = place.opening(samples, library)
    first = max(tokenizer.size, checkpoint[EMBEDDING].shape[0], config["vocab_size"])
    spec = SwitchSpec(
        adapters=tuple(_spec(a, first + i, opening_id, library) for i, a in enumerate(adapters, 1)),
        base_token=BASE_TOKEN,
        base_token_id=first,
        base_substitute_token_id=opening_id,
        base_model=base_source or base_name,
        generatable=generatable,
    )
    data = extended(tokenizer, _new_tokens(spec, tokenizer))
    templates: dict[str, str] = {}
    if base_template is not None:
        library = Tokenizer.from_str(json.dumps(data))
        placements = [place.placement(adapter, text, library) for adapter in spec.active]
        place.prove(spec, placements, base_template, samples, library)
        templates = _wrap_all(tokenizer.templates, placements, spec)
    return Plan(
        base, config, checkpoint, tokenizer, data, templates, spec, {a.name: a for a in adapters}, tuple(warnings)
    )


def read_base_config(base: Path) -> dict[str, Any]:
    """The base's config.json, if it is of a family that can carry adapters."""
    try:
        config = read_json(base / "config.json")
    except CheckpointError as error:
        raise BaseModelError(error.message, hint="a base model's folder holds config.json") from None
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        kind = config.get("model_type") if isinstance(config, dict) else None
        hint = "a Granite base is needed"
        if kind == MODEL_TYPE:
            hint = "it is composed already; `granite-switch add` takes more adapters"
        raise BaseModelError(f"{base}: model_type {kind!r} cannot carry adapters", hint=hint)
    missing = [
        key
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        if not isinstance(config.get(key), int)
    ]
    if missing:
        raise BaseModelError(f"{base / 'config.json'}: lacks {', '.join(missing)}")
    return config


def _check_base(base: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """The projections that the adapters act on must be there, and the embedding must have rows to extend."""
    wanted = [f"model.layers.{i}.{row.path}.weight" for i in range(config["num_hidden_layers"]) for row in GRANITE]
    missing = [name for name in [EMBEDDING, *wanted] if name not in checkpoint]
    if missing:
        raise BaseModelError(f"{base}: its weights lack tensors of a Granite model", problems=missing[:20])
    for name in (EMBEDDING, HEAD):
        if name not in checkpoint:
            continue
        tensor = checkpoint[name]
        if len(tensor.shape) != 2 or tensor.shape[1] != config["hidden_size"]:
            raise BaseModelError(
                f"{base}: {name} is {tensor.dtype} {list(tensor.shape)}; control tokens need rows of "
                f"{config['hidden_size']} values",
                hint="quantise the base without its embedding and lm_head",
            )


def _read_all(found: Sequence[Found], config: Mapping[str, Any]) -> list[Adapter]:
    """Read every adapter; what is wrong with them is said of all at once."""
    adapters, errors = [], []
    for one in found:
        try:
            adapters.append(read_adapter(one, config))
        except SwitchError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [line for error in errors for line in (error.message, *(f"  {p}" for p in error.problems))]
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise AdapterError(f"{len(errors)} adapters cannot be composed", problems=problems, hint="; ".join(hints))
    return adapters


def _first_token(config: Mapping[str, Any], tokenizer: BaseTokenizer) -> int:
    """Without a template, the token that opens a prompt is the beginning-of-sequence token, or the end's."""
    for key in ("bos_token", "eos_token"):
        if text := tokenizer.special_tokens.get(key):
            return tokenizer.tokens[text]
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return 0


def _spec(adapter: Adapter, token_id: int, opening_id: int, tokenizer: Tokenizer) -> AdapterSpec:
    invocation = adapter.invocation_tokens
    return AdapterSpec(
        name=adapter.name,
        technology="alora" if invocation else "lora",
        token=control_token(adapter.name),
        token_id=token_id,
        substitute_token_id=invocation[0] if invocation else opening_id,
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
        invocation_tokens=invocation,
        invocation_text=tokenizer.decode(list(invocation), skip_special_tokens=False),
        source=adapter.source,
        sha256=adapter.sha256,
    )


def _new_tokens(spec: SwitchSpec, tokenizer: BaseTokenizer) -> dict[str, int]:
    tokens = {spec.base_token: spec.base_token_id, **{a.token: a.token_id for a in spec.adapters}}
    known = tokenizer.tokens
    taken = [f"{text} is token {known[text]}" for text in tokens if text in known]
    if taken:
        raise AdapterError(
            "the tokenizer already has a control token's text",
            problems=taken,
            hint="give the adapter another name in a YAML manifest",
        )
    return tokens


def _wrap_all(templates: Mapping[str, str], placements: Sequence[Placement], spec: SwitchSpec) -> dict[str, str]:
    return {name: wrap(template, placements, place.controls(spec)) for name, template in templates.items()}
