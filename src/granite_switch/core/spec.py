"""The `switch` object of config.json: a checkpoint's adapters, and the tokens that switch to them.

The records are frozen and have one reader and one writer. docs/format.md is normative.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from granite_switch.core.border import LIMIT, Count, Name, Natural, Number, TokenId, explained, shown
from granite_switch.core.layout import AdapterTensor, fold, unfold
from granite_switch.core.lora import scaling
from granite_switch.errors import CheckpointError

FORMAT_VERSION = 1
MODEL_TYPE = "granite_switch"
BASE_TOKEN = "<|return_to_base|>"
_SUFFIXES = (
    "PreTrainedModel",
    "ForCausalLM",
    "ForConditionalGeneration",
    "LMHeadModel",
    "TextModel",
    "Model",
    "Config",
)
_BaseToken = Annotated[int, Field(ge=-1, lt=LIMIT)]  # -1 in legacy formats that have no such token
_Rows = Annotated[int, Field(ge=0, lt=65536)]
_Group = Annotated[int, Field(ge=0, lt=62)]  # index in `Hiding.groups`


def architecture(base: str) -> str:
    """Return the class name of a base's switch model: `Qwen3SwitchForCausalLM` for `Qwen3ForCausalLM`."""
    suffix = next((one for one in _SUFFIXES if base.endswith(one)), "")
    return f"{base.removesuffix(suffix)}Switch{suffix}"


def control_token(name: str) -> str:
    """Return the text of an adapter's control token."""
    return f"<|{name}|>"


