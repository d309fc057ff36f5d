"""The slot and token of every cached position, stored in an extra layer of the model's own KV cache.

So beam reordering, cropping, repeating, selecting and resetting the cache apply to them too. Only legacy format 1 needs
the tokens, to decide which to hide.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.utils import ModelOutput

from granite_switch.eager import Groups, grouped
from granite_switch.errors import RoutingError

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin as _Layer
else:
    _Layer = object


class _Slots(_Layer):
    """Common to both kinds of slot layer: keys hold slots and values hold tokens, each [B, 1, S, 1] int64."""

    cache: Any = None  # a weak reference: a strong one would be a cycle, which keeps every cache alive until gc
    keys: Tensor  # set by the first `append`
    values: Tensor
    decode: tuple[list[int], Groups] | None = None  # slots of the latest decode step, and their grouping

    def append(self, slots: Tensor, tokens: Tensor) -> None:
        """Add the slots and tokens of new positions, both [B, S]."""
        self.update(slots[:, None, :, None], tokens[:, None, :, None])

    def groups(self, slots: Tensor) -> Groups:
        """Group a decode step's slots, [B]. Memoised: for the same slots as the last step, the same `Groups`."""
        values = slots.tolist()
        if self.decode is None or self.decode[0] != values:
            self.decode = values, grouped(values, slots.device)
        return self.decode[1]

    def prefetch(self) -> None:
        """An offloaded cache prefetches the layer after the last: that must be the first, not this one."""
        cache = self.cache and self.cache()
        if cache is not None:
            cache.layers[0].prefetch()

    def offload(self) -> None:
        """Do nothing: slots are a few bytes and stay on the device."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("cache", "decode")}


class DynamicSlotLayer(_Slots, DynamicLayer):
    """The slots of a cache that grows."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]; None if nothing is cached."""
        return self.keys[:, 0, -1, 0] if self.get_seq_length() else None

    def with_new(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The cached tokens followed by the new ones, [B, K]; does not append them."""
        return torch.cat([self.values[:, 0, :, 0], tokens], 1) if self.get_seq_length() else tokens

    def slots_with(self, slots: Tensor) -> Tensor:
        """The slots of the cached positions followed by the new ones, [B, K]; does not append them."""
        return torch.cat([self.keys[:, 0, :, 0], slots], 1) if self.get_seq_length() else slots


class StaticSlotLayer(_Slots, StaticLayer):
    """The slots of a cache of fixed size."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]; None before the first `append`, 0 after a reset."""
        if not self.is_initialized:
            return None
        return self.keys[:, 0, :, 0].index_select(1, (self.cumulative_length - 1).clamp(min=0).view(1))[:, 0]

    def with_new(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The token at every position of the cache, [B, max_cache_len], with the new ones filled in; not appended."""
        seen = self.values[:, 0, :, 0] if self.is_initialized else tokens.new_zeros(len(tokens), self.max_cache_len)
        return seen.index_copy(1, positions, tokens)


SlotLayer = DynamicSlotLayer | StaticSlotLayer


def find_slots(cache: Cache | None) -> SlotLayer | None:
    """The cache's slot layer; None if no switch model has used the cache yet."""
    for layer in reversed(getattr(cache, "layers", ())):
        if isinstance(layer, (DynamicSlotLayer, StaticSlotLayer)):
            layer.cache = weakref.ref(cache)  # in a copied cache the layer still refers to the original
            return layer
    return None


def add_slots(cache: Any, model_layers: int, batch: int, before: int, device: torch.device) -> SlotLayer:
    """Append a slot layer after the model's own layers and return it. Positions cached before get slot 0.

    Args:
        cache: a cache that the model fills.
        model_layers: number of the model's own layers in it.
        batch: number of sequences.
        before: number of positions cached before this model used the cache.
        device: of the input.

    Raises:
        RoutingError: the cache has no layers.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise RoutingError(
            f"this model's cache is a {type(cache).__name__}, which cannot store slots",
            hint="use_cache=False, or a transformers cache such as DynamicCache(config=model.config)",
        )
    while len(cache.layers) < model_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    whole = [one for one in cache.layers if isinstance(one, StaticLayer) and not getattr(one, "is_sliding", False)]
    layer: Any = StaticSlotLayer(whole[0].max_cache_len) if whole else DynamicSlotLayer()
    # transformers sizes masks by the first sliding and the first full layer: this must be neither
    layer.is_sliding = bool(cache.layers) and getattr(cache.layers[0], "is_sliding", False)
    layer.cache = weakref.ref(cache)
    cache.layers.append(layer)
    if before:
        none = torch.zeros(batch, before, dtype=torch.int64, device=device)
        layer.append(none, none)
    return layer


def cache_of(outputs: Any, name: str) -> Any:
    """The cache in a base's outputs; None if there is none."""
    if isinstance(outputs, ModelOutput):
        return outputs.get(name)
    return next((one for one in outputs if isinstance(one, Cache)), None)


def cached_positions(past: Any) -> int:
    """The length of a cache without a slot layer; 0 if it does not count positions."""
    try:
        return int(past.get_seq_length())
    except ValueError:  # only recurrent states
        return 0
