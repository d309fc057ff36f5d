"""Decide everything about a composed model before anything is written.

Everything that can be refused is refused here. `write.py` carries the plan out, `--dry-run` prints it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from granite_switch.composition import placement as place
from granite_switch.composition.adapters import UNSET, Adapter, other_base, read_adapter, read_retired
from granite_switch.composition.base import Base, resized
from granite_switch.composition.reading import UNREGISTERED
from granite_switch.composition.sources import Found
from granite_switch.composition.tokenizer import extended
from granite_switch.core.checkpoint import Checkpoint, Tensor
from granite_switch.core.remote import AUTO_MAP
from granite_switch.core.spec import BASE_TOKEN, MODEL_TYPE, AdapterSpec, SwitchSpec, architecture, control_token
from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.errors import AdapterError, SwitchError

_ROWS = 64  # the vocabulary size is a multiple of this, for tensor cores and tensor parallelism; the rest is reserved


@dataclass(frozen=True)
class Plan:
    """A composed model that can be written."""

    base: Base
    slots: tuple[Adapter, ...]
    spec: SwitchSpec
    tokenizer_data: Mapping[str, Any]  # tokenizer.json with the control tokens
    templates: Mapping[str, str]  # composed chat templates by name; empty if the base has none
    create_io_yaml: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()  # where sources were read differently from what they say, or left out

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base.checkpoint

    @property
    def adapters(self) -> dict[str, Adapter]:
        return {slot.name: slot for slot in self.slots if not slot.spec.retired}

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the composed model."""
        head = {"architectures": [architecture(self.base.architecture)], "model_type": MODEL_TYPE}
        base = {key: value for key, value in self.base.config.items() if key not in ("auto_map", "_name_or_path")}
        return {**resized(base, self.spec.rows), **head, **UNREGISTERED, **AUTO_MAP, "switch": self.spec.to_dict()}

    @property
    def grown(self) -> dict[str, Tensor]:
        """The tensors that get a row for each new token."""
        return {name: self.checkpoint[name] for name in self.base.vocabulary.names}

    @property
    def adapter_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the base's with its new rows, and the adapters'."""
        new_rows = sum(t.nbytes // t.shape[0] * (self.spec.rows - t.shape[0]) for t in self.grown.values())
        return self.checkpoint.nbytes + self.adapter_bytes + new_rows


def assemble(
    base: Base,
    slots: Sequence[Adapter],
    *,
    base_model: str = "",
    base_commit: str = "",
    generatable: bool = False,
    kept: SwitchSpec | None = None,
    create_io_yaml: bool = False,
) -> Plan:
    """Plan the composed model from a base and adapters that have been read.

    Args:
        base: the base model.
        slots: the adapters, in the order of their slots.
        base_model: the base's hub id or name in the records.
        base_commit: the base's commit, if it came from the hub.
        generatable: let the model generate control tokens.
        kept: the `switch` object of the model that is being changed, which gives the three above and the tokens' ids.
        create_io_yaml: write a minimal io.yaml for adapters without one.
    """
    slots = [_with_base_warning(slot, kept.base_model if kept else base_model) for slot in slots]
    fresh = [slot for slot in slots if not slot.file]
    library = base.tokenizer.library
    template = base.tokenizer.templates.get("default")
    warnings = [f"{slot.name}: {warning}" for slot in fresh for warning in slot.spec.warnings]
    warnings += [] if kept else _base_warnings(base)
    if template is None:
        samples: list[place.Chat] = []
        first_token = turn_token = place.Token("", _first_token(base.config, base.tokenizer))
        warnings.append(
            f"{base.folder}: has no chat template, which `adapter_name` needs. Place control tokens by hand: a "
            "LoRA's at the beginning, an aLoRA's instead of the first token of its invocation sequence"
        )
    else:
        samples = place.chats(template, base.tokenizer.special_tokens)
        first_token, turn_token = place.opening(samples, library), place.turn(template, samples, library)
    head = kept or SwitchSpec(
        adapters=(),
        base_token=BASE_TOKEN,
        base_token_id=base.size,
        base_substitute_token_id=turn_token.id,
        base_model=base_model,
        base_commit=base_commit,
        base_model_type=base.config["model_type"],
        base_architecture=base.architecture,
        generatable=generatable,
    )
    opening_id = head.base_substitute_token_id if template is None else first_token.id
    spec = replace(head, adapters=_records(slots, head, opening_id, library), reserved=0)
    spec = replace(spec, reserved=-spec.rows % _ROWS)
    data = extended(base.tokenizer, _new_tokens(spec, base.tokenizer), spec.rows)
    templates: dict[str, str] = {}
    if template is not None:
        library = Tokenizer.from_str(json.dumps(data))
        placements = [place.placement(adapter, first_token.text, library) for adapter in spec.active]
        templates = place.templates(base.tokenizer.templates, spec, placements, library)
        place.prove(spec, placements, templates["default"], template, samples, library)
    notes = tuple(f"{slot.name}: {note}" for slot in fresh for note in slot.notes)
    return Plan(base, tuple(slots), spec, data, templates, create_io_yaml, tuple(warnings), notes)


def _base_warnings(base: Base) -> list[str]:
    warnings = []
    if base.lacks_norms:
        warnings.append(f"{base.folder}: has no weights of norms. If its norms have weights, they were lost")
    if (beyond := base.tokenizer.size - base.checkpoint[base.vocabulary.embedding].shape[0]) > 0:
        warnings.append(
            f"{base.folder}: the last {beyond} tokens of its tokenizer have no row in its embedding. They gain zeros, "
            "and the composed model can generate them; resize the base's embedding to choose their rows"
        )
    return warnings


def _with_base_warning(slot: Adapter, base_model: str) -> Adapter:
    """Add a warning to a new adapter that was trained on another base."""
    if slot.file or not (warning := other_base(slot.made_for, base_model)):
        return slot
    return replace(slot, spec=replace(slot.spec, warnings=(warning, *slot.spec.warnings)), made_for="")


def read_slots(found: Sequence[Found], base: Base) -> list[Adapter]:
    """Read every adapter.

    Raises:
        AdapterError: lists the problems of all adapters.
    """
    slots: list[Adapter] = []
    errors = []
    for one in found:
        try:
            slots.append(read_adapter(one, base) if not one.retired else read_retired(one, base))
        except SwitchError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [line for error in errors for line in (error.message, *(f"  {p}" for p in error.problems))]
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise AdapterError(f"{len(errors)} adapters cannot be composed", problems=problems, hint="; ".join(hints))
    return slots


def _first_token(config: Mapping[str, Any], tokenizer: BaseTokenizer) -> int:
    """Return the token that opens a prompt without a template: beginning-of-sequence, else end-of-sequence."""
    for key in ("bos_token", "eos_token"):
        if (text := tokenizer.special_tokens.get(key)) in tokenizer.tokens:
            return tokenizer.tokens[text]
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return 0


def _records(
    slots: Sequence[Adapter], head: SwitchSpec, opening_id: int, tokenizer: Tokenizer
) -> tuple[AdapterSpec, ...]:
    """Return the slots' records. The slots of `head` keep their tokens; new ones get the next id and an unused text."""
    known, fresh = head.adapters, max(head.control_slots) + 1
    taken = {BASE_TOKEN, *(old.token for old in known)}
    records = []
    for index, slot in enumerate(slots):
        old = known[index] if index < len(known) else None
        token_id = old.token_id if old else fresh + index - len(known)
        token = old.token if old and old.name == slot.name else _free_text(slot.name, taken)
        taken.add(token)
        records.append(_record(slot, token, token_id, opening_id, tokenizer))
    return tuple(records)


