"""Read and write safetensors files as streams of bytes, without loading a model.

The `safetensors` package loads tensors; composing copies their bytes from file to file, appends rows, and reports what
is wrong with a damaged file. The format is 8 bytes of header length, a JSON header, and the data
(https://github.com/huggingface/safetensors).
"""

import copy
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from granite_switch.core.border import read, write_json
from granite_switch.core.files import copy_bytes, inside, sync_file
from granite_switch.core.records import ShardIndex
from granite_switch.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 8 << 20
PAGE = 4096  # bytes; loaders map weights into memory, and rows that cross a page boundary are slower to read

# bits per element; some types pack two to a byte
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class Tensor:
    """The location of a tensor's bytes in a file."""

    name: str
    dtype: str  # in safetensors' spelling: "BF16"
    shape: tuple[int, ...]
    path: Path
    start: int  # offset in the file, in bytes
    nbytes: int

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """Return the tensor's bytes, or a part of them."""
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            return file.read(self.nbytes - start if nbytes is None else nbytes)

    def row(self, index: int) -> bytes:
        """Return the bytes of one row of a matrix."""
        width = self.nbytes // self.shape[0]
        return self.read(index * width, width)

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values of a float32, float16 or bfloat16 tensor; float64 is rounded."""
        return to_float32(self.read(), self.dtype).reshape(self.shape)

    def named(self, name: str) -> "Tensor":
        """Return the same tensor under another name."""
        return replace(self, name=name)

    def __getitem__(self, index: tuple[int | slice, ...]) -> "Tensor":
        """Return a view without reading: leading indices, then a range of rows or the first columns of a matrix."""
        if not index or all(part == slice(None) for part in index):
            return self
        first, rest = index[0], index[1:]
        if 0 in self.shape:
            raise CheckpointError(f"{self.path}: {self.name} is empty: {list(self.shape)}")
        size = self.nbytes // self.shape[0]
        if isinstance(first, int):
            return replace(self, shape=self.shape[1:], start=self.start + first * size, nbytes=size)[rest]
        start, stop, _ = first.indices(self.shape[0])
        if not rest:
            shape = (stop - start, *self.shape[1:])
            return replace(self, shape=shape, start=self.start + start * size, nbytes=(stop - start) * size)
        columns = rest[0]
        if len(self.shape) != 2 or first != slice(None) or not isinstance(columns, slice) or columns.start:
            raise IndexError(f"{self.name}: {index} is not supported")
        width = len(range(self.shape[1])[columns])
        nbytes = self.nbytes // self.shape[1] * width
        return Columns(self.name, self.dtype, (self.shape[0], width), self.path, self.start, nbytes, self)


@dataclass(frozen=True)
class Columns(Tensor):
    """The first columns of a matrix in a file; their bytes are not contiguous."""

    whole: Tensor

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        rows, width = self.shape[0], self.nbytes // self.shape[0]
        data = np.frombuffer(self.whole.read(), np.uint8).reshape(rows, -1)[:, :width].tobytes()
        return data[start : None if nbytes is None else start + nbytes]


@dataclass(frozen=True)
class Entry:
    """A tensor to write, whose bytes come from files, from memory or from both."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Tensor | bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes if isinstance(part, Tensor) else len(part) for part in self.parts)


def copy_of(tensor: Tensor, name: str = "") -> Entry:
    """Return an entry with the same contents, under the same or another name."""
    return Entry(name or tensor.name, tensor.dtype, tensor.shape, (tensor,))


