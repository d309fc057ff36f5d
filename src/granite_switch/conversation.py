"""A conversation of many turns, an adapter for each: what to send, and how much of it was computed before.

A turn either keeps the token ids that were sent, so that everything before it stays cached, or renders the conversation
anew, which is what an adapter saw in training. No engine is needed here: turns are token ids, or payloads for an
OpenAI-compatible server. `granite_switch.hf.Conversation` runs them in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from granite_switch.core.chat import render
from granite_switch.core.checkpoint import read_json
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import SwitchError, TemplateError

Message = Mapping[str, Any]

_ANSWER = "granite-switch-stands-for-the-answer"


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
        """The payload for /v1/chat/completions, where the server renders.

        Raises:
            SwitchError: the turn keeps ids that no rendering gives.
        """
        if not self.rendered:
            raise SwitchError(
                "this turn keeps the ids that were sent, which a server that renders messages cannot",
                hint="send completion() to /v1/completions, or ask with keep=False",
            )
        payload = {"model": model, "messages": list(self.messages), **self.variables}
        return {**payload, "chat_template_kwargs": {"adapter_name": self.adapter}, **options}


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
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.ids: tuple[int, ...] = ()  # of the conversation so far, answers included
        self.keep = keep
        self._tokenizer = tokenizer
        self._library = tokenizer.library
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
        new: list[Message] = [{"role": "user", "content": text}] if text is not None else []
        rendered = not self.ids or not (self.keep if keep is None else keep)
        ids = self._render(new, adapter) if rendered else (*self.ids, *self._continue(new, adapter))
        reused = max((_common(ids, before) for before in self._computed), default=0)
        messages = (*self.messages, *new)
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
            ids, text = tuple(i for i in self._encode(output) if i not in self.spec.control_slots), output
        else:
            ids, text = tuple(output), self._library.decode(list(output), skip_special_tokens=True)
        sequence = (*turn.ids, *ids)
        self._computed.append(sequence[:-1])  # nothing was computed for the last token yet
        if not turn.aside:
            self.messages = [*turn.messages, {"role": "assistant", "content": text}]
            self.ids = sequence
        self._turn = None
        return text

    def _render(self, new: Sequence[Message], adapter: str) -> tuple[int, ...]:
        return self._encode(self._text([*self.messages, *new], adapter))

    def _text(self, messages: Sequence[Message], adapter: str = "base") -> str:
        variables = {**self._tokenizer.special_tokens, **self._variables}
        return render(self._template, messages, add_generation_prompt=True, adapter_name=adapter, **variables)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._library.encode(text, add_special_tokens=False).ids)

    def _continue(self, new: Sequence[Message], adapter: str) -> tuple[int, ...]:
        """The ids that follow the last answer: what the template writes behind it, with the control tokens."""
        *before, last = self.messages
        text = self._text([*before, {**last, "content": _ANSWER}, *new])
        _, found, tail = text.rpartition(_ANSWER)
        if not found:
            raise TemplateError("the chat template leaves earlier answers out", hint="ask with keep=False")
        slots = self.spec.control_slots
        switched = next((slots[token] for token in reversed(self.ids) if token in slots), 0) != 0
        ids = self._encode(self._place(tail, adapter, switched))
        # the token that ends an answer stands in the template's text too, and has been generated
        return ids[1:] if ids[:1] == self.ids[-1:] and self._is_special(ids[0]) else ids

    def _place(self, tail: str, adapter: str, switched: bool) -> str:
        """Put control tokens into the text of a new turn: back to base where it opens, then the adapter's."""
        spec = None if adapter == "base" else self.spec.adapter(adapter)
        opening = self._decode(self.spec.base_substitute_token_id)
        start = tail.find(opening)
        if spec and spec.technology == "alora":
            at = self._invocation(tail, spec)
            head = self._decode(spec.invocation_tokens[0])
            tail = tail[:at] + spec.token + tail[at + len(head) :]
            if not switched or start >= at:
                return tail
        if not spec and not switched:
            return tail
        if start < 0:
            raise TemplateError(f"the new turn does not open with {opening!r}", hint="ask with keep=False")
        token = spec.token if spec and spec.technology == "lora" else self.spec.base_token
        return tail[:start] + token + tail[start + len(opening) :]

    def _invocation(self, tail: str, spec: AdapterSpec) -> int:
        at = tail.rfind(spec.invocation_text)
        if at < 0:
            raise TemplateError(
                f"{spec.name} acts from its invocation text, which the new turn does not contain",
                hint=f"add {spec.invocation_text!r} to what the user says",
            )
        return at

    def _decode(self, token: int) -> str:
        return self._library.decode([token], skip_special_tokens=False)

    def _is_special(self, token: int) -> bool:
        return not self._library.decode([token], skip_special_tokens=True)


def _folder(model: str | PathLike[str]) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["config.json", "tokenizer*.json", "*.jinja"]))
    except Exception as error:  # which HTTP client's errors these are depends on the hub library's version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SwitchError(f"{model}: is not a folder here, and the hub says: {reason}") from None


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
