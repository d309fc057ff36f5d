"""The chat template of a composed model: the base's, wrapped.

The base's template is rendered as it is and the control token is placed in the finished text, so any template works.
Rendering here follows transformers' environment, to prove placements without importing transformers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
# transformers notes where `{% generation %}` is in the output, so it may be only where output is written. In the
# base's template a call of a macro takes its place, which leaves a mark; two tabs tell its end from other calls'.
_GENERATION = (re.compile(r"({%[-+]?\s*)generation(\s*[-+]?%})"), r"\1call switch_generation()\2")
_ENDGENERATION = (re.compile(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})"), "\\1endcall\t\t\\2")
_HINT = "rename what it calls `switch_...`"
_TEXT = "{{- switch.text -}}"
_MASKED = """\
{%- for piece in switch.text.split(switch.cut) -%}
    {%- if loop.first -%}{{- piece -}}
    {%- elif piece[:1] == '(' -%}{%- generation -%}{{- piece[1:] -}}{%- endgeneration -%}
    {%- else -%}{{- piece[1:] -}}{%- endif -%}
{%- endfor -%}"""


@dataclass(frozen=True)
class Placement:
    """How the template places one adapter's control token."""

    name: str
    token: str
    invocation: str = ""  # aLoRA: the text whose last occurrence turns the adapter on
    rest: str = ""  # aLoRA: that text without its first token's
    opening: str = ""  # LoRA: the text of the prompt's first token
    place: str = ""  # aLoRA: "prefix" or "suffix", where a message that lacks the text gets it; "": an error


@dataclass(frozen=True)
class Return:
    """How the template places the return-to-base token: in the place of what opens a turn."""

    token: str
    opening: str


def wrap(base: str, placements: Sequence[Placement], back: Return, controls: Sequence[str]) -> str:
    """The composed template.

    Args:
        base: the base model's template.
        placements: of the adapters that can be named.
        back: to the base model.
        controls: the text of every token that composing added; a space where users write it.

    Raises:
        TemplateError: the base's template cannot be wrapped.
    """
    # jinja drops one newline at a template's end; inside the wrapper it would stay
    base = base.removesuffix("\n").removesuffix("\r")
    masked = _ENDGENERATION[0].sub(_ENDGENERATION[1], _GENERATION[0].sub(_GENERATION[1], base))
    adapters = {p.name: _record(p, key) for key, p in enumerate(placements, 1)}
    parts = {
        "ADAPTERS": _json(adapters),
        "RETURN": _json({"key": "#0;", **asdict(back)}),
        "TEXTS": _json([{"head": text[:-2], "tail": text[-2:]} for text in controls]),
        "MASKS": _json(masked != base),
        "OUTPUT": _TEXT if masked == base else _MASKED,
        "BASE": masked,
    }
    text = _TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")
    wrapped = re.sub("@@([A-Z]+)@@", lambda found: parts[found[1]], text)
    if unwrap(wrapped) != base + "\n":
        raise TemplateError("the base's chat template holds what marks its place in a composed one", hint=_HINT)
    return wrapped


def unwrap(template: str) -> str | None:
    """The base's template inside a composed one, with the newline at its end that jinja drops; None if not composed."""
    _, before, rest = template.partition(_BEFORE)
    base, after, _ = rest.rpartition(_AFTER)
    base = base.replace("call switch_generation()", "generation").replace("endcall\t\t", "endgeneration")
    return base + "\n" if before and after else None


def _record(placement: Placement, key: int) -> dict[str, str]:
    record = {"key": f"#{key};", "token": placement.token, "invocation": placement.invocation}
    if placement.invocation:
        return {**record, "rest": placement.rest, "place": placement.place}
    return {**record, "opening": placement.opening, "place": ""}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


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
    except jinja2.TemplateError as error:
        raise TemplateError(f"chat template: {error}") from None
    except Exception as error:  # a template can divide by zero, recurse without end, fill memory
        raise TemplateError(f"chat template: {type(error).__name__}: {error}") from None


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
