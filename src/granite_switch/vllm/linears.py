"""Find the linears that adapters update in vLLM's model, by their paths in the base's files.

vLLM renames modules (`hf_to_vllm_mapper`) and packs several linears into one (`packed_modules_mapping`). Both tables
are read from the model's class, so nothing here names a model family.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.model_executor.utils import get_packed_modules_mapping

from granite_switch.errors import ServingError


@dataclass(frozen=True)
class Place:
    """One of the base's linears in vLLM's model."""

    module: str  # the path of vLLM's linear
    members: tuple[str, ...]  # names of the linears that it packs, without their parents: `q_proj`
    index: int  # of this linear among the members
    shape: tuple[int, int]  # (out, in) of this linear, unsharded


@dataclass(frozen=True)
class Edges:
    """The first column and the first row of a linear's weight in the base's files."""

    kind: str  # the weight's name in its linear
    column: Tensor
    row: Tensor

    @classmethod
    def of(cls, kind: str, weight: Tensor) -> "Edges":
        return cls(kind, weight[:, 0].clone(), weight[0].clone())

    def kept(self, linear: Any, place: Place) -> bool:
        """Whether vLLM's linear has the weight in the files' order, as far as this process can tell.

        A loader that reorders or scales a weight would have to do the same with adapters.
        """
        weight = getattr(linear, self.kind, None)
        if not isinstance(weight, Tensor) or weight.is_meta or getattr(linear, "tp_rank", 0) != 0:
            return True
        if weight.dtype != self.row.dtype and not (weight.dtype.itemsize > 1 and weight.is_floating_point()):
            return True  # quantised while being loaded
        # a merged linear that the files have whole is cut in several places if it is sharded
        whole = len(place.members) == 1 and linear.tp_size == 1
        sizes: Any = [len(weight)] if whole else getattr(linear, "output_partition_sizes", [len(weight)])
        start = sum(sizes[: place.index])
        part = weight[start : start + sizes[place.index]]
        pairs = (part[:, 0], self.column[: len(part)]), (part[0], self.row[: part.size(1)])
        return all(torch.equal(ours.float(), theirs.to(ours).float()) for ours, theirs in pairs)


def find(model: nn.Module, paths: Iterable[str]) -> dict[str, Place]:
    """Path -> place of each linear, without those on other pipeline ranks.

    Args:
        model: vLLM's model.
        paths: the linears' paths in the base's files.

    Raises:
        ServingError: the model lacks linears, or shards them in a way that LoRA layers do not support; lists them.
    """
    finder, problems = _Finder(model), []
    result: dict[str, Place] = {}
    for path in paths:
        try:
            place = finder.find(path)
        except LookupError as error:
            problems.append(error.args[0])
        else:
            result |= {path: place} if place else {}
    if problems:
        raise ServingError("vLLM's model lacks linears that adapters update", problems=problems[:20])
    return result


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.packed = get_packed_modules_mapping(model)
        mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
        # in releases that have it, the mapper without packing, which keeps the names of the packed linears
        self.mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper

    def find(self, path: str) -> Place | None:
        """The place of a linear; None if its layer is on another pipeline rank."""
        name = path
        if self.mapper is not None:
            mapped = self.mapper._map_name(f"{path}.weight")
            name = mapped.removesuffix(".weight") if mapped else path
        parent, _, last = name.rpartition(".")
        # a linear that the files have whole is one member, even if other bases of the class have its parts
        candidates: list[tuple[str, tuple[str, ...], int]] = [(name, (last,), 0)]
        for packed, members in self.packed.items():
            if last in members:
                candidates.append((f"{parent}.{packed}", tuple(members), members.index(last)))
        for module, members, index in candidates:
            linear = self.modules.get(module)
            if isinstance(linear, LinearBase):
                return Place(module, members, index, (_rows(path, linear, len(members))[index], linear.input_size))
        if self._elsewhere(name.split(".")):
            return None
        raise LookupError(f"{path}: vLLM's model has no such linear")

    def _elsewhere(self, parts: list[str]) -> bool:
        paths: Iterable[str] = (".".join(parts[:end]) for end in range(1, len(parts)))
        return any(isinstance(self.modules.get(path), PPMissingLayer) for path in paths)


def _rows(path: str, linear: LinearBase, members: int) -> list[int]:
    """The output size of each member of one of vLLM's linears, unsharded."""
    if isinstance(linear, QKVParallelLinear):
        keys = linear.total_num_kv_heads
        sizes = [
            linear.total_num_heads * linear.head_size,
            keys * linear.head_size,
            keys * getattr(linear, "v_head_size", linear.head_size),
        ]
    else:
        sizes = list(getattr(linear, "output_sizes", [linear.output_size]))
    if members not in (1, len(sizes)):
        raise LookupError(f"{path}: vLLM packs {members} linears into {len(sizes)} slices, which is not supported")
    if linear.tp_size > 1 and _has_own_loader(linear):
        raise LookupError(f"{path}: vLLM shards it by a special rule; --tensor-parallel-size 1 works")
    return sizes if members > 1 else [sum(sizes)]


def _has_own_loader(linear: LinearBase) -> bool:
    """Whether the model gave the linear's weight its own loader, as for Mamba's in_proj, which repeats groups."""
    loader = getattr(getattr(linear, "weight", None), "weight_loader", None)
    return loader is not None and getattr(loader, "__self__", None) is not linear
