"""The slot and the token of every cached position, kept in one more layer of the model's own KV cache.

Only generation 1 asks for the tokens again, to know what it hides. Whatever is done to the cache is done to both:
beam reordering, cropping, repeating, selecting, resetting.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class _Slots:
    """What both kinds of layer share: slots stand where keys do and tokens where values do, as [B, 1, S, 1] int64."""

    cache: Cache

    def append(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Add the slots and tokens of new positions, both [B, S]; gives the tokens of all positions, [B, K]."""
        _, tokens = self.update(slots[:, None, :, None], tokens[:, None, :, None])  # type: ignore[attr-defined]
        return tokens[:, 0, :, 0]

    def prefetch(self) -> None:
        """Offloaded caches fetch the layer after the last one ahead of time: that is the first, not this."""
        self.cache.layers[0].prefetch()

    def offload(self) -> None:
        """A few bytes: they stay."""


class DynamicSlotLayer(_Slots, DynamicLayer):
    """Slots beside a cache that grows."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]; None if nothing is cached."""
        return self.keys[:, 0, -1, 0] if self.get_seq_length() else None


class StaticSlotLayer(_Slots, StaticLayer):
    """Slots beside a cache of fixed size."""

    def last(self) -> Tensor | None:
        """Slot of the last cached position, [B]. Of fixed shape: nothing cached reads as a zero."""
        if not self.is_initialized:
            return None
        return self.keys[:, 0, :, 0].index_select(1, (self.cumulative_length - 1).clamp(min=0).view(1))[:, 0]


def slot_layer(cache: Cache, num_hidden_layers: int) -> DynamicSlotLayer | StaticSlotLayer:
    """The cache's layer of slots, appended behind the model's own layers at the first use.

    What a cache held before it met this model was computed without adapters: its slots are 0.
    """
    while len(cache.layers) < num_hidden_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) == num_hidden_layers:
        first = cache.layers[0]
        whole = isinstance(first, StaticLayer) and not first.is_sliding  # a window is shorter than what it has seen
        layer = StaticSlotLayer(first.max_cache_len) if whole else DynamicSlotLayer()
        layer.cache = cache
        layer.is_sliding = first.is_sliding  # or masks would be made for this layer, not for the model's
        cache.layers.append(layer)
        before = int(first.get_seq_length())
        if before:
            batch, device = first.keys.shape[0], first.keys.device
            none = torch.zeros(batch, before, dtype=torch.int64, device=device)
            layer.append(none, none)
    return cache.layers[num_hidden_layers]
