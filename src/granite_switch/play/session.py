"""One browser's conversation, with the measurements of each turn. Depends on neither Gradio nor an engine's library."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Event, Lock

from granite_switch.conversation import Conversation, Turn, common_length
from granite_switch.errors import SwitchError, TemplateError
from granite_switch.play.engine import Answer, Ask, Engine, Sampling, Setting


@dataclass(frozen=True)
class Exchange:
    """A message and its answer so far."""

    ask: Ask
    text: str = ""
    measure: "Measure | None" = None  # None until it is answered
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """The measurements of a turn."""

    prompt: int  # prompt tokens
    cached: int | None  # prompt tokens read from the cache; None if the server does not report them
    as_lora: int  # prompt tokens to compute if every adapter acted from the first token, with a cache of its own
    generated: int  # generated tokens
    first: float  # seconds to the first generated token
    rate: float  # tokens per second after the first; 0 if there was only one

    @property
    def computed(self) -> int | None:
        """Prompt tokens that were not in the cache."""
        return None if self.cached is None else self.prompt - self.cached


@dataclass(frozen=True)
class Compared:
    """One adapter's answer, side by side with others'."""

    adapter: str
    text: str


class Session:
    """The state of one browser's page.

    Args:
        engine: shared by all sessions.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.exchanges: list[Exchange] = []
        self.last: Answer | None = None
        self._setting = Setting()
        self._talk: Conversation | None = None
        self._plain: list[tuple[str, tuple[int, ...]]] = []  # adapter, and the ids it has seen, substituted
        self._stop = Event()
        self._busy = Lock()

    def send(self, ask: Ask, setting: Setting, sampling: Sampling) -> Iterator[None]:
        """Ask, and yield after each update of `exchanges`.

        Raises:
            SwitchError: the message cannot be answered; the conversation is unchanged.
        """
        with self._working():
            talk, note = self._prepare(setting)
            self._turn(talk, ask)
            self.exchanges.append(Exchange(ask, note=note))
            said = len(talk.messages)
            try:
                with closing(self.engine.stream(talk, ask, sampling, self._stop)) as parts:
                    for part in parts:
                        self._follow(part)
                        yield
            finally:
                if self.exchanges[-1].measure is None:
                    unread = len(talk.messages) > said  # the reader left, but the conversation has the turn
                    left = [replace(self.exchanges[-1], note="The answer was cut off.")] if unread else []
                    self.exchanges[-1:] = left

    def _follow(self, part: str | Answer) -> None:
        current = self.exchanges[-1]
        if isinstance(part, str):
            self.exchanges[-1] = replace(current, text=part)
        else:
            self.last = part
            self.exchanges[-1] = replace(current, text=part.text, measure=self._measure(part))

    def compare(
        self, text: str, adapters: Sequence[str], setting: Setting, sampling: Sampling, after: bool
    ) -> list[Compared]:
        """The answers of several adapters to one message; they do not become part of the conversation.

        Args:
            after: whether the message continues the conversation; else it opens a new one.
        """
        if len(adapters) < 2:
            raise SwitchError("choose at least two adapters")
        with self._working():
            talk = self._prepare(setting)[0] if after else self.engine.conversation(setting)
            turns = [self._turn(talk, Ask(text, adapter)) for adapter in adapters]
            answers = self.engine.batch(turns, sampling, self._stop)
            return [Compared(a, self.engine.files.decode(ids)) for a, ids in zip(adapters, answers, strict=True)]

    def stop(self) -> None:
        """Stop the current answer; the part written so far stays."""
        self._stop.set()

    def reset(self) -> None:
        """Start a new conversation."""
        self.stop()
        with self._working(wait=True):
            self.exchanges, self._plain, self._talk, self.last = [], [], None, None

    def _prepare(self, setting: Setting) -> tuple[Conversation, str]:
        """Return the conversation with this setting and the messages so far, and a note if the cache is lost."""
        if self._talk and setting == self._setting:
            return self._talk, ""
        fresh, before = self.engine.conversation(setting), self._talk
        said = [message for message in before.messages if message["role"] != "system"] if before else []
        fresh.messages += said
        self._talk, self._setting = fresh, setting
        return fresh, "The system prompt or the documents changed, so the whole chat is computed again." if said else ""

    def _turn(self, talk: Conversation, ask: Ask) -> Turn:
        """Return the turn that would be next; the conversation is unchanged.

        Raises:
            SwitchError: the message is empty or too long, or lacks the adapter's invocation text.
        """
        if not ask.text.strip():
            raise SwitchError("the message is empty")
        if (text := needs_text(self.engine.files.folder, ask.adapter)) and text not in ask.text:
            raise SwitchError(
                f"{ask.adapter} acts from {text} on, but the message does not contain it",
                hint=f"write {text} where {ask.adapter} should start, or choose another adapter",
            )
        turn, limit = talk.ask(ask.text, ask.adapter, keep=ask.keep), self.engine.limit
        talk.withdraw()
        if len(turn.ids) >= limit:
            raise SwitchError(
                f"the prompt has {len(turn.ids):,} tokens, but the model takes {limit:,} including the answer",
                hint="shorten the message or the documents, or start a new conversation",
            )
        return turn

    def _measure(self, answer: Answer) -> Measure:
        ids, substitutes = answer.turn.ids, self.engine.files.spec.substitutes
        plain = tuple(substitutes.get(token, token) for token in (*ids, *answer.ids))
        mine = [earlier for adapter, earlier in self._plain if adapter == answer.turn.adapter]
        shared = max((common_length(plain, earlier) for earlier in mine), default=0)
        self._plain.append((answer.turn.adapter, plain[:-1]))
        after = answer.seconds - answer.first
        rate = (len(answer.ids) - 1) / after if after > 0 else 0.0
        as_lora = len(ids) - min(shared, len(ids) - 1)
        return Measure(len(ids), answer.cached, as_lora, len(answer.ids), answer.first, rate)

    @contextmanager
    def _working(self, wait: bool = False) -> Iterator[None]:
        """Allow one request at a time per browser."""
        if not self._busy.acquire(timeout=30 if wait else 0.001):
            raise SwitchError("the last message is still being answered", hint="wait for it, or stop it")
        try:
            self._stop.clear()
            yield
        finally:
            self._busy.release()


@cache
def needs_text(folder: Path, adapter: str) -> str:
    """The text that a message to this adapter must contain; empty if the chat template writes it."""
    talk = Conversation(folder)
    try:
        talk.ask("a", adapter)
    except TemplateError:
        return talk.spec.adapter(adapter).invocation_text
    return ""
