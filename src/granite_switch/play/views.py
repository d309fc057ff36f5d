"""The page's content as HTML. All text from users and models is escaped here and nowhere else."""

import difflib
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from granite_switch.cli import trace
from granite_switch.cli.console import size
from granite_switch.composition.inspect import Report
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.errors import SwitchError
from granite_switch.play.engine import Answer, Model
from granite_switch.play.session import Compared, Exchange, Measure

_TECHNOLOGIES = {"alora": "aLoRA", "lora": "LoRA"}
_WORDS = re.compile(r"\w+|\s+|.", re.DOTALL)
_EMPTY = "(only an end-of-text token)"


def title(model: str, place: str) -> str:
    """The heading of the page."""
    return f"<h1>Granite Switch: {escape(model)}</h1><p>Answers come from {escape(place)}.</p>"


def choice(spec: AdapterSpec) -> str:
    """An adapter's label in the list of choices: name, technology, rank, invocation text."""
    invoked = f", from {spec.invocation_text!r}" if spec.invocation_text else ", from the first token of its turn"
    return f"{spec.name} ({_TECHNOLOGIES[spec.technology]}, rank {spec.rank}{invoked})"


def need(name: str, text: str) -> str:
    """A note on the text that a message to this adapter must contain, if any."""
    if not text:
        return ""
    where = f"A message to {escape(name)} must contain <code>{escape(text)}</code>: the adapter acts from there on."
    return f'<p class="gs-note">{where}</p>'


def chat(exchanges: Sequence[Exchange], spec: SwitchSpec) -> str:
    """The conversation, with the adapter of each turn."""
    if not exchanges:
        return '<p class="gs-empty">No messages yet. Choose an adapter and write below.</p>'
    turns = []
    for exchange in exchanges:
        name, measure = exchange.ask.adapter, exchange.measure
        note = f'<p class="gs-note">{escape(exchange.note)}</p>' if exchange.note else ""
        answer = escape(exchange.text) or (_EMPTY if measure else "\u2026")
        figures = f'<p class="gs-note">{_figures(measure)}</p>' if measure else ""
        turns.append(
            f'<article class="gs-turn" data-adapter="{escape(name)}">{note}'
            f'<h3>You</h3><p class="gs-text">{escape(exchange.ask.text)}</p>'
            f'<h3>{_badge(name, spec)}</h3><p class="gs-text gs-answer">{answer}</p>{figures}</article>'
        )
    return f'<div role="log" aria-label="Conversation">{"".join(turns)}</div>'


def _figures(measure: Measure) -> str:
    cached = "" if measure.cached is None else f", {measure.cached:,} of them cached"
    rate = f", then {measure.rate:,.0f} tokens per second" if measure.rate else ""
    return f"{measure.prompt:,} prompt tokens{cached}; first token after {_time(measure.first)}{rate}."


def measures(exchanges: Sequence[Exchange], spec: SwitchSpec, as_lora: bool) -> str:
    """A table with a row for each turn: cached and computed tokens (also with LoRA semantics), times, bar charts."""
    turns = [(i, e.ask.adapter, e.measure) for i, e in enumerate(exchanges, 1) if e.measure]
    if not turns:
        return '<p class="gs-empty">No answers yet.</p>'
    longest = max(m.prompt for _, _, m in turns)
    slowest, fastest = max(m.first for _, _, m in turns), max(m.rate for _, _, m in turns)
    rows = []
    for number, adapter, m in turns:
        bars = _bar(m.prompt, m.computed, longest)
        extra = ""
        if as_lora:
            bars += _bar(m.prompt, m.as_lora, longest, " with LoRA semantics")
            extra = f'<td data-is="as-lora">{m.as_lora:,}</td>'
        rows.append(
            f'<tr><th scope="row">{number}</th><td>{_badge(adapter, spec)}</td>'
            f'<td data-is="prompt">{m.prompt:,}</td><td data-is="cached">{_count(m.cached)}</td>'
            f'<td data-is="computed">{_count(m.computed)}</td>{extra}<td class="gs-wide">{bars}</td>'
            f'<td data-is="generated">{m.generated:,}</td>'
            f"<td>{_time(m.first)}{_small_bar(m.first, slowest)}</td>"
            f"<td>{f'{m.rate:,.0f}' if m.rate else '-'}{_small_bar(m.rate, fastest)}</td></tr>"
        )
    columns = ["turn", "answered by", "prompt tokens", "cached", "computed"]
    columns += ["computed with LoRA semantics"] if as_lora else []
    columns += ["chart", "generated", "time to first token", "tokens per second"]
    notes = [
        '<span class="gs-key gs-cached"></span> cached (striped) '
        '<span class="gs-key gs-computed"></span> computed (solid).'
    ]
    if any(m.cached is None for _, _, m in turns):
        notes.append(
            "Unknown: the answer was stopped, after which a server reports no counts, or the server was started "
            "without --enable-prompt-tokens-details."
        )
    if as_lora:
        notes.append(_total([m for _, _, m in turns]))
    return _table("Figures of each turn", columns, rows) + f'<p class="gs-note">{" ".join(notes)}</p>'


