"""Adapters as models: an ASGI middleware for vLLM's OpenAI server (`--middleware granite_switch.vllm.AdapterModels`).

`GET /v1/models` lists `NAME:ADAPTER` next to NAME. A request for `NAME:ADAPTER` becomes one for NAME that passes the
adapter to the chat template. Every request goes through vLLM's application, so its authentication, validation and
metrics apply: the body is rewritten when the application reads it. If it is refused, the application reads an empty
body, and its response is replaced.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from granite_switch.core.chat import unwrap
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import ServingError, SwitchError
from granite_switch.vllm.calls import PATHS, Call, Catalogue, Refused
from granite_switch.vllm.engine import Asked, asked, watch

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# vLLM replaces the body's `model` with this header's value after the middleware has read the body
_SAGEMAKER = b"x-amzn-sagemaker-adapter-identifier"


class AdapterModels:
    """The middleware. At startup it checks that the server serves a switch model with the model's chat template."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self._catalogue: Catalogue | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                self._prepare(scope["app"].state)
            except SwitchError as problem:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(problem)})
                return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        catalogue, path = self._prepare(scope["app"].state), _path(scope)
        request = Asked()
        token = asked.set(request)
        try:
            if scope["method"] == "POST" and path in PATHS:
                _uncompressed(scope)
                renamed = path == "/invocations" and _SAGEMAKER in dict(scope["headers"])
                receive = _Body(receive, _refuse_header if renamed else partial(catalogue.read, path), request)
                send = _Answer(send, request, lambda: partial(_rename, request.model) if request.model else None)
            elif scope["method"] == "GET" and path == "/v1/models":
                _uncompressed(scope)
                send = _Answer(send, request, lambda: partial(_list, catalogue))
            await self.app(scope, receive, send)
        finally:
            asked.reset(token)

    def _prepare(self, state: Any) -> Catalogue:
        if self._catalogue is None:
            self._catalogue = _catalogue(state)
            if state.engine_client is not None:
                watch(state.engine_client, self._catalogue.spec, self._catalogue.names[0])
        return self._catalogue


def _catalogue(state: Any) -> Catalogue:
    """What the server serves, from vLLM's application state.

    Raises:
        ServingError: the model is not a switch model, its chat template would ignore adapters, or names clash.
    """
    arguments, config = state.args, state.vllm_config.model_config
    spec = getattr(config.hf_config, "switch_spec", None)
    if spec is None:
        raise ServingError(f"{arguments.model} is not a switch model", hint="omit --middleware")
    if arguments.chat_template:
        templates = {"--chat-template": template_text(arguments.chat_template)}
    else:
        found = state.engine_client.renderer.get_tokenizer().chat_template or {}
        templates = {"chat template": found} if isinstance(found, str) else dict(found)
    names = tuple(arguments.served_model_name or [arguments.model])
    defaults = arguments.default_chat_template_kwargs or {}
    per_message = all("message_adapters" in text for text in templates.values())
    catalogue = Catalogue(names, spec, defaults, per_message, config.max_model_len)
    problems = catalogue.problems()
    problems += [
        f"{name}: {text}" for name, template in templates.items() if (text := template_problem(template, spec))
    ]
    if problems:
        raise ServingError("a switch model cannot be served with these settings", problems=problems)
    return catalogue


def template_text(value: str | Path) -> str:
    """The text of a chat template, given as vLLM takes it: a file, or the text itself."""
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError:
        return str(value)


def template_problem(template: str, spec: SwitchSpec | None = None) -> str:
    """Why a chat template cannot serve a model (without `spec`, any switch model); empty if it can."""
    if unwrap(template) is None:
        return (
            "places no control tokens: adapters would be ignored, and control tokens in users' text would switch. Omit "
            "it, or put it into the base model's folder as chat_template.jinja and compose again"
        )
    missing = [adapter.token for adapter in spec.active if adapter.token not in template] if spec else []
    return f"belongs to another model: it does not contain {', '.join(missing)}" if missing else ""


def _path(scope: Scope) -> str:
    """The request's path without `root_path`, as the application's router sees it."""
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _uncompressed(scope: Scope) -> None:
    """Keep the application from compressing a response that is rewritten here; outer middleware still may."""
    scope["headers"] = [(key, value) for key, value in scope["headers"] if key.lower() != b"accept-encoding"]