def to_float32(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Decode little-endian floats. numpy has no bfloat16, whose bits are the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).astype(np.float32)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata.

    Raises:
        CheckpointError: the file is missing, or the safetensors library would refuse it too: tensors overlap or leave
            gaps, the file is shorter or longer than its header says, the header is damaged or larger than 100 MB.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if length < 2 or 8 + length > size:
                raise CheckpointError(f"{path}: is not a safetensors file, or cut off ({size:,} bytes)", hint=_AGAIN)
            if length > _MAX_HEADER:
                raise CheckpointError(f"{path}: its header has {length:,} bytes; safetensors allows {_MAX_HEADER:,}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor(path, 8 + length, name, record) for name, record in header.items()}
        end = max((t.start + t.nbytes for t in tensors.values()), default=8 + length)
        if end != size:
            raise CheckpointError(f"{path}: has {size:,} bytes, but its header says {end:,}", hint=_AGAIN)
        with safe_open(path, framework="numpy"):  # checks the rest: overlaps, gaps, dtypes
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", hint=_AGAIN) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, SafetensorError) as error:
        raise CheckpointError(f"{path}: has a damaged safetensors header ({str(error)[:300]})", hint=_AGAIN) from None
    return tensors, metadata


_AGAIN = "download or copy it again"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's limit


def _tensor(path: Path, data: int, name: str, record: Mapping[str, Any]) -> Tensor:
    start, end = record["data_offsets"]
    shape = tuple(record["shape"])
    elements = math.prod(shape)
    if record["dtype"] not in _BITS or (elements * _BITS[record["dtype"]] + 7) // 8 != end - start:
        raise ValueError(f"{name}: {record['dtype']} {list(shape)} in {end - start} bytes")
    return Tensor(name, record["dtype"], shape, path, data + start, end - start)


def write(
    path: Path,
    entries: Iterable[Entry],
    on_bytes: Callable[[int], Any] | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    *,
    aligned: int = PAGE,
) -> None:
    """Write a safetensors file and flush it to disk. The same entries give the same bytes.

    Args:
        path: the file.
        entries: the tensors, in the order in which they are written.
        on_bytes: called with the number of bytes of each piece written, for progress.
        metadata: for the header. Some quantisers cannot read their tensors without theirs.
        aligned: alignment of the data section in bytes; the safetensors library uses 8.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted(metadata.items()))}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % aligned)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            for part in entry.parts:
                for count in _append(part, file):
                    if on_bytes:
                        on_bytes(count)
        sync_file(file)


def _append(part: Tensor | bytes, file: BinaryIO) -> Iterator[int]:
    """Write part of an entry, and yield the number of bytes of each piece."""
    if isinstance(part, Columns):
        part = part.read()
    if isinstance(part, bytes):
        yield file.write(part)
        return
    with part.path.open("rb") as source:
        for count in copy_bytes(source, file, part.start, part.nbytes):
            if not count:
                raise CheckpointError(f"{part.path}: ends inside {part.name}", hint=_AGAIN)
            yield count


class Checkpoint:
    """The tensors of a folder of safetensors files, by name.

    Args:
        folder: holds `model.safetensors.index.json` and its shards, or `model.safetensors`.

    Raises:
        CheckpointError: lists everything that is wrong with the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Tensor]] = {}
        problems = []
        listed = _listed(folder)
        for name in sorted(set(listed.values())) or [SINGLE]:
            try:
                self.files[name] = read_header(inside(folder, name))[0]
            except CheckpointError as error:
                problems.append(error.message)
        self.tensors: dict[str, Tensor] = {}
        for name, file in self.files.items():
            problems += [f"{key} is in {self.tensors[key].path.name} and in {name}" for key in file if key in self]
            self.tensors |= file
        for key, name in listed.items():
            if name in self.files and key not in self.files[name]:
                problems.append(f"{INDEX} maps {key} to {name}, which does not contain it")
        if problems:
            raise CheckpointError(f"{folder}: its weights are incomplete", problems=problems, hint=_AGAIN)

    def of(self, files: dict[str, dict[str, Tensor]]) -> "Checkpoint":
        """Return the same checkpoint with only these tensors."""
        result = copy.copy(self)
        result.files = files
        result.tensors = {key: tensor for file in files.values() for key, tensor in file.items()}
        return result

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: has no tensor {name}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _listed(folder: Path) -> Mapping[str, str]:
    """Return the file of each tensor from the index; empty if all tensors are in one file."""
    if (folder / SINGLE).is_file():  # as in transformers, the index counts only if this is absent
        return {}
    if (folder / INDEX).is_file():
        index = read(inside(folder, INDEX), ShardIndex, CheckpointError, _AGAIN)
        if index.weight_map:
            return index.weight_map
        raise CheckpointError(f"{folder / INDEX}: lists no tensors", hint=_AGAIN)
    raise CheckpointError(
        f"{folder}: has neither {SINGLE} nor {INDEX}",
        hint="weights must be safetensors; convert others with transformers' save_pretrained",
    )


def write_index(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the index of a folder's safetensors files."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})", hint=_AGAIN) from None
