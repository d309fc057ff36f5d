"""Conversations in which each turn can use another adapter: the prompt of each request, and how much of it is cached.

A turn either keeps the token ids already sent, so that everything before it stays cached, or renders the whole
conversation again, as the adapter saw it in training. No engine is needed here: turns are token ids, or payloads for
an OpenAI-compatible server. `granite_switch.hf.Conversation` runs them in transformers.
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
from granite_switch.core.model import read_model
from granite_switch.core.tokenizer import added_texts, read_tokenizer
from granite_switch.errors import SwitchError, TemplateError, first_line

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One request: the prompt, and how much of it is cached."""

    adapter: str  # "base" for none
    ids: tuple[int, ...]  # token ids of the prompt, control tokens included
    reused: int  # length of the prompt prefix that is already in the KV cache
    rendered: bool  # whether the prompt was rendered from the messages; otherwise the ids sent before are kept
    aside: bool  # whether question and answer stay out of the conversation
    messages: tuple[Message, ...]
    variables: Mapping[str, Any]  # documents and tools

    @property
    def prefill(self) -> int:
        """The number of prompt tokens that are not cached."""
        return len(self.ids) - self.reused

    def completion(self, model: str, **options: Any) -> dict[str, Any]:
        """Return the payload for /v1/completions, with token ids. vLLM returns the answer's ids as `token_ids`."""
        return {"model": model, "prompt": list(self.ids), "return_token_ids": True, **options}

    def chat(self, model: str, **options: Any) -> dict[str, Any]:
        """Return the payload for /v1/chat/completions, where the server renders the template.

        The server's ids equal those of `completion` if tokenising earlier answers gives the ids that were generated.

        Raises:
            SwitchError: an adapter answered without a user message, which a list of messages cannot express.
        """
        if any("adapter" in message and message["role"] != "user" for message in self.messages):
            raise SwitchError(
                "an adapter of this conversation answered without a user message",
                hint="send completion() to /v1/completions, or ask such questions with aside=True",
            )
        names = [message.get("adapter") for message in self.messages if message["role"] == "user"]
        messages = [{k: v for k, v in message.items() if k != "adapter"} for message in self.messages]
        named = {} if self.rendered else {"message_adapters": names}
        arguments = {"adapter_name": self.adapter, **named}
        payload = {"model": model, "messages": messages, **self.variables}
        return {**payload, "chat_template_kwargs": arguments, **options}


