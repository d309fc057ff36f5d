"""Names of tensors: an adapter's follow from the linear that it updates, the vocabulary's are found by their rows.

A linear is identified by its module's path in the base's files (`model.layers.3.self_attn.q_proj`). The module with the
adapters' A and B is registered beside it, under that path plus `_lora`. Nothing here depends on a model family.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

from granite_switch.core.checkpoint import Tensor
from granite_switch.core.records import LAYER_COUNTS

EMBEDDINGS = "embeddings.safetensors"  # the file of the tensors that gain a row for each control token
SUFFIX = "_lora"  # appended to a linear's path: the module with its adapters' A and B

_KEY = re.compile(rf"(.+){SUFFIX}\.([^.]+)-([AB])")
_HEADS = ("lm_head", "embed_out", "output", "head")
_INDICES = re.compile(r"\[([\d,-]+)\]")

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterTensor:
    """A or B of one adapter for one linear."""

    adapter: str
    linear: str  # the path of the linear's module
    matrix: str  # "A" or "B"

    @property
    def parameter(self) -> str:
        """The parameter's name in its module. It cannot contain dots, so they are written `%2E`."""
        return f"{escape(self.adapter)}-{self.matrix}"

    @property
    def key(self) -> str:
        """The tensor's name in the checkpoint, which is its `state_dict` name."""
        return f"{self.linear}{SUFFIX}.{self.parameter}"

    def order(self) -> tuple[tuple[tuple[int, str], ...], str]:
        """Return the sort key for the tensors in an adapter's file."""
        return natural(self.linear), self.matrix


def adapter_file(adapter: str) -> str:
    """Return the name of the file with an adapter's tensors."""
    return f"adapter-{adapter}.safetensors"


def io_config(adapter: str) -> str:
    """Return the path of an adapter's io.yaml in a composed model."""
    return f"io_configs/{adapter}/io.yaml"


def parse_key(key: str) -> AdapterTensor | None:
    """Return the adapter tensor that a checkpoint's tensor name stands for; None for a tensor of the base."""
    found = _KEY.fullmatch(key)
    return AdapterTensor(unescape(found[2]), found[1], found[3]) if found else None


def by_adapter(tensors: Mapping[str, Tensor]) -> dict[str, dict[AdapterTensor, Tensor]]:
    """Return each adapter's tensors, given all tensors of a checkpoint; their keys leave out the adapter's name."""
    result: dict[str, dict[AdapterTensor, Tensor]] = {}
    for name, tensor in tensors.items():
        if key := parse_key(name):
            result.setdefault(key.adapter, {})[replace(key, adapter="")] = tensor
    return result


def digest(tensors: Mapping[AdapterTensor, Tensor]) -> str:
    """Return the SHA-256 of an adapter's tensors, independent of file, adapter name and order (docs/format.md)."""
    result = hashlib.sha256()
    for key in sorted(tensors, key=AdapterTensor.order):
        tensor = tensors[key]
        result.update(f"{key.linear} {key.matrix} {tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.read())
    return result.hexdigest()


def escape(adapter: str) -> str:
    """Escape an adapter's name for a tensor's name, in which dots separate parts."""
    return adapter.replace("%", "%25").replace(".", "%2E")


def unescape(adapter: str) -> str:
    """Invert `escape`."""
    return adapter.replace("%2E", ".").replace("%25", "%")


def natural(path: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in path.split("."))


@dataclass(frozen=True)
class Vocabulary:
    """Names of the tensors with one row for each token."""

    embedding: str
    head: str | None  # None: tied, or not in these files
    bias: str | None = None  # the head's

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.embedding, self.head, self.bias) if name)


def vocabulary(tensors: Mapping[str, Tensor], rows: int) -> Vocabulary | None:
    """Return the names of a model's token embedding, untied head and its bias; None unless one embedding is found.

    Args:
        tensors: all tensors of the model, by name.
        rows: the vocabulary size.
    """
    every = [name for name in tensors if not parse_key(name) and not at_layer(name)[1]]
    outside = [name for name in every if len(tensors[name].shape) == 2]
    heads = [name for name in outside if name.endswith(".weight") and name.split(".")[-2] in _HEADS]
    found = [name for name in outside if name not in heads and tensors[name].shape[0] == rows]
    named = [name for name in outside if name.split(".")[-2:] == ["embed_tokens", "weight"]]
    candidates = named if len(named) == 1 else found
    if len(candidates) != 1 or len(heads) > 1:
        return None
    biases = [name for name in every if name.endswith(".bias") and tensors[name].shape == (rows,)]
    if len(biases) > 1 or tensors[candidates[0]].shape[-1] == rows:  # of a norm, perhaps
        biases = [name for name in biases if name.split(".")[-2] in _HEADS]
    return Vocabulary(candidates[0], heads[0] if heads else None, biases[0] if biases else None)


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text decoder's part of a config.json: `text_config` if the decoder is one of several models."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "vocab_size" in inner else config


def layer_count(config: Mapping[str, Any]) -> int:
    """Return the number of layers that a decoder's part of a config.json gives."""
    return int(next(config[name] for name in LAYER_COUNTS if name in config))


def at_layer(path: str) -> tuple[str, str, str]:
    """Split a path at its first number: `model.layers`, `3`, `mlp.up_proj`. Without one: the path, "" and ""."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:at]), "".join(parts[at : at + 1]), ".".join(parts[at + 1 :])


def fold(values: Mapping[str, T]) -> dict[str, T]:
    """Join paths that differ in their first number only and have equal values: `model.layers.[0-3,5].mlp.up_proj`."""
    groups: dict[tuple[str, str, T], list[int]] = {}
    for path, value in values.items():
        head, number, tail = at_layer(path)
        groups.setdefault((head, tail, value), []).extend([int(number)] if number else [])
    return {
        head if not indices else f"{head}.{_ranges(indices)}{tail and '.'}{tail}": value
        for (head, tail, value), indices in groups.items()
    }


def unfold(values: Mapping[str, T]) -> dict[str, T]:
    """Invert `fold`, in the natural order of paths.

    Raises:
        ValueError: a range is malformed or too large.
    """
    result: dict[str, T] = {}
    for path, value in values.items():
        found = _INDICES.search(path)
        indices: Iterable[str] = map(str, _indices(found[1])) if found else [""]
        for index in indices:
            result[path.replace(found[0], index, 1) if found else path] = value
    if far := next((path for path in result if any(p.isdecimal() and len(p) > 5 for p in path.split("."))), ""):
        raise ValueError(f"{far[:100]} is not a linear of a layer")
    return dict(sorted(result.items(), key=lambda item: natural(item[0])))


def _ranges(indices: Iterable[int]) -> str:
    runs = [list(run) for _, run in groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0])]
    edges = [(run[0][1], run[-1][1]) for run in runs]
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in edges)
    return text if text.isdecimal() else f"[{text}]"


def _indices(text: str) -> list[int]:
    result: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) - int(first) + len(result) > 10_000:
            raise ValueError("more than 10,000 layers")
        result.extend(range(int(first), int(last or first) + 1))
    return result
