"""Check that each prompt ends in the slot of the adapter that its request names, and count prompts by adapter.

The check reads the token ids that reach the engine. So it covers all endpoints, and everything that can lose a control
token on the way: a foreign chat template, a truncated prompt, another model's tokenizer.
"""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from granite_switch.core.spec import SwitchSpec
from granite_switch.vllm.calls import Refused, last_slot

# vLLM's beam search sends the engine a request of its own for every token
_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")


@dataclass
class Asked:
    """What the current HTTP request asks for; the middleware fills it in."""

    model: str = ""
    slot: int | None = None
    refused: Refused | None = None
    beams: set[str] = field(default_factory=set)


asked: ContextVar[Asked | None] = ContextVar("granite_switch_asked", default=None)


def watch(engine: Any, spec: SwitchSpec, model: str) -> None:
    """Make an engine's `generate` check and count every prompt. May be called more than once."""
    if hasattr(engine, "granite_switch_watched"):
        return
    engine.granite_switch_watched = True
    engine.generate = _watched(engine.generate, spec, _counters(), model)


def _watched(generate: Callable[..., Any], spec: SwitchSpec, counters: "_Counters", model: str) -> Callable[..., Any]:
    names = ("base", *(adapter.name for adapter in spec.adapters))
    controls = spec.control_slots

    def watched(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request, ids = asked.get(), _ids(prompt)
        if request and _later_beam(request, kwargs.get("request_id", args[1] if len(args) > 1 else "")):
            return generate(prompt, *args, **kwargs)
        slot = None if ids is None else last_slot(ids, controls)
        if request and request.slot is not None and request.slot != slot:
            raise _error(names[request.slot], None if slot is None else names[slot], spec)
        outputs = generate(prompt, *args, **kwargs)
        return outputs if slot is None else _counted(outputs, counters, (model, names[slot]), len(ids or ()))

    return watched


async def _counted(
    outputs: AsyncGenerator[Any, None], counters: "_Counters", labels: tuple[str, str], tokens: int
) -> AsyncGenerator[Any, None]:
    counters.requests.labels(*labels).inc()
    first = True
    async with aclosing(outputs):
        async for output in outputs:
            if first:
                counters.prompt.labels(*labels).inc(tokens)
                counters.cached.labels(*labels).inc(output.num_cached_tokens or 0)
                first = False
            yield output


def _ids(prompt: Any) -> Any:
    """The token ids in a prompt for `generate`; None if it has none."""
    if isinstance(prompt, dict):
        prompt = prompt.get("decoder_prompt") or prompt
        return prompt.get("prompt_token_ids")
    return getattr(prompt, "prompt_token_ids", None)


def _later_beam(request: Asked, request_id: str) -> bool:
    """Whether a request continues a beam search whose first request was checked and counted."""
    if not (found := _BEAM.search(request_id)):
        return False
    root = request_id[: found.start()]
    later = root in request.beams
    request.beams.add(root)
    return later


def _error(named: str, actual: str | None, spec: SwitchSpec) -> Any:
    from vllm.exceptions import VLLMValidationError

    if actual is None:
        text = f"{named}: the prompt has no token ids, from which adapters are read"
    elif named == "base":
        text = f"the request names no adapter, but its prompt switches to {actual}"
    else:
        found = "has no control token" if actual == "base" else f"ends in {actual}"
        text = (
            f"the request names {named}, but its prompt {found}: put {spec.adapter(named).token} where the adapter "
            "should start; if truncate_prompt_tokens or truncation cut it off, send a shorter prompt"
        )
    return VLLMValidationError(text)


@dataclass(frozen=True)
class _Counters:
    requests: Any
    prompt: Any
    cached: Any


@cache
def _counters() -> _Counters:
    """Counters in prometheus_client's default registry, which vLLM exposes at /metrics."""
    from prometheus_client import Counter

    labels = ("model_name", "adapter")
    return _Counters(
        Counter("granite_switch_requests", "Prompts sent to the engine, by adapter.", labels),
        Counter("granite_switch_prompt_tokens", "Prompt tokens, by adapter.", labels),
        Counter("granite_switch_cached_tokens", "Prompt tokens read from the prefix cache, by adapter.", labels),
    )