class Conversation:
    """A conversation in which each turn can use another adapter.

    Args:
        model: a composed model's folder or hub id; its template, tokenizer and config are read.
        system: the system prompt.
        documents: in the chat template's format, for the whole conversation.
        tools: JSON schemas in the chat template's format.
        keep: whether turns keep the ids already sent; `ask` can override it.

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
            raise TemplateError(f"{folder}: has no chat template")
        self.spec = read_model(folder)[1]
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []  # with `adapter`s
        self.ids: tuple[int, ...] = ()  # of the conversation so far, answers included
        self.keep = keep
        self._tokenizer = tokenizer
        self._library = tokenizer.library
        self._added = added_texts(self.spec, tokenizer.library)
        self._template = tokenizer.templates["default"]
        self._variables = {k: list(v) for k, v in (("documents", documents), ("tools", tools)) if v}
        self._computed: list[tuple[int, ...]] = []  # sequences whose keys and values an engine may have cached
        self._turn: Turn | None = None

    def ask(
        self, text: str | None = None, adapter: str = "base", *, keep: bool | None = None, aside: bool = False
    ) -> Turn:
        """Return the next request.

        Args:
            text: the user's message; None lets the model continue without one.
            adapter: the adapter that answers.
            keep: keep the ids already sent; defaults to the conversation's `keep`.
            aside: leave question and answer out of the conversation, for example for a check.

        Raises:
            SwitchError: there is no such adapter, the last turn has no answer yet, or the template cannot place the
                adapter's control token.
        """
        if self._turn and not self._turn.aside:
            raise SwitchError("the last turn has no answer yet", hint="pass it to answer()")
        self.spec.slot(adapter)
        new: list[Message] = [{"role": "user", "content": text, "adapter": adapter}] if text is not None else []
        rendered = not self.ids or not (self.keep if keep is None else keep)
        # a rendered prompt uses one adapter, whichever adapters answered earlier
        before = [_unmarked(message) for message in self.messages] if rendered else self.messages
        ids = self._render([*before, *new], adapter) if rendered else (*self.ids, *self._continue(new, adapter))
        reused = max((_common(ids, earlier) for earlier in self._computed), default=0)
        messages = (*before, *new)
        self._turn = Turn(adapter, ids, min(reused, len(ids) - 1), rendered, aside, messages, self._variables)
        return self._turn

    def answer(self, output: str | Sequence[int]) -> str:
        """Record the model's answer to the last turn and return its text.

        Args:
            output: the answer's token ids, which keep the cache valid, or its text.
        """
        turn = self._turn
        if turn is None:
            raise SwitchError("nothing was asked", hint="call ask() first")
        if isinstance(output, str):
            text = output
            for added in self._added:
                text = text.replace(added, " ")
            ids = self._encode(text)
        else:
            ids, text = tuple(output), self._library.decode(list(output), skip_special_tokens=True)
        sequence = (*turn.ids, *ids)
        self._computed.append(sequence[:-1])  # the last token's keys and values are not computed yet
        if not turn.aside:
            unasked = {} if turn.messages and turn.messages[-1]["role"] == "user" else {"adapter": turn.adapter}
            self.messages = [*turn.messages, {"role": "assistant", "content": text, **unasked}]
            self.ids = sequence
        self._turn = None
        return text

    def withdraw(self) -> None:
        """Discard the last turn, so that another can be asked instead."""
        self._turn = None

    def _render(self, messages: Sequence[Message], adapter: str) -> tuple[int, ...]:
        return self._encode(self._text([_unmarked(message) for message in messages], adapter))

    def _text(self, messages: Sequence[Message], adapter: str) -> str:
        variables = {**self._tokenizer.special_tokens, **self._variables}
        return render(self._template, messages, add_generation_prompt=True, adapter_name=adapter, **variables)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._library.encode(text, add_special_tokens=False).ids)

    def _continue(self, new: Sequence[Message], adapter: str) -> tuple[int, ...]:
        """Return the ids of the text that the template writes after the last answer, control tokens included."""
        *before, last = self.messages
        answer = secrets.token_hex(16)  # occurs nowhere else
        text = self._text([*before, {**last, "content": answer}, *new], adapter)
        _, found, tail = text.rpartition(answer)
        if not found:
            raise TemplateError("the chat template omits earlier answers", hint="ask with keep=False")
        ids = self._encode(tail)
        # the template writes the token that ends an answer; if the model generated it, it is there already
        return ids[1:] if ids[:1] == self.ids[-1:] and self._is_special(ids[0]) else ids

    def _is_special(self, token: int) -> bool:
        return not self._library.decode([token], skip_special_tokens=True)


def _folder(model: str | PathLike[str]) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["config.json", "tokenizer*.json", "*.jinja"]))
    except Exception as error:  # the class depends on the hub library's HTTP client
        raise SwitchError(f"{model}: is not a local folder, and the hub says: {first_line(error)}") from None


def _unmarked(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "adapter"}


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def __getattr__(name: str) -> Any:
    if name == "KVHistoryPolicy":
        raise ImportError(
            "KVHistoryPolicy was removed after granite-switch 0.1.1. Conversation(MODEL, keep=True) keeps the ids "
            "already sent (PRESERVE_MIXED_HISTORY), keep=False renders again (RE_PREFILL); see docs/migrate.md"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
