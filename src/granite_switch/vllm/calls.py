"""Which adapter an HTTP request names, and the body that vLLM gets instead of the client's.

Plain functions on parsed JSON, which the middleware in `serve.py` calls. None of them places a control token: the chat
template does, and `engine.py` checks that the prompt that reaches the engine is in the named adapter's slot.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from granite_switch.core.chat import unwrap
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import SwitchError

# endpoints that render the chat template
_CHAT = {
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/responses",
    "/v1/responses/render",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
}
_PROMPT = {"/v1/completions", "/v1/completions/render", "/inference/v1/generate", "/detokenize"}
_EITHER = {"/tokenize", "/invocations"}  # depends on the body
PATHS = frozenset(_CHAT | _PROMPT | _EITHER)


class Refused(Exception):
    """Ends a request with this HTTP status and message."""

    def __init__(self, message: str, status: int = 400) -> None:
        self.message, self.status = message, status
        super().__init__(message)


@dataclass(frozen=True)
class Call:
    """A request as read."""

    body: bytes  # for vLLM
    model: str = ""  # `model` in the response; empty: as vLLM sets it
    slot: int | None = None  # the slot in which the prompt must end; None: any


@dataclass(frozen=True)
class Catalogue:
    """The models that a server offers: each served name, alone and with each adapter."""

    names: tuple[str, ...]
    spec: SwitchSpec
    defaults: Mapping[str, Any] = field(default_factory=dict)  # --default-chat-template-kwargs
    per_message: bool = True  # whether the chat template reads `message_adapters`
    max_model_len: int = 0

    def problems(self) -> list[str]:
        """Problems with the server's options."""
        doubles = {f"{name}:{adapter}" for name in self.names for adapter in self.spec.names} & set(self.names)
        problems = [f"--served-model-name {name}: is also the name of an adapter's model" for name in sorted(doubles)]
        default = self.defaults.get("adapter_name")
        if default and default not in ("base", *self.spec.names):
            problems.append(f"--default-chat-template-kwargs: there is no adapter {default!r}")
        return problems

    def cards(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The entries of /v1/models for the adapters, derived from the base's entry."""
        name = base["id"]
        return [
            {
                **base,
                "id": f"{name}:{a.name}",
                "parent": name,
                "technology": a.technology,
                "invocation": a.invocation_text,
            }
            for a in self.spec.active
        ]

    def read(self, path: str, body: bytes) -> Call:
        """Find the adapter that a request names, and rewrite its body for vLLM.

        Args:
            path: one of PATHS.
            body: as the client sent it; if it is not a JSON object, vLLM rejects it.

        Raises:
            Refused: the request names an unknown adapter, or two different ones, or vLLM could read it differently.
        """
        try:
            data = json.loads(body)
            return self._call(path, data, body) if isinstance(data, dict) else Call(body)
        except json.JSONDecodeError:
            return Call(body)
        except (ValueError, RecursionError) as error:  # other text encodings, long numbers, deep nesting
            raise Refused(f"the body cannot be read as JSON: {error}") from None

    def _call(self, path: str, data: dict[str, Any], body: bytes) -> Call:
        name, adapter = self._split(data.get("model"))
        if path == "/invocations" and name is not None and name not in self.names:
            raise Refused(f"The model `{name}` does not exist.", 404)  # vLLM ignores the name at this endpoint
        kwargs = data.get("chat_template_kwargs") or {}
        change: dict[str, Any] = {"model": name} if adapter else {}
        slot: int | None
        if self._is_chat(path, data):
            if not isinstance(kwargs, dict):
                return Call(body)  # vLLM rejects it
            more, slot = self._chat(path, data, kwargs, adapter)
            change |= more
        else:
            slot = self._prompt(data, kwargs if isinstance(kwargs, dict) else {}, adapter)
        new = json.dumps(data | change).encode() if change else body
        return Call(new, data["model"] if adapter else "", slot)

    def _is_chat(self, path: str, data: Mapping[str, Any]) -> bool:
        """Whether vLLM renders the chat template."""
        if path not in _EITHER:
            return path in _CHAT
        if data.get("prompt") is not None and data.get("messages") is not None:
            raise Refused("the request has a prompt and messages; send one of them")
        return data.get("prompt") is None

    def _split(self, model: Any) -> tuple[Any, str]:
        """The served name and the adapter in a request's `model`; no adapter is an empty string."""
        if not isinstance(model, str) or model in self.names:
            return model, ""
        for name in sorted(self.names, key=len, reverse=True):
            if model.startswith(f"{name}:"):
                adapter = model[len(name) + 1 :]
                if adapter in self.spec.names:
                    return name, adapter
                raise Refused(f"The model `{model}` does not exist. Adapters of `{name}`: {self._list()}.", 404)
        return model, ""

    def _chat(
        self, path: str, data: Mapping[str, Any], kwargs: Mapping[str, Any], adapter: str
    ) -> tuple[dict[str, Any], int]:
        for template in (data.get("chat_template"), kwargs.get("chat_template")):
            if template is not None and unwrap(str(template)) is None:
                raise Refused("chat_template is not a composed model's, so adapters and users' text would be misread")
        key = "input" if path.startswith("/v1/responses") else "messages"
        messages = data.get(key)
        own = self._from_messages(messages) if isinstance(messages, list) else [None]
        listed = self._per_user_message(data, kwargs.get("message_adapters"), own if any(own) else None)
        last = listed[len(own) - 1] if own and len(listed) >= len(own) else None
        named = self._agreed(model=adapter, adapter_name=kwargs.get("adapter_name"), message=last)
        new: dict[str, Any] = {"adapter_name": adapter} if adapter else {}
        change: dict[str, Any] = {}
        if any(own) and isinstance(messages, list):
            new["message_adapters"] = [*own[:-1], named]
            change[key] = [_without(message) for message in messages]
        if new:
            change["chat_template_kwargs"] = {**kwargs, **new}
        return change, self._slot(named or self.defaults.get("adapter_name"))

    def _from_messages(self, messages: list[Any]) -> list[str | None]:
        """The adapter of each user message, from the messages' own `adapter`."""
        found: list[str | None] = []
        for message in messages:
            if isinstance(message, list) and any(isinstance(m, dict) and m.get("adapter") for m in message):
                raise Refused("adapter: messages of a batch cannot name adapters")
            if not isinstance(message, dict):
                continue
            name = message.get("adapter") or None
            if message.get("role") == "user" and _is_text(message):
                self._slot(name)
                found.append(name)
            elif name:
                raise Refused(f"adapter: only user messages can name one; {name!r} is in another message")
        return found

    def _per_user_message(self, data: Mapping[str, Any], given: Any, own: Sequence[str | None] | None) -> list[Any]:
        """The adapter of each user message, from the messages or `message_adapters`; empty if neither names any."""
        if own is not None and given not in (None, own):
            raise Refused("message_adapters differs from the messages' own `adapter`")
        listed = given if own is None else own
        if listed is None:
            return []
        if not isinstance(listed, list):
            raise Refused("message_adapters must be a list with an entry for each user message")
        if not self.per_message:
            raise Refused(
                "an adapter for each message: the model's chat template does not support it; compose the model with "
                "this release, or name the adapter of the next turn in `model`"
            )
        if data.get("truncate_prompt_tokens") is not None or data.get("truncation") == "auto":
            raise Refused("an adapter for each message: a truncated prompt could lose control tokens; do not truncate")
        if data.get("previous_response_id"):
            raise Refused("an adapter for each message: send all messages, not previous_response_id")
        return listed

    def _prompt(self, data: Mapping[str, Any], kwargs: Mapping[str, Any], adapter: str) -> int | None:
        named = self._agreed(model=adapter, adapter_name=kwargs.get("adapter_name"))
        limit = data.get("truncate_prompt_tokens")
        if limit is not None:
            if not isinstance(limit, int):
                raise Refused("truncate_prompt_tokens must be an integer")  # vLLM takes "5" and 5.0 too
            limit = self.max_model_len - 1 if limit < 0 else limit
            if any(self._can_be_cut(prompt, limit) for prompt in _prompts(data.get("prompt"))):
                raise Refused("truncate_prompt_tokens could cut off control tokens; send a shorter prompt")
        return None if named is None else self._slot(named)

    def _can_be_cut(self, prompt: str | list[Any], limit: int) -> bool:
        """Whether truncation to a limit could change the slot of any token of the prompt."""
        if isinstance(prompt, list):
            return len(prompt) > limit and any(token in self.spec.control_slots for token in prompt)
        texts = [self.spec.base_token, *(adapter.token for adapter in self.spec.adapters)]
        return len(prompt.encode("utf-8", "replace")) >= limit and any(text in prompt for text in texts)

    def _agreed(self, **named: Any) -> Any:
        """The one adapter that several places name; None if none does."""
        values = {place: value for place, value in named.items() if value not in (None, "")}
        if any(value != next(iter(values.values())) for value in values.values()):
            said = ", ".join(f"{place} {value!r}" for place, value in values.items())
            raise Refused(f"the request names different adapters: {said}")
        return next(iter(values.values()), None)

    def _slot(self, name: Any) -> int:
        if not name:
            return 0
        try:
            return self.spec.slot(name)
        except SwitchError:
            raise Refused(f"there is no adapter {name!r}. Adapters: {self._list()}") from None

    def _list(self) -> str:
        return ", ".join(self.spec.names)


def last_slot(tokens: Sequence[int], control_slots: Mapping[int, int]) -> int:
    """The slot of the last token of a sequence."""
    if control_slots.keys().isdisjoint(tokens):
        return 0
    return next(control_slots[token] for token in reversed(tokens) if token in control_slots)


def _prompts(prompt: Any) -> list[Any]:
    """The prompts in a /v1/completions body, which has one prompt or a list; each is text or token ids."""
    if isinstance(prompt, list) and any(isinstance(one, (str, list)) for one in prompt):
        return [one for one in prompt if isinstance(one, (str, list))]
    return [prompt] if isinstance(prompt, (str, list)) else []


def _is_text(message: Mapping[str, Any]) -> bool:
    """Whether a user message stays one: vLLM turns Anthropic's messages of tool results alone into tool messages."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return True
    return any(not isinstance(part, dict) or part.get("type") != "tool_result" for part in content)


def _without(message: Any) -> Any:
    return {k: v for k, v in message.items() if k != "adapter"} if isinstance(message, dict) else message
