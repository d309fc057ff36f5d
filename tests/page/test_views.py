"""User text is escaped, differences lose no text, and every slot's colour passes WCAG AA."""

import re
from html import unescape
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from granite_switch.cli import trace
from granite_switch.errors import SwitchError
from granite_switch.play import views
from granite_switch.play.engine import Ask
from granite_switch.play.local import Local
from granite_switch.play.session import Compared, Exchange, Measure

TEXT = st.text(st.sampled_from("ab <>&\"'/${}`\n") | st.characters(codec="utf-8"), max_size=40)


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(asked=TEXT, answered=TEXT, note=TEXT)
def test_what_people_and_models_write_stays_text(local: Local, asked: str, answered: str, note: str) -> None:
    spec = local.files.spec
    plain = _Tags(views.chat([Exchange(Ask("a"), "b", None, "c")], spec)).tags
    found = _Tags(views.chat([Exchange(Ask(asked), f"b{answered}", None, f"c{note}")], spec))
    assert found.tags == plain
    assert unescape(asked).replace("\r", "") in unescape(found.text).replace("\r", "")
    both = (
        views.alert(SwitchError(asked, problems=[answered], hint=f"a{note}")),
        views.alert(SwitchError("a", problems=["b"], hint="c")),
    )
    assert _Tags(both[0]).tags == _Tags(both[1]).tags
    cards = [Compared("base", f"x{asked}"), Compared("citations", f"y{answered}")]
    assert set(_Tags(views.compared(cards, spec)).tags) <= {"div", "article", "h3", "span", "p", "ins", "del"}


@given(left=TEXT, right=TEXT)
def test_a_difference_holds_both_texts(left: str, right: str) -> None:
    marked = views.difference(left, right)
    assert unescape(re.sub("<del>.*?</del>|</?ins>", "", marked, flags=re.S)) == right
    if "<del>" in marked:
        assert unescape(re.sub("<ins>.*?</ins>|</?del>", "", marked, flags=re.S)) == left
    assert ("<" in marked.replace("&lt;", "")) or left == right or not right


def test_a_word_that_changed_is_marked() -> None:
    assert (
        views.difference("Ada lives in Tarn.", "Ada lives in Quorn.") == "Ada lives in <del>Tarn</del><ins>Quorn</ins>."
    )


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_on_every_slots_colour_passes_aaa() -> None:
    for slot in range(1, 30):
        assert (luminance(trace.colour(slot)) + 0.05) / (luminance(trace.INK) + 0.05) >= 7


def test_every_run_of_a_slot_says_its_name_and_the_cache_ends_where_it_does(local: Local) -> None:
    spec = local.files.spec
    ids = [5, 6, spec.adapter("citations").token_id, 7, 8, spec.base_token_id, 9]
    tokens = trace.trace(ids, 6, spec, local.files.token)
    for cached in range(7):
        html = trace.fragment(tokens, spec, cached)
        runs = re.findall(r'data-slot="(\d)"><b class="slot">(\d) ([^<]*)</b>', html)
        assert next((a, name) for a, b, name in runs if a == b and a != "0") == ("2", "citations")
        assert len(runs) == 3 + (cached not in (0, 2, 5))
        assert html.count('class="cache"') == (cached > 0)
        before = html.partition('class="cache"')[0] if cached else ""
        assert before.count("position") == cached


def test_figures_of_a_turn_without_counts(local: Local) -> None:
    exchange = Exchange(Ask("a", "citations"), "b", Measure(10, None, 10, 1, 0.5, 0.0))
    html = views.measures([exchange], local.files.spec, True)
    assert html.count("unknown") == 2
    assert "No messages" not in views.chat([exchange], local.files.spec)
