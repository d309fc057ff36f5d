"""The engine in this process, with transformers. It serves one conversation at a time; others wait."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
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
from granite_switch.play.engine import Answer, Ask, Model, Sampling, Setting


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
        return Cached(self.model, self.files.folder, **setting.options())

    def stream(
        self, talk: Conversation, ask: Ask, sampling: Sampling, stop: Event
    ) -> Generator[str | Answer, None, None]:
        """As `Engine.stream`. Closing the generator stops the model."""
        assert isinstance(talk, Cached)
        with self._alone(stop):
            self._embedded = 0
            say = partial(talk.say, ask.text, ask.adapter, keep=ask.keep, **self._options(sampling, stop))
            run = _Run(say, lambda: self._embedded)
            run.start()
            try:
                while (ids := run.pieces.get()) is not None:
                    yield self.files.decode(ids)
            finally:
                stop.set()
                run.join()
            try:
                reply = run.reply.result()
            except torch.OutOfMemoryError:
                raise SwitchError("the device ran out of memory", hint="start a new conversation") from None
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
                **self._options(sampling, stop),
            )
        return [_until(row, ends) for row in output[:, width:].tolist()]

    def _options(self, sampling: Sampling, stop: Event) -> dict[str, Any]:
        """The arguments for `generate`."""
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
        options = {"do_sample": bool(chosen), "max_new_tokens": sampling.max_new_tokens, **chosen}
        return {**options, "stopping_criteria": [_Stop(stop, self.limit)]}

    @contextmanager
    def _alone(self, stop: Event) -> Iterator[None]:
        while not self._lock.acquire(timeout=0.1):
            if stop.is_set():
                raise SwitchError("stopped before the model was free")
        try:
            yield
        finally:
            self._lock.release()


class _Run(Thread, BaseStreamer):
    """One turn in its own thread.

    Args:
        say: runs the turn.
        embedded: returns how many tokens the model has read in this turn.
    """

    def __init__(self, say: Callable[..., Reply], embedded: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self.pieces: Queue[tuple[int, ...] | None] = Queue()  # the ids so far after each token, and None at the end
        self.reply: Future[Reply] = Future()
        self.computed, self.first, self.seconds = 0, 0.0, 0.0
        self._say, self._embedded = say, embedded
        self._ids: tuple[int, ...] | None = None  # None until `put` has received the prompt, which comes first

    def run(self) -> None:
        self._began = time.perf_counter()
        try:
            self.reply.set_result(self._say(streamer=self))
        except BaseException as error:
            self.reply.set_exception(error)
        self.seconds = time.perf_counter() - self._began
        self.pieces.put(None)

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


def _until(ids: list[int], ends: Sequence[int | None]) -> tuple[int, ...]:
    """A row up to its end token, without padding."""
    at = next((place for place, token in enumerate(ids, 1) if token in ends), len(ids))
    return tuple(ids[:at])