def _free_text(name: str, taken: set[str]) -> str:
    """Return an unused text for an adapter's control token, with a number if a removed adapter has the plain one."""
    token, number = control_token(name), 2
    while token in taken:
        token, number = control_token(f"{name}:{number}"), number + 1
    return token


def _record(slot: Adapter, token: str, token_id: int, opening_id: int, tokenizer: Tokenizer) -> AdapterSpec:
    spec = replace(slot.spec, token=token, token_id=token_id)
    if spec.retired:
        return replace(spec, substitute_token_id=opening_id) if spec.substitute_token_id == UNSET else spec
    invocation = spec.invocation_tokens
    return replace(
        spec,
        technology="alora" if invocation else "lora",
        substitute_token_id=invocation[0] if invocation else opening_id,
        invocation_text=tokenizer.decode(list(invocation), skip_special_tokens=False),
    )


def _new_tokens(spec: SwitchSpec, tokenizer: BaseTokenizer) -> dict[str, int]:
    tokens = {spec.base_token: spec.base_token_id, **{a.token: a.token_id for a in spec.adapters}}
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    known = tokenizer.tokens
    taken = [f"{text} is token {known[text]}" for text in tokens if text in known]
    if taken:
        raise AdapterError(
            "the tokenizer already has a control token's text",
            problems=taken,
            hint="give the adapter another name in a YAML manifest",
        )
    return tokens
