"""A session on both engines shows the counts of `Conversation`, and errors do not change it."""

from pathlib import Path
from typing import Any

import pytest
from page_server import BLOCK, common

from granite_switch.conversation import Conversation
from granite_switch.errors import SwitchError
from granite_switch.hf.conversation import Conversation as Cached
from granite_switch.play.engine import Ask, Engine, Sampling, Setting
from granite_switch.play.local import Local
from granite_switch.play.session import Session, needs_text

SETTING = Setting(documents=("Ada lives in Tarn. The job of Ada is baker.", "Hugo has a fox."))
TALK = (
    ("Where does Ada live?", "base"),
    ("What does she work as?", "answerability"),
    ("And Hugo? <rewrite> Write the last question so that it stands alone.", "query_rewrite"),
    ("Check each sentence of the last answer.", "hallucination_detection"),
    ("Where does Ada live?", "answerability"),
)
SAMPLING = Sampling(max_new_tokens=48)


def say(session: Session, text: str, adapter: str, setting: Setting = SETTING, keep: bool = True) -> Any:
    for _ in session.send(Ask(text, adapter, keep), setting, SAMPLING):
        pass
    return session.exchanges[-1]


@pytest.mark.parametrize("keep", [True, False])
def test_texts_and_counts_are_conversations(engine: Engine, model: Any, sample: Path, keep: bool) -> None:
    session = Session(engine)
    talk = Cached(model, sample, **SETTING.options())
    for text, adapter in TALK:
        exchange, reply = say(session, text, adapter, keep=keep), talk.say(text, adapter, keep=keep, max_new_tokens=48)
        assert exchange.text == reply.text
        assert exchange.measure.prompt == len(reply.turn.ids)
        assert exchange.measure.generated == len(reply.ids)
        assert session.last.turn.ids == reply.turn.ids
        if isinstance(engine, Local):  # counted at the embedding, while `reused` is calculated
            assert (exchange.measure.cached, exchange.measure.computed) == (reply.turn.reused, reply.turn.prefill)


def test_cached_tokens_are_the_servers(local: Local, served: str) -> None:
    from granite_switch.play.remote import Remote

    setting = Setting("Nobody else says this.", SETTING.documents)
    session, talk = Session(Remote(served, local.files)), Conversation(local.files.folder, **setting.options())
    for text, adapter in TALK:
        measure = say(session, text, adapter, setting).measure
        turn = talk.ask(text, adapter)
        talk.answer(session.last.ids)
        assert measure.cached % BLOCK == 0
        assert turn.reused - BLOCK < measure.cached <= len(turn.ids) - 1


def test_with_lora_semantics_only_the_same_adapters_turns_help(engine: Engine) -> None:
    session, spec = Session(engine), engine.files.spec
    before: list[tuple[str, list[int]]] = []
    for text, adapter in TALK:
        measure, last = say(session, text, adapter).measure, session.last
        ids = [spec.substitutes.get(token, token) for token in (*last.turn.ids, *last.ids)]
        shared = max((common(ids, other) for name, other in before if name == adapter), default=0)
        assert measure.as_lora == measure.prompt - min(shared, measure.prompt - 1)
        before.append((adapter, ids[:-1]))
    assert measure.as_lora < measure.prompt  # answerability answered before
    assert sum(e.measure.as_lora for e in session.exchanges) > 2 * sum(e.measure.computed for e in session.exchanges)


