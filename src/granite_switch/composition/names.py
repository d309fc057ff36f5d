"""Find the base's linear for the name of an adapter's tensor.

Trainers wrap models, and each wrapper adds its prefix to the names: PEFT, torch.compile, DDP, FSDP, checkpointing. The
rest is the path of a module in the trained model, whose outer parts differ between classes of the same decoder
(`model.layers`, `model.language_model.layers`, `layers`). A name is accepted if it matches exactly one linear.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from granite_switch.core.layout import at_layer

_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_OUTSIDE = re.compile(r"(?:(?:base_model\.model|_orig_mod|module|_fsdp_wrapped_module)\.)+")
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PEFT = "base_model.model."

# outer parts of a text decoder's path; those of other towers (`vision_tower`, `audio_encoder`) are not among them
_NEUTRAL = {"model", "base_model", "language_model", "transformer", "decoder", "text_model", "backbone"}


@dataclass(frozen=True)
class Name:
    """A parsed tensor name."""

    path: str  # of the module, without wrappers
    matrix: str  # "A" or "B"
    adapter: str  # as in the names of PEFT's `state_dict`: `lora_A.<adapter>.weight`
    prefix: str  # added by wrappers


def parse(name: str) -> Name | None:
    """Parse the name of a matrix of a low-rank update; None for any other tensor."""
    found = _KEY.fullmatch(name)
    if not found or found[3] == "bias":
        return None
    path, prefix = unwrap(found[1])
    return Name(path, found[2], found[3] or "", prefix)


def unwrap(name: str) -> tuple[str, str]:
    """Return a path without the prefixes that wrappers added, and those prefixes."""
    prefix = found[0] if (found := _OUTSIDE.match(name)) else ""
    rest = name.removeprefix(prefix)
    return _INSIDE.sub("", rest), prefix + "".join(dict.fromkeys(_INSIDE.findall(rest)))


class Linears:
    """Finds the base's linear for a path in an adapter.

    Args:
        linears: paths of the base's linears.
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
        """Return the linear with this path, or the only one that it can refer to; otherwise None."""
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
        """Whether a layer with another number has this linear."""
        return _without_numbers(path) in self._kinds or _without_numbers(".".join(_inner(path))) in self._kinds

    @property
    def stem(self) -> str:
        """The most common beginning of paths, up to the layer's number."""
        stems = [stem_of(path) for path in sorted(self.paths)]
        return max(dict.fromkeys(stems), key=stems.count, default="")


def stem_of(path: str) -> str:
    """Return a path up to its first number, `model.layers.`; the whole path if it has none."""
    return at_layer(path)[0] + "."


def _inner(path: str) -> list[str]:
    """Return a path's parts from the list of layers on; empty if the outer parts may be another tower's."""
    head, number, tail = at_layer(path)
    *outer, layers = head.split(".")
    return [layers, number, *tail.split(".")] if head and number and set(outer) <= _NEUTRAL else []


def _without_numbers(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def explain(paths: Mapping[str, Any], linears: Linears) -> str:
    """Explain why no tensor of an adapter fits: how its paths begin, and how the base's do."""
    stems = list(dict.fromkeys(stem_of(path) for path in paths))
    shown = ", ".join(repr(stem) for stem in stems[:3])
    return f"its modules begin with {shown}; this base's linears begin with {linears.stem!r}"
