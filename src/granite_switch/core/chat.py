"""The chat template of a composed model: the base's, wrapped.

The base's template is rendered as it is and the control token is placed in the finished text, so any template works.
Rendering here follows transformers' environment, to prove placements without importing transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from granite_switch.errors import TemplateError

_TEMPLATE = files("granite_switch.core").joinpath("templates/switch.jinja")
_BEFORE = "{%- set switch_rendered %}\n"
_AFTER = "{{ '' }}{% endset -%}\n"


@dataclass(frozen=True)
class Placement:
    """How the template places one adapter's control token."""

    name: str
    token: str
    invocation: str = ""  # aLoRA: the text whose last occurrence turns the adapter on
    rest: str = ""  # aLoRA: that text without its first token's
    opening: str = ""  # LoRA: the text of the prompt's first token


def wrap(base: str, placements: Sequence[Placement], controls: Sequence[str]) -> str:
    """The composed template.

    Args:
        base: the base model's template.
        placements: of the adapters that can be named.
        controls: the text of every control token, also of retired ones; removed from what users write.
    """
    adapters = {p.name: _record(p) for p in placements}
    text = _TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")
    text = text.replace("@@ADAPTERS@@", json.dumps(adapters, ensure_ascii=False))
    text = text.replace("@@CONTROLS@@", json.dumps(list(controls), ensure_ascii=False))
    # jinja drops one newline at a template's end; inside the wrapper it would stay
    return text.replace("@@BASE@@", base.removesuffix("\n").removesuffix("\r"))


def unwrap(template: str) -> str | None:
    """The base's template inside a composed one, with the newline at its end that jinja drops; None if not composed."""
    _, before, rest = template.partition(_BEFORE)
    base, after, _ = rest.rpartition(_AFTER)
    return base + "\n" if before and after else None


def _record(placement: Placement) -> dict[str, str]:
    if placement.invocation:
        return {"token": placement.token, "invocation": placement.invocation, "rest": placement.rest}
    return {"token": placement.token, "invocation": "", "opening": placement.opening}


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a chat template as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    Args:
        template: a template in Jinja.
        messages: the conversation.
        variables: `documents`, `tools`, `add_generation_prompt`, `adapter_name`, special tokens and the like.

    Raises:
        TemplateError: the template raised, or is not valid Jinja.
    """
    try:
        variables = {"tools": None, "documents": None, "add_generation_prompt": False} | variables
        return _compile(template).render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise TemplateError(f"chat template: {error}") from None


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, transformers' own tag around what the assistant wrote: rendered as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