class _Part:
    """The rules by which `SwitchSpec.from_dict` reads the JSON of a dataclass; its constructor checks nothing."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class AdapterSpec(_Part):
    """One adapter of a checkpoint. Its slot is its position in `SwitchSpec.adapters`, counted from 1."""

    name: Name
    technology: Literal["lora", "alora"]
    token: str
    token_id: TokenId
    substitute_token_id: TokenId
    rank: Natural
    alpha: Annotated[int | float, Field(ge=0, lt=LIMIT, allow_inf_nan=False)]
    targets: tuple[str, ...]  # paths of the linears that it updates
    use_rslora: bool = False
    rank_pattern: Mapping[str, Count] = field(default_factory=dict)  # linear -> rank, if it is not `rank`
    alpha_pattern: Mapping[str, Number] = field(default_factory=dict)
    invocation_tokens: tuple[TokenId, ...] = ()
    invocation_text: str = ""
    invocation_placement: Literal["", "prefix", "suffix"] = ""  # where the template writes a missing invocation text
    source: str = ""
    sha256: str = ""  # of the source's adapter_model.safetensors
    digest: str = ""  # of the tensors, independent of the file (`layout.digest`)
    warnings: tuple[str, ...] = ()  # given by compose
    retired: bool = False  # removed from the model; its slot and token stay reserved

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Linear -> rank of this adapter's update; empty if it is retired."""
        return {} if self.retired else {path: self.rank_pattern.get(path, self.rank) for path in self.targets}

    @property
    def modules(self) -> tuple[str, ...]:
        """The last parts of the linears' paths, each once: `q_proj`."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path in self.targets))

    def scale_of(self, linear: str) -> float:
        """Return the factor on B A for one linear."""
        return scaling(self.alpha_pattern.get(linear, self.alpha), self.ranks[linear], self.use_rslora)

    def tensors(self, shapes: Mapping[str, tuple[int, int]]) -> dict[AdapterTensor, tuple[int, int]]:
        """Return every tensor of the adapter with its shape.

        Args:
            shapes: (out, in) of each linear; missing linears are skipped.
        """
        result: dict[AdapterTensor, tuple[int, int]] = {}
        for linear, rank in self.ranks.items():
            if linear in shapes:
                out, width = shapes[linear]
                result[AdapterTensor(self.name, linear, "A")] = (rank, width)
                result[AdapterTensor(self.name, linear, "B")] = (out, rank)
        return result


@dataclass(frozen=True)
class Hiding(_Part):
    """Legacy format 1: control tokens stay in the sequence, hidden from attention by group."""

    groups: tuple[tuple[TokenId, ...], ...]  # ids of the control tokens in each group
    policy: tuple[tuple[_Group, ...], ...]  # for each slot, the base first: the groups hidden from it


@dataclass(frozen=True)
class SwitchSpec(_Part):
    """Everything that a backend needs to know about a checkpoint's adapters."""

    adapters: tuple[AdapterSpec, ...]
    base_token: str
    base_token_id: _BaseToken
    base_substitute_token_id: _BaseToken
    base_model: str = ""
    base_commit: str = ""  # of the hub repository, if the base came from one
    base_model_type: str = "granite"  # of the base's config.json
    base_architecture: str = "GraniteForCausalLM"
    generatable: bool = False
    reserved: _Rows = 0  # spare embedding rows after the last control token, reserved for adapters added later
    format_version: int = FORMAT_VERSION
    hiding: Hiding | None = None  # if set, control tokens are hidden instead of substituted

    @property
    def active(self) -> tuple[AdapterSpec, ...]:
        """The adapters that are not retired."""
        return tuple(adapter for adapter in self.adapters if not adapter.retired)

    @property
    def control_slots(self) -> dict[int, int]:
        """Control token id -> slot. A retired adapter's token returns to the base."""
        slots = {a.token_id: 0 if a.retired else i for i, a in enumerate(self.adapters, 1)}
        return slots if self.base_token_id < 0 else {self.base_token_id: 0, **slots}

    @property
    def substitutes(self) -> dict[int, int]:
        """Control token id -> id of the token that the decoder embeds in its place."""
        if self.hiding:
            return {token: token for token in self.control_slots}
        substitutes = {a.token_id: a.substitute_token_id for a in self.adapters}
        if self.base_token_id < 0:
            return substitutes
        return {self.base_token_id: self.base_substitute_token_id, **substitutes}

    @property
    def rows(self) -> int:
        """The number of embedding rows up to the last control token, plus the reserved ones."""
        return max(self.control_slots) + 1 + self.reserved

    @property
    def copied_rows(self) -> tuple[int, ...]:
        """For each embedding row from the first control token on, the token whose row it copies.

        Reserved rows copy the token that opens a turn, as most control tokens do, so that adding an adapter usually
        changes no row.
        """
        substitutes, first = self.substitutes, min(self.control_slots)
        return tuple(substitutes.get(i, self.base_substitute_token_id) for i in range(first, self.rows))

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Token ids that must not be generated: reserved ones and, unless `generatable`, control tokens."""
        reserve = range(self.rows - self.reserved, self.rows) if self.reserved else ()
        return (*(() if self.generatable else sorted(self.control_slots)), *reserve)

    def slot(self, name: str) -> int:
        """Return the slot of an active adapter; 0 for "base"."""
        if name == "base":
            return 0
        for index, adapter in enumerate(self.adapters, 1):
            if adapter.name == name and not adapter.retired:
                return index
        raise CheckpointError(f"there is no adapter {name!r}", hint=f"adapters: {', '.join(self.names)}")

    def adapter(self, name: str) -> AdapterSpec:
        return self.adapters[self.slot(name) - 1]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.active)

    def to_dict(self) -> dict[str, Any]:
        """Return the `switch` object of config.json; adapters are written without default values."""
        head = _JSON.dump_python(replace(self, adapters=()), mode="json", exclude={"adapters"}, exclude_none=True)
        folded = replace(self, adapters=tuple(_with_paths(a, fold) for a in self.adapters))
        return {**head, **_JSON.dump_python(folded, mode="json", include={"adapters"}, exclude_defaults=True)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SwitchSpec":
        """Read the `switch` object of config.json.

        Raises:
            CheckpointError: the format is newer, or keys are unknown, missing or contradictory.
        """
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int) or version < 1 or version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format {shown(version)}; this release reads format {FORMAT_VERSION}",
                hint="pip install --upgrade granite-switch",
            )
        with explained("config.json: switch"):
            spec = _JSON.validate_json(json.dumps(data))
        try:
            spec = replace(spec, adapters=tuple(_with_paths(a, unfold) for a in spec.adapters))
        except ValueError as error:
            raise CheckpointError(f"config.json: switch: targets cannot be read ({shown(str(error))})") from None
        spec._check()
        return spec

    def _check(self) -> None:
        problems = []
        names = [adapter.name for adapter in self.active]
        problems += [f"two adapters are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
        ids = [self.base_token_id, *(adapter.token_id for adapter in self.adapters)]
        problems += [f"token id {i} switches to two slots" for i in sorted({i for i in ids if ids.count(i) > 1})]
        controls = set(self.control_slots)
        for name, substitute in [
            ("base", self.base_substitute_token_id),
            *((a.name, a.substitute_token_id) for a in self.adapters),
        ]:
            if substitute in controls and not self.hiding:
                problems.append(f"{name}: its substitute {substitute} is itself a control token")
        for adapter in self.adapters:
            elsewhere = sorted({*adapter.rank_pattern, *adapter.alpha_pattern} - set(adapter.targets))
            problems += [f"{adapter.name}: {linear!r} has a pattern but is not a target" for linear in elsewhere[:10]]
            if not adapter.retired and not (adapter.rank and adapter.alpha):
                problems.append(f"{adapter.name}: rank {adapter.rank} and alpha {adapter.alpha} must be positive")
        problems += self._token_problems() if controls else []
        if problems:
            raise CheckpointError("config.json: `switch` contradicts itself", problems=problems)

    def _token_problems(self) -> list[str]:
        """Check that control tokens are close together, and that substitutes and invocations are in the vocabulary."""
        first, last = min(self.control_slots), max(self.control_slots)
        if last - first > len(self.control_slots) + 65536:
            return [f"the control tokens' ids, {first} to {last}, are far apart"]
        named = [(a.name, i) for a in self.adapters for i in (a.substitute_token_id, *a.invocation_tokens)]
        named += [("base", self.base_substitute_token_id)] if self.base_token_id >= 0 else []
        return [f"{name}: token {i} is not in the vocabulary of {self.rows}" for name, i in named if i >= self.rows]


_JSON = TypeAdapter(SwitchSpec)


def _with_paths(adapter: AdapterSpec, rewrite: Callable[[Mapping[str, Any]], dict[str, Any]]) -> AdapterSpec:
    """Return a record whose linears' paths are folded or unfolded."""
    return replace(
        adapter,
        targets=tuple(rewrite(dict.fromkeys(adapter.targets))),
        rank_pattern=rewrite(adapter.rank_pattern),
        alpha_pattern=rewrite(adapter.alpha_pattern),
    )
