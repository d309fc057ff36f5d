"""Determine where the chat template places each adapter's control token, and prove it on sample chats.

Each sample chat is rendered, tokenised and substituted. For an aLoRA, the ids must then contain the invocation sequence
at the control token; for a LoRA, they must equal the base's. Templates are third-party code, rendered within limits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.chat import Placement, Return, wrap
from granite_switch.core.limits import render_limited as render
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.core.tokenizer import added_texts
from granite_switch.errors import AdapterError, BaseModelError, TemplateError

_TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}
_USER = {"role": "user", "content": "Where does the river end?"}
_ANSWER = "In the cold grey sea."
_CHATS: Sequence[Mapping[str, Any]] = (
    {"messages": [_USER]},
    {"messages": [{"role": "system", "content": "Answer briefly."}, _USER]},
    {"messages": [_USER, {"role": "assistant", "content": "In the sea."}, {"role": "user", "content": "Which one?\n"}]},
    {"messages": [_USER], "documents": [{"doc_id": "1", "title": "", "text": "The river ends in the sea."}]},
    {"messages": [_USER], "tools": [_TOOL]},
)


@dataclass(frozen=True)
class Chat:
    """A sample conversation."""

    variables: Mapping[str, Any]
    text: str  # rendered by the base's template

    def with_text(self, text: str) -> dict[str, Any]:
        """Return the variables with `text` appended to the last message."""
        *before, last = self.variables["messages"]
        return {**self.variables, "messages": [*before, {**last, "content": last["content"] + text}]}


def chats(template: str, special_tokens: Mapping[str, str]) -> list[Chat]:
    """Return the sample chats that a template accepts (some refuse a system prompt, for example).

    Raises:
        BaseModelError: it accepts none.
    """
    result, problems = [], []
    for sample in _CHATS:
        variables = {**sample, **special_tokens, "add_generation_prompt": True}
        try:
            result.append(Chat(variables, render(template, **variables)))
        except TemplateError as error:
            problems.append(error.message)
    if not result:
        raise BaseModelError("the base's chat template fails on every sample chat", problems=sorted(set(problems)))
    return result


@dataclass(frozen=True)
class Token:
    """A token and its text in a prompt."""

    text: str
    id: int


def opening(samples: Sequence[Chat], tokenizer: Tokenizer) -> Token:
    """Return the token that begins every prompt.

    Raises:
        BaseModelError: prompts begin with different tokens, so a LoRA's control token has no fixed substitute.
    """
    starts = set()
    for sample in samples:
        encoding = tokenizer.encode(sample.text, add_special_tokens=False)
        if not encoding.ids:
            raise BaseModelError("the base's chat template renders an empty prompt")
        starts.add(Token(sample.text[: encoding.offsets[0][1]], encoding.ids[0]))
    if len(starts) > 1:
        raise BaseModelError(
            "the base's chat template begins prompts with different tokens: "
            + ", ".join(sorted(repr(s.text) for s in starts)),
            hint="a LoRA's control token replaces the first token, which must always be the same",
        )
    return starts.pop()


def turn(template: str, samples: Sequence[Chat], tokenizer: Tokenizer) -> Token:
    """Return the token that opens a turn, which return-to-base replaces.

    It is the prompt's first token, or the second if the first is a beginning-of-sequence token that later turns lack.
    """
    sample = samples[0]
    encoding = tokenizer.encode(sample.text, add_special_tokens=False)
    spans = list(zip(encoding.ids, encoding.offsets, strict=True))[:2]
    first, *more = [Token(sample.text[start:end], token) for token, (start, end) in spans]
    answered = [*sample.variables["messages"], {"role": "assistant", "content": _ANSWER}, _USER]
    try:
        later = render(template, **{**sample.variables, "messages": answered}).rpartition(_ANSWER)[2]
    except TemplateError:  # the template allows one turn only
        return first
    return next((token for token in (first, *more) if token.text and token.text in later), first)


def placement(adapter: AdapterSpec, opening_text: str, tokenizer: Tokenizer) -> Placement:
    """Determine which text an adapter's control token replaces."""
    if adapter.technology == "lora":
        return Placement(adapter.name, adapter.token, opening=opening_text)
    text = adapter.invocation_text
    head = tokenizer.decode(list(adapter.invocation_tokens[:1]), skip_special_tokens=False)
    if not head or not text.startswith(head) or "\ufffd" in text:
        raise AdapterError(
            f"{adapter.name}: its invocation sequence {list(adapter.invocation_tokens)} decodes to {text!r}, in which "
            f"the first token ({head!r}) cannot be replaced as text",
            hint="train with an invocation sequence that is the tokenisation of a text",
        )
    return Placement(adapter.name, adapter.token, text, text[len(head) :], place=adapter.invocation_placement)


