"""The slot and the token of every cached position, kept in one more layer of the model's own KV cache.

Whatever is done to the cache is done to both: beam reordering, cropping, repeating, selecting, resetting. Only legacy
format 1 asks for the tokens, to know which it hides.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from granite_switch.eager import Groups, grouped
from granite_switch.errors import RoutingError

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin as _Layer
else:
    _Layer = object


class _Slots(_Layer):
    """What both kinds of layer share: slots are stored as keys and tokens as values, each [B, 1, S, 1] int64."""

    cache: Any = None  # a weak reference: a strong one would be a cycle, which keeps every cache alive until gc
    keys: Tensor  # from the first `append` on
    values: Tensor
    decode: tuple[list[int], Groups] | None = None  # slots of the latest decode step, and their grouping

    def append(self, slots: Tensor, tokens: Tensor) -> None:
        """Add the slots and tokens of new positions, both [B, S]."""
        self.update(slots[:, None, :, None], tokens[:, None, :, None])

    def groups(self, slots: Tensor) -> Groups:
        """The grouping of a decode step's slots, [B]: the previous step's if they are equal, with its padded copies."""
        values = slots.tolist()
        if self.decode is None or self.decode[0] != values:
            self.decode = values, grouped(values, slots.device)
        return self.decode[1]

    def prefetch(self) -> None:
        """Offloaded caches fetch the layer after the last one ahead of time: that is the first, not this one."""
        cache = self.cache and self.cache()
        if cache is not None:
            cache.layers[0].prefetch()

    def offload(self) -> None:
        """Nothing: slots are a few bytes and stay."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("cache", "decode")}


class DynamicSlotLayer(_Slots, DynamicLayer):
    """Slots beside a cache that grows."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]; None if nothing is cached."""
        return self.keys[:, 0, -1, 0] if self.get_seq_length() else None

    def with_new(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Every cached token and the new ones, [B, K], before those are appended."""
        return torch.cat([self.values[:, 0, :, 0], tokens], 1) if self.get_seq_length() else tokens


class StaticSlotLayer(_Slots, StaticLayer):
    """Slots beside a cache of fixed size."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]. Of fixed shape: nothing cached reads as a zero."""
        if not self.is_initialized:
            return None
        return self.keys[:, 0, :, 0].index_select(1, (self.cumulative_length - 1).clamp(min=0).view(1))[:, 0]

    def with_new(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The token of every position of the cache, [B, max_cache_len], the new ones filled in."""
        seen = self.values[:, 0, :, 0] if self.is_initialized else tokens.new_zeros(len(tokens), self.max_cache_len)
        return seen.index_copy(1, positions, tokens)


SlotLayer = DynamicSlotLayer | StaticSlotLayer


def find_slots(cache: Cache | None) -> SlotLayer | None:
    """The cache's layer of slots; None where it has not met a switch model yet."""
    for layer in reversed(getattr(cache, "layers", ())):
        if isinstance(layer, (DynamicSlotLayer, StaticSlotLayer)):
            layer.cache = weakref.ref(cache)  # a copy of a cache still refers to the original
            return layer
    return None


def add_slots(cache: Any, model_layers: int, batch: int, before: int, device: torch.device) -> SlotLayer:
    """Append a layer of slots after the model's own layers. What was cached before is the base's: its slots are 0.

    Args:
        cache: that a forward of the model has filled or will fill.
        model_layers: how many layers of it are the model's.
        batch: sequences in it.
        before: positions that were cached before this model met it.
        device: of the input.

    Raises:
        RoutingError: it is not a cache of layers.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise RoutingError(
            f"this model keeps its past in a {type(cache).__name__}, which has no place for the slots",
            hint="use_cache=False, or a transformers cache such as DynamicCache(config=model.config)",
        )
    while len(cache.layers) < model_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    whole = [one for one in cache.layers if isinstance(one, StaticLayer) and not getattr(one, "is_sliding", False)]
    layer: Any = StaticSlotLayer(whole[0].max_cache_len) if whole else DynamicSlotLayer()
    # masks are sized by the first layer that is sliding, or the first that is not: neither may be this one
    layer.is_sliding = bool(cache.layers) and getattr(cache.layers[0], "is_sliding", False)
    layer.cache = weakref.ref(cache)
    cache.layers.append(layer)
    if before:
        none = torch.zeros(batch, before, dtype=torch.int64, device=device)
        layer.append(none, none)
    return layer
