"""What reaches the engine: the check that each prompt is the named adapter's, and the counters.

Whatever can lose a control token on the way (a chat template that is not ours, a truncated prompt, a tokenizer of
another model) shows in the ids that the engine is given, so they are checked there, once for all endpoints.
"""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from granite_switch.core.spec import SwitchSpec
from granite_switch.vllm.calls import last_slot

# vLLM's beam search asks the engine for one token at a time, with requests of its own
_BEAM = re.compile(r"-[0-9a-f]+-beam-\d+$")


@dataclass
class Asked:
    """What the HTTP request that is being handled asks for; its middleware fills it in."""

    model: str = ""
    slot: int | None = None
    beams: set[str] = field(default_factory=set)


asked: ContextVar[Asked | None] = ContextVar("granite_switch_asked", default=None)


def watch(engine: Any, spec: SwitchSpec, model: str) -> None:
    """Have an engine's `generate` check and count each prompt. May be called more than once."""
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
    """The token ids of whatever vLLM hands to `generate`; None where it has none."""
    if isinstance(prompt, dict):
        prompt = prompt.get("decoder_prompt") or prompt
        return prompt.get("prompt_token_ids")
    return getattr(prompt, "prompt_token_ids", None)


def _later_beam(request: Asked, request_id: str) -> bool:
    """Whether a request to the engine continues one that was checked and counted."""
    if not (found := _BEAM.search(request_id)):
        return False
    root = request_id[: found.start()]
    later = root in request.beams
    request.beams.add(root)
    return later


def _error(named: str, actual: str | None, spec: SwitchSpec) -> Any:
    from vllm.exceptions import VLLMValidationError

    if actual is None:
        text = f"{named}: the prompt has no token ids, which adapters are read from"
    elif named == "base":
        text = f"the request names no adapter, but its prompt switches to {actual}"
    else:
        held = "holds no control token" if actual == "base" else f"ends under {actual}"
        text = (
            f"the request names {named}, but its prompt {held}: put {spec.adapter(named).token} where the adapter is "
            f"to act; if truncate_prompt_tokens or truncation cut it off, send a shorter prompt"
        )
    return VLLMValidationError(text)


@dataclass(frozen=True)
class _Counters:
    requests: Any
    prompt: Any
    cached: Any


@cache
def _counters() -> _Counters:
    """In prometheus_client's default registry, which vLLM shows at /metrics, for one process or several."""
    from prometheus_client import Counter

    labels = ("model_name", "adapter")
    return _Counters(
        Counter("granite_switch_requests", "Prompts given to the engine, by adapter.", labels),
        Counter("granite_switch_prompt_tokens", "Their tokens, by adapter.", labels),
        Counter("granite_switch_cached_tokens", "Those of them out of the prefix cache, by adapter.", labels),
    )
