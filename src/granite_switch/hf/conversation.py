"""A conversation in transformers, with one KV cache."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from granite_switch import conversation
from granite_switch.conversation import Turn


@dataclass(frozen=True)
class Reply:
    """An answer, and the turn it belongs to."""

    text: str
    ids: tuple[int, ...]
    turn: Turn


class Conversation(conversation.Conversation):
    """Turns with adapters over one history and one KV cache; a turn's cached prefix is not computed again.

    Args:
        model: a switch model.
        source: the model's folder; by default the one it was loaded from.
        options: as for `granite_switch.Conversation`.
    """

    def __init__(self, model: Any, source: str | PathLike[str] = "", **options: Any) -> None:
        super().__init__(source or model.config._name_or_path, **options)
        self.model = model
        self._cache = DynamicCache(config=model.config)

    def say(
        self,
        text: str | None = None,
        adapter: str = "base",
        *,
        keep: bool | None = None,
        aside: bool = False,
        **options: Any,
    ) -> Reply:
        """Ask, generate and record the answer.

        Args:
            text, adapter, keep, aside: as for `ask`.
            options: for `generate`; decoding is greedy unless `do_sample` is given.
        """
        turn = self.ask(text, adapter, keep=keep, aside=aside)
        try:
            several = any(options.get(name, 1) != 1 for name in ("num_beams", "num_return_sequences"))
            self._fit(0 if several else turn.reused)  # the cache holds one sequence
            ids = torch.tensor([turn.ids], device=self.model.device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{self.model._cache_name: self._cache},
                **{"do_sample": False, **options},
            )
            new = tuple(output[0, len(turn.ids) :].tolist())
        except BaseException:  # Ctrl-C, out of memory, a streamer's error: the cache's layers may differ in length
            self.withdraw()
            self._start()
            raise
        answer = self.answer(new)
        self._computed = [(*turn.ids, *new)[: _length(self._cache)]]
        return Reply(answer, new, turn)

    def _start(self) -> None:
        self._cache, self._computed = DynamicCache(config=self.model.config), []

    def _fit(self, length: int) -> None:
        """Crop the cache to this many positions, or start a new one if it cannot be cropped."""
        surplus = _length(self._cache) - length
        if not length or surplus < 0:
            return self._start()
        try:
            if surplus:
                self._cache.crop(-surplus)
        except (RuntimeError, ValueError):  # a sliding window has dropped positions that are needed
            return self._start()
        return None if _length(self._cache) == length else self._start()


def _length(cache: DynamicCache) -> int:
    """How many positions of one sequence every layer holds; 0 if layers differ, or if one holds a recurrent state.

    A state (Mamba, linear attention) cannot be cropped, and some models extend it by only one token at a time.
    """
    lengths = set()
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
            return 0
        if layer.is_initialized and layer.keys is not None:
            lengths.add(layer.get_seq_length() if layer.keys.shape[0] == 1 else 0)
    return lengths.pop() if len(lengths) == 1 else 0
