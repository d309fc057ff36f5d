"""Show where each token of a sequence was routed: in the terminal, or as a page of its own."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from granite_switch.core import routing
from granite_switch.core.spec import SwitchSpec

# terminal and page colours by slot; the base is plain, adapters go round
_TERMINAL = ("cyan", "magenta", "green", "yellow", "blue", "red")
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
        sequence: token ids, the prompt's and the generated ones.
        prompt: how many of them are the prompt.
        spec: the adapters.
        decode: text of one token.
    """
    controls = spec.control_slots
    slots = routing.slots(sequence, controls)
    return [
        Token(token, decode(token), slot, token in controls, index >= prompt)
        for index, (token, slot) in enumerate(zip(sequence, slots, strict=True))
    ]


def show(tokens: Sequence[Token], spec: SwitchSpec, console: Console) -> None:
    """Print the sequence in its slots' colours, and a legend. Control tokens are reversed, what was generated bold."""
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
    """The same as one self-contained HTML page."""
    spans = []
    for index, token in enumerate(tokens):
        kind = f"s{token.slot}" + (" control" if token.control else "") + (" new" if token.generated else "")
        title = f"position {index}, token {token.id}, slot {token.slot}"
        text = html.escape(token.text).replace("\n", "&#8629;<br>")
        spans.append(f'<span class="{kind}" title="{title}">{text}</span>')
    legend = "".join(
        f'<li><span class="s{slot}">{html.escape(name)}</span> slot {slot}, {count} tokens</li>'
        for slot, name, count in _legend(tokens, spec)
    )
    used = sorted({token.slot for token in tokens})
    colours = "".join(f".s{slot}{{background:{_PAGE[(slot - 1) % len(_PAGE)]}}}" for slot in used if slot)
    return _HTML.format(colours=colours, spans="".join(spans), legend=legend)


def _style(slot: int) -> str:
    return _TERMINAL[(slot - 1) % len(_TERMINAL)] if slot else ""


def _legend(tokens: Sequence[Token], spec: SwitchSpec) -> list[tuple[int, str, int]]:
    names = ["base", *(adapter.name for adapter in spec.adapters)]
    used = [token.slot for token in tokens]
    return [(slot, names[slot], used.count(slot)) for slot in sorted(set(used))]


_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Granite Switch trace</title>
<style>
body {{ font: 16px/1.7 ui-monospace, monospace; margin: 2rem; max-width: 60rem; background: #fff; color: #111 }}
span {{ border-radius: 3px }}
.control {{ outline: 2px solid #111; font-weight: bold }}
.new {{ border-bottom: 2px solid #111 }}
ul {{ list-style: none; padding: 0; font-family: system-ui, sans-serif }}
li span {{ padding: 0 .5em }}
{colours}
</style>
<h1>Where each token was routed</h1>
<p>{spans}</p>
<ul>{legend}</ul>
<p>Outlined: control tokens. Underlined: generated.</p>
</html>
"""
