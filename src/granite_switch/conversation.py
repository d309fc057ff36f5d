"""A conversation of many turns, an adapter for each: what to send, and how much of it was computed before.

A turn either keeps the token ids that were sent, so that everything before it stays cached, or renders the conversation
anew, which is what an adapter saw in training. No engine is needed here: turns are token ids, or payloads for an
OpenAI-compatible server. `granite_switch.hf.Conversation` runs them in transformers.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from granite_switch.core.chat import render
from granite_switch.core.checkpoint import read_json
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import added_texts, read_tokenizer
from granite_switch.errors import SwitchError, TemplateError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One request: everything that the model is to read before it answers."""

    adapter: str  # "base" for none
    ids: tuple[int, ...]  # the prompt's tokens, control tokens included
    reused: int  # so many of them, from the start, were computed for an earlier request of this conversation
    rendered: bool  # anew, from the messages; else the ids sent before are kept
    aside: bool  # the answer does not become part of the conversation
    messages: tuple[Message, ...]
    variables: Mapping[str, Any]  # documents and tools

    @property
    def prefill(self) -> int:
        """How many tokens are left to compute."""
        return len(self.ids) - self.reused

    def completion(self, model: str, **options: Any) -> dict[str, Any]:
        """The payload for /v1/completions: token ids. vLLM gives those of the answer back as `token_ids`."""
        return {"model": model, "prompt": list(self.ids), "return_token_ids": True, **options}

    def chat(self, model: str, **options: Any) -> dict[str, Any]:
        """The payload for /v1/chat/completions, where the server renders the template.

        The ids are those of `completion` wherever the text of earlier answers is tokenised as it was generated.

        Raises:
            SwitchError: an adapter answered without a user message, which no list of messages can say.
        """
        if any("adapter" in message and message["role"] != "user" for message in self.messages):
            raise SwitchError(
                "an adapter of this conversation answered without a user message",
                hint="send completion() to /v1/completions, or ask such questions aside",
            )
        names = [message.get("adapter") for message in self.messages if message["role"] == "user"]
        messages = [{k: v for k, v in message.items() if k != "adapter"} for message in self.messages]
        named = {} if self.rendered else {"message_adapters": names}
        arguments = {"adapter_name": self.adapter, **named}
        payload = {"model": model, "messages": messages, **self.variables}
        return {**payload, "chat_template_kwargs": arguments, **options}


