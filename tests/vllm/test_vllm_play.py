"""The page's session on a vLLM server: ids, texts, cached tokens, and stopped or refused turns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import serving

from granite_switch.conversation import Conversation
from granite_switch.errors import SwitchError
from granite_switch.play.engine import Ask, Model, Sampling, Setting
from granite_switch.play.remote import Remote
from granite_switch.play.session import Session

pytestmark = pytest.mark.slow

SETTING = Setting(documents=("Ada lives in Tarn. The job of Ada is baker. " * 8, "Hugo has a fox."))
TALK = (
    ("Where does Ada live?", "base"),
    ("What does she work as?", "answerability"),
    ("And Hugo? <rewrite> Write the last question so that it stands alone.", "query_rewrite"),
    ("Check each sentence of the last answer.", "hallucination_detection"),
)
BLOCK = 32
GREEDY = Sampling()


@pytest.fixture(scope="module")
def remote(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(sample, "MODEL", log, "--api-key", "secret", "--enable-prompt-tokens-details") as url:
        with pytest.raises(SwitchError, match="401"):
            Remote(url, Model.read(sample))
        yield Remote(f"{url}/v1/", Model.read(sample), "secret")


def say(session: Session, text: str, adapter: str, sampling: Sampling = GREEDY) -> None:
    for _ in session.send(Ask(text, adapter), SETTING, sampling):
        pass


def test_a_session_is_the_conversation(remote: Remote, sample: Path) -> None:
    session, talk = Session(remote), Conversation(sample, **SETTING.options())
    for text, adapter in TALK:
        say(session, text, adapter)
        turn, answer = talk.ask(text, adapter), session.last
        assert answer
        assert answer.turn.ids == turn.ids
        assert talk.answer(answer.ids) == answer.text
        measure = session.exchanges[-1].measure
        assert measure
        assert measure.cached is not None
        assert turn.reused - BLOCK < measure.cached <= len(turn.ids)
    texts = [exchange.text for exchange in session.exchanges]
    assert texts[1].startswith('{"answerability"')
    assert texts[2].startswith('{"rewritten_question"')
    assert texts[3].startswith('[{"r"')


def test_side_by_side(remote: Remote) -> None:
    session = Session(remote)
    names = ("base", "answerability", "citations")
    for answer in session.compare("Where does Ada live?", names, SETTING, Sampling(), False):
        alone = Session(remote)
        say(alone, "Where does Ada live?", answer.adapter)
        assert alone.exchanges[-1].text == answer.text


def test_stopped_and_refused(remote: Remote) -> None:
    session = Session(remote)
    asked = session.send(Ask(*TALK[3]), SETTING, Sampling())
    next(asked)
    session.stop()
    for _ in asked:
        pass
    with pytest.raises(SwitchError, match="tokens, but the model takes 2,048"):
        say(session, "Ada " * 2500, "base")
    with pytest.raises(SwitchError, match="server refused"):
        say(session, "Where does Ada live?", "base", Sampling(temperature=-1))
    say(session, *TALK[1])
    assert len(session.exchanges) == 2
