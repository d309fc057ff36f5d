"""The page in a real browser: it shows the counts of `Conversation`, and survives errors.

Screenshots are written to out/page.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artefacts import ROOT
from page_server import Server, free_port, playing, serving

from granite_switch.cli import trace
from granite_switch.core import routing
from granite_switch.hf.conversation import Conversation
from granite_switch.play.local import Local

pytestmark = pytest.mark.slow

PICTURES = ROOT / "out" / "page"
DOCUMENTS = ("Ada lives in Tarn. The job of Ada is baker.", "Hugo has a fox.")
TALK = (
    ("Where does Ada live?", "base"),
    ("What does she work as?", "answerability"),
    ("And Hugo? <rewrite> Write the last question so that it stands alone.", "query_rewrite"),
    ("Check each sentence of the last answer.", "hallucination_detection"),
)
COUNTS = ("prompt", "cached", "computed", "generated")


def counts(page: Any) -> list[tuple[int, ...]]:
    """The figures of each turn, as the page shows them."""
    read = "return [...document.querySelectorAll('#figures tbody tr')].map(row => arguments[0].map(name =>"
    rows = page.driver.execute_script(read + " row.querySelector(`[data-is=${name}]`).textContent))", COUNTS)
    return [tuple(int(text.replace(",", "")) for text in row) for row in rows]


def test_a_chat_through_three_adapters(page: str, browse: Callable[..., Any], model: Any, sample: Path) -> None:
    seen = browse(page)
    seen.settings("\n\n".join(DOCUMENTS))
    documents = [{"doc_id": str(number), "text": text} for number, text in enumerate(DOCUMENTS, 1)]
    talk, expected = Conversation(model, sample, documents=documents), []
    for text, adapter in TALK:
        reply = talk.say(text, adapter, max_new_tokens=256)
        expected.append((len(reply.turn.ids), reply.turn.reused, reply.turn.prefill, len(reply.ids)))
        assert seen.say(text, adapter)[-1] == reply.text
        assert counts(seen) == expected
    spec = talk.spec
    slots = routing.slots(talk.ids, spec.control_slots)
    shown = seen.driver.execute_script(
        "return [...document.querySelectorAll('#trace .t')].map(e => [e.title, e.parentElement.dataset.slot,"
        " getComputedStyle(e.parentElement).backgroundColor, e.classList.contains('control')])"
    )
    assert [title for title, *_ in shown] == [
        f"position {place}, token {token}, slot {slot}"
        for place, (token, slot) in enumerate(zip(talk.ids, slots, strict=True))
    ]
    for token, slot, (_, data, colour, control) in zip(talk.ids, slots, shown, strict=True):
        assert (int(data), control) == (slot, token in spec.control_slots)
        red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", colour))
        if slot:
            assert f"#{int(red):02x}{int(green):02x}{int(blue):02x}" == trace.colour(slot)
        else:
            assert alpha == [0]
    assert len({slot for _, slot, *_ in shown}) == 4
    seen.press("#lora input")
    as_lora = seen.until(lambda: seen.texts('#figures td[data-is="as-lora"]'))
    assert [int(text) for text in as_lora] == [prompt for prompt, *_ in expected]  # each adapter answered once
    seen.press("button.label-wrap")
    seen.picture(PICTURES / "chat.png")
    seen.press("#new")
    seen.until(lambda: not seen.all("#figures tbody tr"))
    assert not seen.all("#chat article")
    assert not seen.all("#trace .t")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_contrast_and_width(page: str, browse: Callable[..., Any], width: int, dark: bool) -> None:
    seen = browse(page, width=width, dark=dark)
    seen.settings(DOCUMENTS[0])
    for text, adapter in (*TALK[1:3], ("And Hugo?", "query_rewrite")):
        seen.say(text, adapter)
    assert seen.all("#alert .gs-alert")
    seen.press("#lora input")
    name = f"{'phone' if width < 600 else 'desktop'}-{'dark' if dark else 'light'}"
    for tab in ("Chat", "Side by side", "Model"):
        seen.open(tab)
        if tab == "Side by side":
            seen.write("#compare_message", "Where does Ada live?")
            seen.press("#compare")
            seen.until(lambda: seen.all("#compared article"))
        seen.picture(PICTURES / f"{name}-{tab.lower().replace(' ', '-')}.png")
        assert seen.faint() == []
        assert seen.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        cut = "return [...document.querySelectorAll('label, button')].filter(e => e.checkVisibility() &&"
        cut += " e.getBoundingClientRect().right > innerWidth).map(e => e.textContent)"
        assert seen.driver.execute_script(cut) == []


def test_two_browsers_do_not_see_each_other(page: str, browse: Callable[..., Any]) -> None:
    left, right = browse(page), browse(page)
    left.settings(DOCUMENTS[0])
    right.settings(DOCUMENTS[1])
    assert "Tarn" in left.say(*TALK[0])[-1]
    assert "fox" in right.say("Which animal does Hugo have?", "base")[-1]
    first = counts(left)[0]
    assert len(left.say("What does she work as?", "base")) == 2
    assert "baker" in left.text("#chat")
    assert "fox" not in left.text("#chat")
    assert "Ada" not in right.text("#chat") + right.text("#trace")
    assert counts(left)[1][1] == first[0] + first[3] - 1  # all but the last token is in the cache still


def test_nothing_comes_from_outside(page: str, browse: Callable[..., Any]) -> None:
    seen = browse(page)
    seen.say(*TALK[0])
    names = seen.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) > 10
    assert [name for name in names if not name.startswith(page)] == []
    assert [entry for entry in seen.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_errors_are_sentences_and_the_page_goes_on(page: str, browse: Callable[..., Any]) -> None:
    seen = browse(page)
    seen.choose("#adapter", "query_rewrite")
    seen.until(lambda: "<rewrite>" in seen.text("#need"))
    for text, adapter, words in (
        ("And Hugo?", "query_rewrite", "acts from <rewrite>"),
        (" ", "base", "the message is empty"),
        ("Ada " * 5000, "base", "tokens, but the model takes 4,096"),
    ):
        seen.say(text, adapter)
        seen.until(lambda words=words: words in seen.text("#alert"))
        assert seen.one("#alert [role=alert]").is_displayed()
        assert seen.one("#message textarea").get_attribute("value").strip() == text.strip()  # kept for correction
        assert not seen.all("#chat article")
    tricky = "${1+1} <b>not bold</b> &amp; **stars** <|answerability|>"
    assert seen.say(tricky, "base")
    assert not seen.all("#alert .gs-alert")
    assert seen.texts("#chat .gs-text")[0] == tricky
    slots = seen.driver.execute_script(
        "return [...document.querySelectorAll('#trace [data-slot]')].map(e => e.dataset.slot)"
    )
    assert set(slots) == {"0"}


def test_by_keyboard_alone(page: str, browse: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    seen = browse(page)

    def keys(*typed: str) -> None:
        ActionChains(seen.driver).send_keys(*typed).perform()

    def reach(css: str) -> None:
        for _ in range(60):
            if seen.driver.execute_script("return document.activeElement.matches(arguments[0])", css):
                return
            keys(Keys.TAB)
        raise AssertionError(f"Tab does not lead to {css}")

    reach('#adapter input[value="answerability"]')
    keys(Keys.SPACE)
    reach("#message textarea")
    outline = "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.boxShadow"
    assert seen.driver.execute_script(outline) != "nonenone"
    ActionChains(seen.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    keys("Where does Ada live?", Keys.ENTER)
    seen.until(lambda: counts(seen))
    assert seen.texts("#chat .gs-text")[0] == "\nWhere does Ada live?"
    assert seen.one("#chat article").get_attribute("data-adapter") == "answerability"
    reach("#stop")
    reach("#new")
    keys(Keys.ENTER)
    seen.until(lambda: not seen.all("#chat article"))


def test_side_by_side_and_the_model(page: str, browse: Callable[..., Any], model: Any, sample: Path) -> None:
    from granite_switch.composition.inspect import inspect

    seen = browse(page)
    seen.settings(DOCUMENTS[0])
    seen.open("Side by side")
    seen.choose("#several", "query_rewrite")
    text, names = (
        "And she? <rewrite> Write the last question so that it stands alone.",
        ("base", "answerability", "query_rewrite"),
    )
    seen.write("#compare_message", text)
    seen.press("#compare")
    seen.until(lambda: len(seen.all("#compared article")) == 3)
    first = ""
    for name, card in zip(names, seen.all("#compared article"), strict=True):
        assert card.get_attribute("data-adapter") == name
        alone = Conversation(model, sample, documents=[{"doc_id": "1", "text": DOCUMENTS[0]}])
        alone = alone.say(text, name, max_new_tokens=256).text
        kept = "const e = arguments[0].querySelector('.gs-text').cloneNode(true);"
        kept += " e.querySelectorAll('del').forEach(d => d.remove()); return e.textContent"
        assert seen.driver.execute_script(kept, card) == alone
        first = first or alone
        assert bool(card.find_elements("css selector", "ins")) == (alone != first)
    assert seen.all("#compared ins")
    seen.open("Model")
    rows = [row.text for row in seen.all("#report tbody tr")]
    for row, adapter in zip(rows, inspect(sample).adapters, strict=True):
        assert f"{adapter.slot} {adapter.name}" in row
        assert f"{adapter.parameters:,}" in row
        assert adapter.token in row
    assert seen.driver.execute_script("return document.querySelector('#strengths img').naturalWidth") > 300


def test_a_server_that_is_slow_is_stopped_breaks_and_comes_back(
    local: Local, sample: Path, browse: Callable[..., Any]
) -> None:
    port = free_port()
    running = Server(local, port)
    with serving(local, port, running) as url, playing(sample, "--server", url) as page:
        seen = browse(page)
        assert url in seen.text("body")
        seen.settings("\n\n".join(DOCUMENTS))
        seen.say(*TALK[0])
        seen.say(*TALK[1])
        assert counts(seen)[1][1] >= counts(seen)[0][0] // 4 * 4
        seen.press("#new")
        seen.until(lambda: not seen.all("#chat article"))
        running.pause = 0.25
        seen.choose("#adapter", "hallucination_detection")
        seen.write("#message", TALK[3][0])
        seen.press("#send")
        seen.until(lambda: len(seen.text("#chat .gs-answer")) > 3)
        seen.one("#message textarea").send_keys("typed meanwhile")
        seen.press("#stop")
        seen.until(lambda: "unknown" in seen.text("#figures"))  # the counts come last; the client did not wait
        written = len(seen.all("#trace .new"))
        assert 0 < written < 30
        assert seen.one("#message textarea").get_attribute("value") == "typed meanwhile"
        running.pause = 0.0
        seen.say(*TALK[0])
        running.breaks = True
        seen.say(*TALK[1])
        seen.until(lambda: "does not answer" in seen.text("#alert"))
        running.end()
        running.ended.wait(30)
        seen.say(*TALK[1])
        assert "granite-switch serve" in seen.text("#alert")
        seen.picture(PICTURES / "server-gone.png")
        with serving(local, port):
            assert seen.say(*TALK[1])[-1].startswith('{"answerability"')
            assert not seen.all("#alert .gs-alert")