class Conversation:
    """Turns with adapters over one history.

    Args:
        model: a composed model's folder or hub id; its template, tokenizer and config are read.
        system: the system prompt.
        documents: as the chat template takes them; they stay for the whole conversation.
        tools: JSON schemas, as the chat template takes them.
        keep: whether turns keep the ids that were sent; each turn can choose otherwise.

    Raises:
        SwitchError: the folder holds no composed model with a chat template.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        system: str = "",
        documents: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        keep: bool = True,
    ) -> None:
        folder = _folder(model)
        tokenizer = read_tokenizer(folder)
        if "default" not in tokenizer.templates:
            raise TemplateError(f"{folder}: there is no chat template")
        self.spec = SwitchSpec.from_dict(read_json(folder / "config.json").get("switch") or {})
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []  # with `adapter`s
        self.ids: tuple[int, ...] = ()  # of the conversation so far, answers included
        self.keep = keep
        self._tokenizer = tokenizer
        self._library = tokenizer.library
        self._added = added_texts(self.spec, tokenizer.library)
        self._template = tokenizer.templates["default"]
        self._variables = {k: list(v) for k, v in (("documents", documents), ("tools", tools)) if v}
        self._computed: list[tuple[int, ...]] = []  # sequences of which an engine can have the keys and values
        self._turn: Turn | None = None

    def ask(
        self, text: str | None = None, adapter: str = "base", *, keep: bool | None = None, aside: bool = False
    ) -> Turn:
        """The next request.

        Args:
            text: what the user says; None to have the model go on without.
            adapter: which is to answer.
            keep: keep the ids that were sent; the conversation's own choice by default.
            aside: a question beside the conversation, such as a check: neither it nor its answer is kept.

        Raises:
            SwitchError: no such adapter; the turn before has no answer yet; the template cannot place the adapter.
        """
        if self._turn and not self._turn.aside:
            raise SwitchError("the last turn has no answer yet", hint="give it to answer()")
        self.spec.slot(adapter)
        new: list[Message] = [{"role": "user", "content": text, "adapter": adapter}] if text is not None else []
        rendered = not self.ids or not (self.keep if keep is None else keep)
        # what is rendered anew is one prompt, whoever answered earlier
        before = [_unmarked(message) for message in self.messages] if rendered else self.messages
        ids = self._render([*before, *new], adapter) if rendered else (*self.ids, *self._continue(new, adapter))
        reused = max((_common(ids, earlier) for earlier in self._computed), default=0)
        messages = (*before, *new)
        self._turn = Turn(adapter, ids, min(reused, len(ids) - 1), rendered, aside, messages, self._variables)
        return self._turn

    def answer(self, output: str | Sequence[int]) -> str:
        """Record what the model answered to the last turn.

        Args:
            output: its token ids, which keep the cache valid; or the text.

        Returns:
            The text.
        """
        turn = self._turn
        if turn is None:
            raise SwitchError("nothing was asked", hint="ask() first")
        if isinstance(output, str):
            text = output
            for added in self._added:
                text = text.replace(added, " ")
            ids = self._encode(text)
        else:
            ids, text = tuple(output), self._library.decode(list(output), skip_special_tokens=True)
        sequence = (*turn.ids, *ids)
        self._computed.append(sequence[:-1])  # nothing was computed for the last token yet
        if not turn.aside:
            unasked = {} if turn.messages and turn.messages[-1]["role"] == "user" else {"adapter": turn.adapter}
            self.messages = [*turn.messages, {"role": "assistant", "content": text, **unasked}]
            self.ids = sequence
        self._turn = None
        return text

    def withdraw(self) -> None:
        """Forget the last turn, which gets no answer; another can be asked in its place."""
        self._turn = None

    def _render(self, messages: Sequence[Message], adapter: str) -> tuple[int, ...]:
        return self._encode(self._text([_unmarked(message) for message in messages], adapter))

    def _text(self, messages: Sequence[Message], adapter: str) -> str:
        variables = {**self._tokenizer.special_tokens, **self._variables}
        return render(self._template, messages, add_generation_prompt=True, adapter_name=adapter, **variables)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._library.encode(text, add_special_tokens=False).ids)

    def _continue(self, new: Sequence[Message], adapter: str) -> tuple[int, ...]:
        """The ids that follow the last answer: what the template writes after it, with the control tokens."""
        *before, last = self.messages
        answer = secrets.token_hex(16)  # which nobody can have written
        text = self._text([*before, {**last, "content": answer}, *new], adapter)
        _, found, tail = text.rpartition(answer)
        if not found:
            raise TemplateError("the chat template leaves earlier answers out", hint="ask with keep=False")
        ids = self._encode(tail)
        # the token that ends an answer is in the template's text too, and has been generated
        return ids[1:] if ids[:1] == self.ids[-1:] and self._is_special(ids[0]) else ids

    def _is_special(self, token: int) -> bool:
        return not self._library.decode([token], skip_special_tokens=True)


def _folder(model: str | PathLike[str]) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["config.json", "tokenizer*.json", "*.jinja"]))
    except Exception as error:  # which HTTP client's errors these are depends on the hub library's version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SwitchError(f"{model}: is not a folder here, and the hub says: {reason}") from None


def _unmarked(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "adapter"}


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def __getattr__(name: str) -> Any:
    if name == "KVHistoryPolicy":
        raise ImportError(
            "KVHistoryPolicy was of granite-switch up to 0.1.1. Conversation(MODEL, keep=True) keeps the ids that were "
            "sent (PRESERVE_MIXED_HISTORY), keep=False renders anew (RE_PREFILL); docs/migrate.md"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