BAD = {
    "there is no adapter 'nobody'": ("Where does Ada live?", "nobody", SETTING),
    "<rewrite> on, but the message does not contain it": ("And Hugo?", "query_rewrite", SETTING),
    "the message is empty": (" \n", "base", SETTING),
    "tokens, but the model takes": ("Where does Ada live? " * 900, "base", SETTING),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_goes_wrong_leaves_the_conversation_as_it_was(engine: Engine, reason: str) -> None:
    session, untouched = Session(engine), Session(engine)
    for one in (session, untouched):
        say(one, *TALK[0])
    with pytest.raises(SwitchError, match=reason):
        say(session, *BAD[reason])
    assert session.exchanges == session.exchanges[:1]
    left, right = say(session, *TALK[1]), say(untouched, *TALK[1])
    assert (left.text, session.last.turn.ids) == (right.text, untouched.last.turn.ids)
    if isinstance(engine, Local):
        assert left.measure.cached == right.measure.cached > 0


def test_stopped_answers_stay_as_far_as_they_were_written(engine: Engine, model: Any, sample: Path) -> None:
    session = Session(engine)
    asked = session.send(Ask(*TALK[3]), SETTING, SAMPLING)
    next(asked)
    session.stop()
    for _ in asked:
        pass
    cut = session.last
    assert 0 < len(cut.ids) < 20
    talk = Conversation(sample, **SETTING.options())
    talk.ask(*TALK[3])
    talk.answer(cut.ids)
    say(session, *TALK[1])
    assert session.last.turn.ids == talk.ask(*TALK[1]).ids


def test_an_answer_that_nobody_reads_is_cut_off_and_shown(local: Local) -> None:
    session = Session(local)
    asked = session.send(Ask(*TALK[3]), SETTING, SAMPLING)
    next(asked)
    asked.close()
    assert "cut off" in session.exchanges[-1].note
    assert say(session, *TALK[1]).text


def test_sessions_do_not_see_each_other(engine: Engine) -> None:
    left, right = Session(engine), Session(engine)
    say(left, *TALK[0])
    first = left.last.turn.ids
    say(right, "Who has a fox?", "base")
    assert [e.ask.text for e in right.exchanges] == ["Who has a fox?"]
    say(left, *TALK[1])
    assert left.last.turn.ids[: len(first)] == first
    assert [e.ask.text for e in left.exchanges] == [TALK[0][0], TALK[1][0]]


def test_one_thing_at_a_time(engine: Engine) -> None:
    session = Session(engine)
    asked = session.send(Ask(*TALK[0]), SETTING, SAMPLING)
    next(asked)
    with pytest.raises(SwitchError, match="still being answered"):
        next(session.send(Ask(*TALK[1]), SETTING, SAMPLING))
    for _ in asked:
        pass
    assert say(session, *TALK[1]).text


def test_other_documents_are_read_and_what_was_said_is_kept(engine: Engine) -> None:
    session = Session(engine)
    say(session, *TALK[0])
    exchange = say(session, "Where does Ada live?", "base", Setting(documents=("Ada lives in Quorn.",)))
    assert "computed again" in exchange.note
    assert "Quorn" in exchange.text
    assert [m["role"] for m in session.last.turn.messages] == ["user", "assistant", "user"]
    session.reset()
    assert (session.exchanges, session.last) == ([], None)
    assert not say(session, *TALK[0]).note


def test_side_by_side_answers_are_those_of_each_alone(engine: Engine) -> None:
    session = Session(engine)
    say(session, *TALK[0])
    said = list(session.exchanges)
    text, names = "Where does Hugo live? <rewrite>", ("base", "answerability", "citations", "query_rewrite")
    for after in (False, True):
        together = session.compare(text, names, SETTING, SAMPLING, after)
        assert len({answer.text for answer in together}) > 2
        for answer in together:
            alone = Session(engine)
            if after:
                say(alone, *TALK[0])
            assert say(alone, text, answer.adapter).text == answer.text
    assert session.exchanges == said
    with pytest.raises(SwitchError, match="two"):
        session.compare(text, names[:1], SETTING, SAMPLING, False)


def test_who_needs_a_text_is_asked_of_the_template(local: Local) -> None:
    needs = {name: needs_text(local.files.folder, name) for name in ("base", *local.files.spec.names)}
    assert {name: text for name, text in needs.items() if text} == {"query_rewrite": "<rewrite>"}
