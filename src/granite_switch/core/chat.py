"""The chat template of a composed model, which wraps the base's.

The base's template is rendered unchanged and control tokens are placed in the rendered text, so any template works.
`render` uses the same Jinja environment as transformers, to prove placements without importing it.
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
# transformers records where the output of `{% generation %}` is, so the tag can only be where output is written. In the
# base's template a macro call replaces it, which writes marks; two tabs distinguish its end from that of other calls.
_GENERATION = (re.compile(r"({%[-+]?\s*)generation(\s*[-+]?%})"), r"\1call switch_generation()\2")
_ENDGENERATION = (re.compile(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})"), "\\1endcall\t\t\\2")
_HINT = "rename the template's variables and macros called `switch_...`"
_TEXT = "{{- switch.text -}}"
_MASKED = """\
{%- for piece in switch.text.split(switch.cut) -%}
    {%- if loop.first -%}{{- piece -}}
    {%- elif piece[:1] == '(' -%}{%- generation -%}{{- piece[1:] -}}{%- endgeneration -%}
    {%- else -%}{{- piece[1:] -}}{%- endif -%}
{%- endfor -%}"""


@dataclass(frozen=True)
class Placement:
    """The place of one adapter's control token in a rendered prompt."""

    name: str
    token: str
    invocation: str = ""  # aLoRA: the text whose last occurrence turns the adapter on
    rest: str = ""  # aLoRA: the invocation text after its first token
    opening: str = ""  # LoRA: the text of the prompt's first token
    place: str = ""  # aLoRA: write a missing invocation text as "prefix" or "suffix" of the message; "": raise an error


@dataclass(frozen=True)
class Return:
    """The place of the return-to-base token in a rendered prompt: it replaces the token that opens a turn."""

    token: str
    opening: str


def wrap(base: str, placements: Sequence[Placement], back: Return, controls: Sequence[str]) -> str:
    """Return the composed template.

    Args:
        base: the base model's template.
        placements: one for each active adapter.
        back: the placement of the return-to-base token.
        controls: the text of every token that composing added; users' text gets a space instead.

    Raises:
        TemplateError: the base's template cannot be wrapped.
    """
    # jinja reads every newline as \n and drops one at the end; inside the wrapper the last one would be kept
    base = re.sub("\r\n?", "\n", base).removesuffix("\n")
    masked = _ENDGENERATION[0].sub(_ENDGENERATION[1], _GENERATION[0].sub(_GENERATION[1], base))
    adapters = {p.name: _record(p, key) for key, p in enumerate(placements, 1)}
    parts = {
        "ADAPTERS": _json(adapters),
        "RETURN": _json({"key": "#0;", **asdict(back)}),
        "TEXTS": _json(list(controls)),
        "MASKS": _json(masked != base),
        "OUTPUT": _TEXT if masked == base else _MASKED,
        "BASE": masked,
    }
    text = _TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")
    wrapped = re.sub("@@([A-Z]+)@@", lambda found: parts[found[1]], text)
    if unwrap(wrapped) != base + "\n":
        raise TemplateError("the base's chat template already contains the markers that compose writes", hint=_HINT)
    return wrapped


def unwrap(template: str) -> str | None:
    """Return the base's template from a composed one, with the final newline that jinja drops; None if not composed."""
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
    """Render a chat template like `tokenizer.apply_chat_template(..., tokenize=False)`.

    Args:
        template: a Jinja template.
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
    except Exception as error:  # a template can divide by zero, recurse without end, exhaust memory
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
    """transformers' tag `{% generation %}` around the assistant's text; ignored here."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
