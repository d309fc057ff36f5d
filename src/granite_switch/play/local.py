"""The engine in this process, with transformers. It serves one conversation at a time; others wait."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from granite_switch.conversation import Conversation, Turn
from granite_switch.errors import SwitchError
from granite_switch.hf.conversation import Conversation as Cached
from granite_switch.hf.conversation import Reply
from granite_switch.play.engine import Answer, Ask, Model, Sampling, Setting, fitting


class Local:
    """The engine in this process.

    Args:
        model: a loaded switch model.
        files: its folder's files.
    """

    def __init__(self, model: Any, files: Model) -> None:
        self.model, self.files = model, files
        self.limit = files.limit
        self.place = f"transformers, on {model.device}"
        self._lock = Lock()
        self._embedded = 0  # tokens that the model has read since the turn began
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self._embedded += output.shape[-2]

    def conversation(self, setting: Setting) -> Conversation:
        """As `Engine.conversation`."""
        return _Bounded(self.model, self.files, setting)

    def stream(
        self, talk: Conversation, ask: Ask, sampling: Sampling, stop: Event
    ) -> Generator[str | Answer, None, None]:
        """As `Engine.stream`. Closing the generator stops the model."""
        assert isinstance(talk, _Bounded)
        with self._alone(stop):
            self._embedded = 0
            run = _Run(talk, ask, _options(sampling), self.limit, stop, lambda: self._embedded)
            run.start()
            try:
                while (ids := run.pieces.get()) is not None:
                    yield self.files.decode(ids)
            finally:
                stop.set()
                run.join()
            reply = run.reply()
        cached = len(reply.turn.ids) - run.computed
        yield Answer(reply.turn, reply.ids, reply.text, cached, run.first, run.seconds)

    def batch(self, turns: Sequence[Turn], sampling: Sampling, stop: Event) -> list[tuple[int, ...]]:
        """As `Engine.batch`, in one batch, padded on the left."""
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = config.pad_token_id if config.pad_token_id is not None else ends[0] or 0
        width = max(len(turn.ids) for turn in turns)
        ids = torch.tensor([[pad] * (width - len(turn.ids)) + list(turn.ids) for turn in turns])
        mask = torch.tensor([[0] * (width - len(turn.ids)) + [1] * len(turn.ids) for turn in turns])
        with self._alone(stop):
            output = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                pad_token_id=pad,
                stopping_criteria=[_Stop(stop, self.limit)],
                **_options(sampling),
            )
        return [_until(row, ends) for row in output[:, width:].tolist()]

    @contextmanager
    def _alone(self, stop: Event) -> Iterator[None]:
        while not self._lock.acquire(timeout=0.1):
            if stop.is_set():
                raise SwitchError("stopped before the model was free")
        try:
            yield
        finally:
            self._lock.release()


class _Bounded(Cached):
    """A conversation that refuses turns without room for an answer."""

    def __init__(self, model: Any, files: Model, setting: Setting) -> None:
        super().__init__(model, files.folder, **setting.options())
        self.limit = files.limit

    def ask(self, *arguments: Any, **options: Any) -> Turn:
        turn = super().ask(*arguments, **options)
        try:
            return fitting(turn, self.limit)
        except SwitchError:
            self.withdraw()
            raise


class _Run(Thread, BaseStreamer):
    """One turn in its own thread. `pieces` receives the ids so far after each token, and None at the end."""

    def __init__(self, talk: Cached, ask: Ask, options: dict[str, Any], limit: int, stop: Event, embedded: Any) -> None:
        super().__init__(daemon=True)
        self.pieces: Queue[tuple[int, ...] | None] = Queue()
        self.computed, self.first, self.seconds = 0, 0.0, 0.0
        self._talk, self._ask, self._embedded = talk, ask, embedded
        self._options = {**options, "streamer": self, "stopping_criteria": [_Stop(stop, limit)]}
        self._ids: tuple[int, ...] | None = None  # None until `put` has received the prompt, which comes first
        self._outcome: Reply | BaseException | None = None

    def run(self) -> None:
        self._began = time.perf_counter()
        try:
            ask = self._ask
            self._outcome = self._talk.say(ask.text, ask.adapter, keep=ask.keep, **self._options)
        except BaseException as error:  # raised again by `reply`
            self._outcome = error
        self.seconds = time.perf_counter() - self._began
        self.pieces.put(None)

    def reply(self) -> Reply:
        if isinstance(self._outcome, Reply):
            return self._outcome
        if isinstance(self._outcome, torch.OutOfMemoryError):
            raise SwitchError("the device ran out of memory in this turn", hint="start a new conversation") from None
        raise self._outcome or RuntimeError("the turn ended without an answer")

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._ids is None:
            self._ids = ()
            return
        if not self._ids:
            self.first, self.computed = time.perf_counter() - self._began, self._embedded()
        self._ids = (*self._ids, *value.flatten().tolist())
        self.pieces.put(self._ids)

    def end(self) -> None:
        """Called by `generate` at the end."""


class _Stop(StoppingCriteria):
    def __init__(self, stop: Event, limit: int) -> None:
        self.stop, self.limit = stop, limit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        over = self.stop.is_set() or input_ids.shape[1] >= self.limit
        return torch.full((len(input_ids),), over, device=input_ids.device)


def _options(sampling: Sampling) -> dict[str, Any]:
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    return {"do_sample": bool(chosen), "max_new_tokens": sampling.max_new_tokens, **chosen}


def _until(ids: list[int], ends: Sequence[int | None]) -> tuple[int, ...]:
    """A row up to its end token, without padding."""
    at = next((place for place, token in enumerate(ids, 1) if token in ends), len(ids))
    return tuple(ids[:at])
