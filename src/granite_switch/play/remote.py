"""The engine on a running server, `granite-switch serve` or `vllm serve`. Prompts and answers are sent as token ids.

So the server computes exactly the ids that are rendered here, and the trace is exact. Cache counts are the server's.
"""

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx

from granite_switch.conversation import Conversation, Turn
from granite_switch.core.border import Count, Record, TokenId, checked
from granite_switch.errors import ServingError, SwitchError
from granite_switch.play.engine import Answer, Ask, Model, Sampling, Setting


class Card(Record):
    """A model of /v1/models."""

    id: str
    parent: str | None = None
    max_model_len: Count | None = None


class Models(Record):
    """The answer of /v1/models."""

    data: list[Card]


class Choice(Record):
    """Of an event: new tokens."""

    text: str | None = None
    token_ids: list[TokenId] | None = None


class CachedTokens(Record):
    """`prompt_tokens_details` of an event's usage."""

    cached_tokens: int | None = None


class Usage(Record):
    """`usage` of an event."""

    prompt_tokens_details: CachedTokens | None = None


class Streamed(Record):
    """A line of a completion that is streamed."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class Remote:
    """The engine on a server.

    Args:
        url: the server's URL, with or without /v1.
        files: the model folder's files.
        key: the server's API key, if it has one.

    Raises:
        ServingError: there is no server, or it serves another model.
    """

    def __init__(self, url: str, files: Model, key: str = "") -> None:
        self.url, self.files = url.rstrip("/").removesuffix("/v1"), files
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(600, connect=10))
        with self._reaching():
            answer = self._client.get("/v1/models")
            if answer.status_code != 200:
                raise ServingError(
                    f"{self.url} answers {answer.status_code} {_message(answer.text) or answer.reason_phrase}"
                )
            models = checked(Models, answer.json(), f"{self.url}/v1/models", ServingError).data
        cards = {card.id: card for card in models}
        self._name, self._models = _names(self.url, cards, files.spec.names)
        self.limit = min(files.limit, cards[self._name].max_model_len or files.limit)
        self.place = f"{self.url}, which serves it as {self._name}"

    def conversation(self, setting: Setting) -> Conversation:
        """As `Engine.conversation`."""
        return Conversation(self.files.folder, **setting.options())

    def stream(
        self, talk: Conversation, ask: Ask, sampling: Sampling, stop: Event
    ) -> Generator[str | Answer, None, None]:
        """As `Engine.stream`."""
        turn = talk.ask(ask.text, ask.adapter, keep=ask.keep)
        try:
            started, first, seconds = time.perf_counter(), 0.0, 0.0
            ids: tuple[int, ...] = ()
            usage: Usage | None = None
            for new, said in self._events(turn, sampling, stop):
                usage = said or usage
                if new:
                    seconds = time.perf_counter() - started
                    first = first or seconds
                    ids = (*ids, *new)
                    yield self.files.decode(ids)
            if not ids:
                raise SwitchError("stopped before the first token" if stop.is_set() else "the server sent no tokens")
            text = talk.answer(ids)
        except BaseException:  # GeneratorExit too: the reader left
            talk.withdraw()
            raise
        yield Answer(turn, ids, text, _cached(usage), first, seconds)

    def batch(self, turns: Sequence[Turn], sampling: Sampling, stop: Event) -> list[tuple[int, ...]]:
        """As `Engine.batch`, with concurrent requests, which the server batches."""

        def whole(turn: Turn) -> tuple[int, ...]:
            return tuple(token for new, _ in self._events(turn, sampling, stop) for token in new)

        with ThreadPoolExecutor(len(turns)) as pool:
            return list(pool.map(whole, turns))

    def _events(self, turn: Turn, sampling: Sampling, stop: Event) -> Iterator[tuple[Sequence[int], Usage | None]]:
        """Yield new token ids, and the usage when the server reports it."""
        request = turn.completion(
            self._models.get(turn.adapter, self._name),
            stream=True,
            stream_options={"include_usage": True},
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_new_tokens, self.limit - len(turn.ids)),
        )
        with self._reaching(), self._client.stream("POST", "/v1/completions", json=request) as answer:
            if answer.status_code != 200:
                answer.read()
                raise ServingError(f"the server refused the request: {_message(answer.text)}")
            for line in answer.iter_lines():
                if stop.is_set() or line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield _event(line.removeprefix("data: "))
            raise ServingError(
                "the server stopped in the middle of an answer", hint="check its log, then send the message again"
            )

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise ServingError(
                f"the server {self.url} does not answer ({str(error) or type(error).__name__})",
                hint=f"start it with: granite-switch serve {self.files.folder}",
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SwitchError):
                raise
            raise ServingError(f"{self.url} does not answer like an OpenAI server ({error!r})") from None


def _names(url: str, cards: Mapping[str, Card], adapters: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The served name, and adapter -> model name, which is empty if the server lists no adapters.

    Raises:
        ServingError: the adapters are not this model's.
    """
    names = [name for name, card in cards.items() if not card.parent]
    if not names:
        raise ServingError(f"{url} serves no model")
    mine = {key.removeprefix(f"{names[0]}:"): key for key, card in cards.items() if card.parent == names[0]}
    if mine and set(mine) != set(adapters):
        raise ServingError(
            f"{url} serves another model, with the adapters {', '.join(sorted(mine))}",
            hint=f"this model's adapters are {', '.join(sorted(adapters))}",
        )
    return names[0], mine


def _event(text: str) -> tuple[Sequence[int], Usage | None]:
    event = checked(Streamed, json.loads(text), "the server's answer", ServingError)
    if event.error is not None:
        raise ServingError(f"error from the server: {_message(text)}")
    new: list[int] = []
    for choice in event.choices or ():
        if choice.text and choice.token_ids is None:
            raise ServingError("the server sends no token ids", hint="use vLLM 0.29 or later")
        new += choice.token_ids or ()
    return new, event.usage


def _message(body: str) -> str:
    """The message in an error response's body, in any of the forms that servers use."""
    try:
        data = json.loads(body)
    except ValueError:
        return "" if body.lstrip().startswith("<") else body.strip()[:300]
    if not isinstance(data, dict):
        return str(data)[:300]
    error = data.get("error", data)
    return str(error.get("message", error) if isinstance(error, dict) else data.get("detail", error))


def _cached(usage: Usage | None) -> int | None:
    details = usage.prompt_tokens_details if usage else None
    return details.cached_tokens if details else None
