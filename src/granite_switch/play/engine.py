"""The interface of the engines: the model in this process (`local`), or a server that has it (`remote`)."""

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


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Setting:
    """The system prompt and documents of a conversation."""

    system: str = ""
    documents: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The arguments for `Conversation`."""
        documents = [{"doc_id": str(number), "text": text} for number, text in enumerate(self.documents, 1)]
        return {"system": self.system, "documents": documents or None}


@dataclass(frozen=True)
class Ask:
    """A message, and the adapter that answers it."""

    text: str
    adapter: str = "base"
    keep: bool = True  # continue from the ids sent so far; else render the conversation again


@dataclass(frozen=True)
class Answer:
    """An answer and its measurements."""

    turn: Turn
    ids: tuple[int, ...]
    text: str
    cached: int | None  # prompt tokens read from the cache; None if the server does not report them
    first: float  # seconds to the first token
    seconds: float  # seconds to the last token


class Engine(Protocol):
    """Runs conversations."""

    files: "Model"
    place: str  # where answers come from, as shown to the user
    limit: int  # most tokens of prompt and answer together

    def conversation(self, setting: Setting) -> Conversation:
        """A new conversation."""

    def stream(
        self, talk: Conversation, ask: Ask, sampling: Sampling, stop: Event
    ) -> Generator[str | Answer, None, None]:
        """Yield the text so far after each update, and at the end the answer, which is then part of the conversation.

        Raises:
            SwitchError: the turn cannot be answered; the conversation is unchanged.
        """

    def batch(self, turns: Sequence[Turn], sampling: Sampling, stop: Event) -> list[tuple[int, ...]]:
        """The answers to several turns, computed together, as token ids."""


@dataclass(frozen=True)
class Model:
    """What the page reads from a composed model's small files."""

    folder: Path
    spec: SwitchSpec
    limit: int  # the longest sequence, from max_position_embeddings
    decode: Callable[[Sequence[int]], str]  # ids to text, without special tokens
    token: Callable[[int], str]  # one id to text

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
