"""Which linear of the base a tensor of an adapter belongs to.

Trainers wrap models, and each wrapper leaves its prefix on the names: PEFT, torch.compile, DDP, FSDP, checkpointing.
The rest is the path of a module in the model that was trained, whose outer parts differ between classes of one decoder
(`model.layers`, `model.language_model.layers`, `layers`). A name is taken where it can mean one linear only.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_OUTSIDE = re.compile(r"(?:(?:base_model\.model|_orig_mod|module|_fsdp_wrapped_module)\.)+")
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PEFT = "base_model.model."

# outer parts of a decoder's path that say nothing; other towers (`vision_tower`, `audio_encoder`) are none of them
_NEUTRAL = {"model", "base_model", "language_model", "transformer", "decoder", "text_model", "backbone"}


@dataclass(frozen=True)
class Name:
    """A tensor's name, taken apart."""

    path: str  # of the module, without wrappers
    matrix: str  # "A" or "B"
    adapter: str  # as PEFT's state has it: `lora_A.<adapter>.weight`
    prefix: str  # what wrappers put in front


def parse(name: str) -> Name | None:
    """A tensor's name as a matrix of a low-rank update; None if it is not one."""
    found = _KEY.fullmatch(name)
    if not found or found[3] == "bias":
        return None
    path, prefix = unwrap(found[1])
    return Name(path, found[2], found[3] or "", prefix)


def unwrap(name: str) -> tuple[str, str]:
    """A path without the prefixes of wrappers, and these."""
    prefix = found[0] if (found := _OUTSIDE.match(name)) else ""
    rest = name.removeprefix(prefix)
    return _INSIDE.sub("", rest), prefix + "".join(dict.fromkeys(_INSIDE.findall(rest)))


class Linears:
    """Finds a base's linear by the path that an adapter has for it.

    Args:
        linears: of the base, by path.
    """

    def __init__(self, linears: Iterable[str]) -> None:
        self.paths = frozenset(linears)
        self._inner: dict[str, list[str]] = {}
        self._short: dict[tuple[str, ...], list[str]] = {}
        self._kinds: set[str] = set()
        for path in self.paths:
            self._kinds.add(_without_numbers(path))
            if inner := _inner(path):
                self._inner.setdefault(".".join(inner), []).append(path)
                self._short.setdefault((*inner[:2], inner[-1]), []).append(path)
                self._kinds.add(_without_numbers(".".join(inner)))

    def find(self, path: str) -> str | None:
        """The linear of this path, or the only one that it can mean; None if there is none."""
        if path in self.paths:
            return path
        inner = _inner(path)
        if not inner:
            return None
        found = self._inner.get(".".join(inner), [])
        if not found and len(inner) == 3:  # `layers.N.gate_proj`, without its block
            found = self._short.get(tuple(inner), [])
        return found[0] if len(found) == 1 else None

    def in_another_layer(self, path: str) -> bool:
        """Whether a layer of another number has this linear."""
        return _without_numbers(path) in self._kinds or _without_numbers(".".join(_inner(path))) in self._kinds

    @property
    def stem(self) -> str:
        """What most paths begin with, up to the layer's number."""
        stems = [stem_of(path) for path in sorted(self.paths)]
        return max(dict.fromkeys(stems), key=stems.count, default="")


def stem_of(path: str) -> str:
    """A path up to its first number, `model.layers.`; all of it where it has none."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:at]) + "."


def _inner(path: str) -> list[str]:
    """A path's parts from the name of the list of layers on, if nothing outside tells it from another tower's."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return parts[at - 1 :] if at and set(parts[: at - 1]) <= _NEUTRAL else []


def _without_numbers(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def explain(paths: Mapping[str, Any], linears: Linears) -> str:
    """One line for an adapter of which no tensor fits: the prefix that the base does not have."""
    stems = list(dict.fromkeys(stem_of(path) for path in paths))
    shown = ", ".join(repr(stem) for stem in stems[:3])
    return f"its modules begin with {shown}; this base's linears begin with {linears.stem!r}"