def _total(turns: Sequence[Measure]) -> str:
    computed = [m.computed for m in turns if m.computed is not None]
    here = f" instead of the {sum(computed):,} here" if len(computed) == len(turns) else ""
    return (
        "With LoRA semantics every adapter acts from the first token and has a cache of its own: "
        f"{sum(m.as_lora for m in turns):,} prompt tokens would have been computed{here}."
    )


def _bar(prompt: int, computed: int | None, longest: int, how: str = "") -> str:
    cached = 0 if computed is None else prompt - computed
    label = f"{prompt:,} prompt tokens" if computed is None else f"{cached:,} of {prompt:,} prompt tokens cached{how}"
    parts = (("gs-cached", cached), ("gs-computed", prompt - cached))
    spans = "".join(f'<span class="{kind}" style="width:{100 * count / longest:.1f}%"></span>' for kind, count in parts)
    return f'<div class="gs-bar" role="img" aria-label="{label}" title="{label}">{spans}</div>'


def _small_bar(value: float, largest: float) -> str:
    width = 100 * value / largest if largest else 0
    return f'<div class="gs-bar gs-small"><span class="gs-computed" style="width:{width:.1f}%"></span></div>'


def sequence(answer: Answer | None, files: Model) -> str:
    """The trace of the last turn: prompt and answer."""
    if answer is None:
        return ""
    ids = answer.turn.ids
    tokens = trace.trace([*ids, *answer.ids], len(ids), files.spec, files.token)
    return trace.fragment(tokens, files.spec, answer.cached or 0)


def compared(answers: Sequence[Compared], spec: SwitchSpec) -> str:
    """Answers side by side; all but the first have their differences from the first marked."""
    first = answers[0].text
    cards = []
    for index, answer in enumerate(answers):
        text = escape(answer.text) if not index else difference(first, answer.text)
        same = '<p class="gs-note">The same as the first.</p>' if index and answer.text == first else ""
        cards.append(
            f'<article class="gs-card" data-adapter="{escape(answer.adapter)}"><h3>{_badge(answer.adapter, spec)}</h3>'
            f'<p class="gs-text">{text or _EMPTY}</p>{same}</article>'
        )
    key = f"Against {escape(answers[0].adapter)}: <ins>only here</ins>, <del>only there</del>."
    return f'<div class="gs-cards">{"".join(cards)}</div><p class="gs-note">{key}</p>'


def difference(left: str, right: str) -> str:
    """The right text as a diff by words: <ins> marks words only in it, <del> words only in the left text.

    If the texts have less than half in common, the diff would be unreadable, and all of the right text is marked.
    """
    a, b = _WORDS.findall(left), _WORDS.findall(right)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < 0.5:
        return f"<ins>{escape(right)}</ins>" if right else ""
    parts = []
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            parts.append(escape("".join(b[k:m])))
            continue
        parts += [f"<del>{escape(''.join(a[i:j]))}</del>"] if j > i else []
        parts += [f"<ins>{escape(''.join(b[k:m]))}</ins>"] if m > k else []
    return "".join(parts)


def report(found: Report, spec: SwitchSpec) -> str:
    """The model's adapters, as a table."""
    columns = ("adapter", "technology", "rank", "alpha", "projections", "parameters", "size", "invocation", "token")
    rows = []
    for a in found.adapters:
        low, high = a.ranks
        cells = (
            _badge(a.name, spec),
            _TECHNOLOGIES[a.technology],
            f"{low} to {high}" if low != high else str(high),
            f"{a.alpha:g}{' (rslora)' if a.use_rslora else ''}",
            escape(", ".join(name.removesuffix("_proj") for name in a.target_modules)),
            f"{a.parameters:,}",
            f"{size(a.nbytes)} ({a.share:.1%})",
            f"<code>{escape(a.invocation_text)}</code>" if a.invocation_text else "from the first token",
            f"<code>{escape(a.token)}</code>",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    base = (
        f"{escape(found.base_model or found.base_model_type)}: {found.layers} layers of {found.hidden_size:,}, "
        f"{found.parameters:,} parameters, {size(found.nbytes)}, {', '.join(found.dtypes)}. "
        f"<code>{escape(found.return_to_base)}</code> returns to the base."
    )
    return f"<p>{base}</p>{_table('Adapters', columns, rows)}"


def picture(svg: bytes) -> str:
    """The plot of `granite-switch inspect --plot`."""
    label = "How strongly each adapter changes each projection of each layer"
    source = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    image = f'<img class="gs-picture" src="{source}" alt="{label}, as a heat map">'
    return f"<h3>{label}</h3>{_scrolling(label, image)}"


def alert(problem: SwitchError) -> str:
    """An error with its problems and hint."""
    more = "".join(f"<li>{escape(line)}</li>" for line in problem.problems)
    hint = f"<p>Hint: {escape(problem.hint)}</p>" if problem.hint else ""
    said = f"<p><b>Error:</b> {escape(problem.message)}</p>"
    return f'<div class="gs-alert" role="alert">{said}<ul>{more}</ul>{hint}</div>'


def _table(label: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return _scrolling(label, f'<table class="gs-table">{body}</table>')


def _scrolling(label: str, content: str) -> str:
    return f'<div class="gs-scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _badge(name: str, spec: SwitchSpec) -> str:
    slot = spec.slot(name)
    return f'<span class="gs-badge s{slot}" data-slot="{slot}">{slot} {escape(name)}</span>'


def _time(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