def prove(
    spec: SwitchSpec,
    placements: Sequence[Placement],
    template: str,
    base: str,
    samples: Sequence[Chat],
    tokenizer: Tokenizer,
) -> None:
    """Render, tokenise and substitute every sample chat with every adapter.

    Args:
        spec: the adapters.
        placements: one for each active adapter.
        template: the composed chat template.
        base: the base's chat template.
        samples: chats that the base's template renders.
        tokenizer: a tokenizer with the control tokens.

    Raises:
        AdapterError: lists every deviation from what is expected.
    """
    problems: list[str] = []
    for adapter, place in zip(spec.active, placements, strict=True):
        for sample in samples:
            problem = _prove_one(adapter, place, template, base, sample, tokenizer)
            if problem and problem not in problems:
                problems.append(problem)
    if problems:
        raise AdapterError(
            "an invocation sequence does not survive tokenisation after its control token",
            problems=problems,
            hint="train with an invocation text that begins with a special token or ends at the end of a word",
        )


def templates(
    bases: Mapping[str, str], spec: SwitchSpec, placements: Sequence[Placement], tokenizer: Tokenizer
) -> dict[str, str]:
    """Return the composed chat templates by name.

    Args:
        bases: the base's chat templates by name.
        spec: the adapters.
        placements: one for each active adapter.
        tokenizer: a tokenizer with the control tokens.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    spaced = sorted(repr(token.content) for token in added if " " in token.content.strip())
    if spaced:  # users' text could form them when a control token in it becomes a space
        raise BaseModelError("the base's tokenizer has special tokens with a space in them", problems=spaced)
    opening = tokenizer.decode([spec.base_substitute_token_id], skip_special_tokens=False)
    back, texts = Return(spec.base_token, opening), added_texts(spec, tokenizer)
    return {name: wrap(base, placements, back, texts) for name, base in bases.items()}


def _prove_one(
    adapter: AdapterSpec, place: Placement, template: str, base: str, sample: Chat, tokenizer: Tokenizer
) -> str:
    variables = dict(sample.variables)
    if place.invocation and place.invocation not in sample.text:
        variables = sample.with_text(place.invocation)
        if place.invocation not in render(base, **variables):
            return f"{adapter.name}: the base's template changes {place.invocation!r} in a message"
    text = render(template, adapter_name=adapter.name, **variables)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if ids.count(adapter.token_id) != 1:
        return f"{adapter.name}: {ids.count(adapter.token_id)} control tokens in {json.dumps(text)}"
    at = ids.index(adapter.token_id)
    substituted = [adapter.substitute_token_id if i == adapter.token_id else i for i in ids]
    if adapter.technology == "lora":
        wanted = tokenizer.encode(render(base, **variables), add_special_tokens=False).ids
        problem = f"{adapter.name}: the prompt gives {substituted[:8]}..., the base's is {wanted[:8]}..."
        return "" if substituted == wanted else problem
    got = substituted[at : at + len(adapter.invocation_tokens)]
    wanted = list(adapter.invocation_tokens)
    return "" if got == wanted else f"{adapter.name}: trained with {wanted}, the prompt gives {got}"
