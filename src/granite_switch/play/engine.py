"""What answers: the model in this process (`local`) or a server that holds it (`remote`). This is what both have."""

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from granite_switch.conversation import Conversation, Turn
from granite_switch.core.layout import decoder_config
from granite_switch.core.model import read_model
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import SwitchError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Setting:
    """The text before the first message."""

    system: str = ""
    documents: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """As `Conversation` takes them."""
        documents = [{"doc_id": str(number), "text": text} for number, text in enumerate(self.documents, 1)]
        return {"system": self.system, "documents": documents or None}


@dataclass(frozen=True)
class Ask:
    """One message, and which adapter is to answer it."""

    text: str
    adapter: str = "base"
    keep: bool = True  # the ids that were sent before; else the conversation is rendered anew


@dataclass(frozen=True)
class Answer:
    """What was answered, and what it took."""

    turn: Turn
    ids: tuple[int, ...]
    text: str
    cached: int | None  # tokens of the prompt out of the cache; None: the server does not say
    first: float  # seconds to the first token
    seconds: float  # to the last one


class Engine(Protocol):
    """Runs conversations."""

    files: "Model"
    place: str  # for people: where the answers come from
    limit: int  # tokens of prompt and answer

    def conversation(self, setting: Setting) -> Conversation:
        """A new one."""

    def stream(
        self, talk: Conversation, ask: Ask, sampling: Sampling, stop: Event
    ) -> Generator[str | Answer, None, None]:
        """The text so far, again and again, and at last the answer, which the conversation then holds.

        Raises:
            SwitchError: the turn cannot be asked or answered; the conversation is as it was.
        """

    def batch(self, turns: Sequence[Turn], sampling: Sampling, stop: Event) -> list[tuple[int, ...]]:
        """Answers to several turns at once, as token ids."""


@dataclass(frozen=True)
class Model:
    """What a composed model's small files say, which is all that a page needs beside an engine."""

    folder: Path
    spec: SwitchSpec
    limit: int  # the longest sequence, from max_position_embeddings
    decode: Callable[[Sequence[int]], str]  # without special tokens
    token: Callable[[int], str]

    @classmethod
    def read(cls, folder: Path) -> "Model":
        config, spec = read_model(folder)
        library = read_tokenizer(folder).library
        return cls(
            folder,
            spec,
            decoder_config(config).get("max_position_embeddings") or 1 << 30,
            lambda ids: library.decode(list(ids), skip_special_tokens=True).rstrip("\ufffd"),
            lambda token: library.decode([token], skip_special_tokens=False),
        )


def fitting(turn: Turn, limit: int) -> Turn:
    """The turn.

    Raises:
        SwitchError: its prompt leaves no room for an answer.
    """
    if len(turn.ids) >= limit:
        raise SwitchError(
            f"the prompt has {len(turn.ids):,} tokens and the model takes {limit:,}, answer included",
            hint="shorten the message or the documents, or start a new conversation",
        )
    return turn


def sentence(body: str) -> str:
    """What an error's body says, in the forms that servers use."""
    try:
        data = json.loads(body)
    except ValueError:
        return "" if body.lstrip().startswith("<") else body.strip()[:300]
    if not isinstance(data, dict):
        return str(data)[:300]
    error = data.get("error", data)
    return str(error.get("message", error) if isinstance(error, dict) else data.get("detail", error))
