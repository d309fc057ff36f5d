"""Show the slot of each token of a sequence, in the terminal or as an HTML page."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from granite_switch.core import routing
from granite_switch.core.spec import SwitchSpec

# colours of adapters' slots in the terminal and on pages, reused in turn; the base has none
_TERMINAL = ("cyan", "magenta", "green", "yellow", "blue", "red")
INK = "#111111"
_PAGE = ("#b3e5fc", "#f8bbd0", "#c8e6c9", "#fff59d", "#d1c4e9", "#ffccbc", "#b2dfdb", "#ffe0b2")


@dataclass(frozen=True)
class Token:
    """One token of a traced sequence."""

    id: int
    text: str
    slot: int
    control: bool
    generated: bool


def trace(sequence: Sequence[int], prompt: int, spec: SwitchSpec, decode: Callable[[int], str]) -> list[Token]:
    """Each token with its slot.

    Args:
        sequence: token ids of the prompt and the generated text.
        prompt: length of the prompt.
        spec: the adapters.
        decode: token id -> text.
    """
    controls = spec.control_slots
    slots = routing.slots(sequence, controls)
    return [
        Token(token, decode(token), slot, token in controls, index >= prompt)
        for index, (token, slot) in enumerate(zip(sequence, slots, strict=True))
    ]


def show(tokens: Sequence[Token], spec: SwitchSpec, console: Console) -> None:
    """Print the sequence in its slots' colours, and a legend. Control tokens are inverted, generated ones bold."""
    text = Text()
    for token in tokens:
        style = _style(token.slot)
        style += " reverse" if token.control else ""
        style += " bold" if token.generated else ""
        text.append(token.text, style.strip())
    console.print(text)
    console.print()
    for slot, name, count in _legend(tokens, spec):
        line = Text(f"  slot {slot}  ")
        line.append(name, _style(slot))
        line.append(f"  {count} tokens")
        console.print(line)


def page(tokens: Sequence[Token], spec: SwitchSpec) -> str:
    """The trace as a self-contained HTML page."""
    return _HTML.format(style=style(len(spec.adapters)), trace=fragment(tokens, spec))


def fragment(tokens: Sequence[Token], spec: SwitchSpec, cached: int = 0) -> str:
    """The trace as an HTML fragment for a page with the CSS of `style`. Each run of a slot begins with its name.

    Args:
        tokens, spec: as for `show`.
        cached: length of the prefix that was read from the cache; its end is marked.
    """
    names = ["base", *(adapter.name for adapter in spec.adapters)]
    places = enumerate(tokens)
    runs = []
    for (slot, _), run in groupby(places, lambda place: (place[1].slot, place[0] < cached)):
        first, *rest = run
        mark = '<b class="cache">\u2191 cached, \u2193 computed</b>' if cached and first[0] == cached else ""
        label = f'<b class="slot">{slot} {html.escape(names[slot])}</b>'
        runs.append(
            f'{mark}<span class="s{slot}" data-slot="{slot}">{label}{"".join(map(_span, (first, *rest)))}</span>'
        )
    legend = "".join(
        f'<li><span class="s{slot}">{slot} {html.escape(name)}</span> {count} tokens</li>'
        for slot, name, count in _legend(tokens, spec)
    )
    return (
        f'<div class="trace"><p>{"".join(runs)}</p><ul>{legend}</ul>'
        "<p>Outlined: control tokens. Underlined: generated.</p></div>"
    )


def style(slots: int) -> str:
    """The CSS of `fragment`: dark text on a light colour for each slot, whatever the page's colours are."""
    colours = (f".s{slot}{{background:{colour(slot)};color:{INK}}}" for slot in range(1, slots + 1))
    return _STYLE + "".join(colours)


def colour(slot: int) -> str:
    """The background colour of an adapter's slot; text on it is `INK`."""
    return _PAGE[(slot - 1) % len(_PAGE)]


def _span(place: tuple[int, Token]) -> str:
    position, token = place
    kinds = " ".join(["t", *(["control"] if token.control else []), *(["new"] if token.generated else [])])
    title = f"position {position}, token {token.id}, slot {token.slot}"
    text = html.escape(token.text).replace("\n", "&#8629;<br>")
    return f'<span class="{kinds}" title="{title}">{text}</span>'


def _style(slot: int) -> str:
    return _TERMINAL[(slot - 1) % len(_TERMINAL)] if slot else ""


def _legend(tokens: Sequence[Token], spec: SwitchSpec) -> list[tuple[int, str, int]]:
    names = ["base", *(adapter.name for adapter in spec.adapters)]
    used = [token.slot for token in tokens]
    return [(slot, names[slot], used.count(slot)) for slot in sorted(set(used))]


_STYLE = """
.trace { line-height: 1.9; overflow-wrap: anywhere }
.trace > p:first-child { font-family: ui-monospace, monospace; white-space: pre-wrap }
.trace .t { border-radius: 3px }
.trace .t, .trace .slot { color: inherit }
.trace .slot { font: bold .7em system-ui, sans-serif; border: 1px solid currentColor; border-radius: 3px;
  display: inline-block; white-space: nowrap; line-height: 1.5; padding: 0 .3em; margin: 0 .3em; user-select: none }
.trace .cache { display: block; font: bold .8em system-ui, sans-serif; border-top: 2px dashed currentColor }
.trace .control { outline: 2px solid currentColor; font-weight: bold }
.trace .new { border-bottom: 2px solid currentColor }
.trace ul { list-style: none; padding: 0 }
.trace li span { padding: 0 .5em; border-radius: 3px }
"""

_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Granite Switch trace</title>
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; margin: 2rem; max-width: 60rem; background: #fff; color: #111 }}
{style}
</style>
<h1>Where each token was routed</h1>
{trace}
</html>
"""