def _refuse_header(_: bytes) -> Call:
    raise Refused(f'{_SAGEMAKER.decode()}: name the adapter in the body instead: "model": "NAME:ADAPTER"')


class _Body:
    """Receives the request's body and rewrites it. The application reads the body after authentication.

    content-length stays the client's, which vLLM's metrics count.
    """

    def __init__(self, receive: Receive, read: Callable[[bytes], Call], request: Asked) -> None:
        self.receive, self.read, self.request = receive, read, request
        self.done = False

    async def __call__(self) -> Message:
        if self.done:
            return await self.receive()
        parts, more = [], True
        while more:
            message = await self.receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self.done = True
        return {"type": "http.request", "body": self._rewritten(b"".join(parts)), "more_body": False}

    def _rewritten(self, body: bytes) -> bytes:
        try:
            call = self.read(body)
        except Refused as refusal:
            self.request.refused = refusal
            return b""
        self.request.model, self.request.slot = call.model, call.slot
        return call.body


class _Answer:
    """Sends the response with its JSON rewritten: a whole body, or each event of a stream as it arrives."""

    def __init__(self, send: Send, request: Asked, rewriter: Callable[[], Callable[[Any], None] | None]) -> None:
        self.send, self.request, self.rewriter = send, request, rewriter
        self.rewrite: Callable[[Any], None] | None = None
        self.start: Message = {}
        self.kind, self.held = "", b""

    async def __call__(self, message: Message) -> None:
        if self.request.refused:
            if message["type"] == "http.response.start":
                await self._refuse(self.request.refused, message)
        elif message["type"] == "http.response.start":
            await self._started(message)
        elif message["type"] == "http.response.body" and self.kind:
            await self._passed(message.get("body", b""), message.get("more_body", False))
        else:
            await self.send(message)

    async def _refuse(self, refused: Refused, start: Message) -> None:
        """Send an error in OpenAI's format, as vLLM does, with the headers of other middleware."""
        kind = HTTPStatus(refused.status).phrase
        error = {"message": refused.message, "type": kind, "param": None, "code": refused.status}
        body = json.dumps({"error": error}).encode()
        headers = [(k, v) for k, v in start.get("headers", ()) if not k.lower().startswith(b"content-")]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def _started(self, message: Message) -> None:
        self.rewrite = self.rewriter() if message["status"] == 200 else None
        kind = dict(message.get("headers", ())).get(b"content-type", b"").partition(b";")[0].decode().strip()
        self.kind = kind if self.rewrite and kind in ("application/json", "text/event-stream") else ""
        self.start = message
        if self.kind != "application/json":
            await self.send(message)

    async def _passed(self, body: bytes, more: bool) -> None:
        self.held += body
        if self.kind == "application/json":
            if not more:
                body = self._json(self.held)
                headers = _with_length(self.start.get("headers", ()), len(body))
                await self.send({**self.start, "headers": headers})
                await self.send({"type": "http.response.body", "body": body})
            return
        *lines, self.held = self.held.split(b"\n") if more else [*self.held.split(b"\n"), b""]
        text = b"\n".join([self._line(line) for line in lines])
        if more and lines:
            text += b"\n"
        if text or not more:
            await self.send({"type": "http.response.body", "body": text, "more_body": more})

    def _line(self, line: bytes) -> bytes:
        return b"data: " + self._json(line[6:]) if line.startswith(b"data: {") else line

    def _json(self, text: bytes) -> bytes:
        try:
            data = json.loads(text)
            if self.rewrite:
                self.rewrite(data)
            return json.dumps(data, separators=(",", ":")).encode()
        except (ValueError, RecursionError):
            return text


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """The headers with a new content-length, if they have one."""
    return [(k, str(length).encode() if k.lower() == b"content-length" else v) for k, v in headers]


def _rename(model: str, data: Any) -> None:
    """Set `model` in a response, and in stream events that contain a whole response (`response`, `message`)."""
    if isinstance(data, dict):
        for holder in (data, data.get("response"), data.get("message")):
            if isinstance(holder, dict) and "model" in holder:
                holder["model"] = model


def _list(catalogue: Catalogue, data: Any) -> None:
    """Add the adapters to the response of /v1/models."""
    bases = [card for card in data["data"] if card["id"] in catalogue.names]
    data["data"] += [card for base in bases for card in catalogue.cards(base)]
