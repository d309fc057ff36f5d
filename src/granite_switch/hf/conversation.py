"""A conversation run in transformers, on one KV cache."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from transformers import DynamicCache

from granite_switch import conversation
from granite_switch.conversation import Turn


@dataclass(frozen=True)
class Reply:
    """What the model answered, and to what."""

    text: str
    ids: tuple[int, ...]
    turn: Turn


class Conversation(conversation.Conversation):
    """Turns with adapters over one history and one cache. What a turn shares with the cache is not computed again.

    Args:
        model: a switch model.
        source: its folder; where it was loaded from by default.
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
        """Ask, generate, record.

        Args:
            text, adapter, keep, aside: as for `ask`.
            options: of `generate`; greedy unless `do_sample` is given.
        """
        turn = self.ask(text, adapter, keep=keep, aside=aside)
        if not turn.reused:
            self._cache = DynamicCache(config=self.model.config)
        elif surplus := self._cache.get_seq_length() - turn.reused:
            self._cache.crop(-surplus)
        ids = torch.tensor([turn.ids], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            **{"do_sample": False, **options},
        )
        new = tuple(output[0, len(turn.ids) :].tolist())
        answer = self.answer(new)
        self._computed = [(*turn.ids, *new)[: self._cache.get_seq_length()]]  # one cache holds one sequence
        return Reply(answer, new, turn)
