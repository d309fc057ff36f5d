"""A server that is absent, serves another model, fails midway, or does not report its counts."""

import threading
from dataclasses import replace

import httpx
import pytest
from page_server import Server, free_port, serving
from test_session import TALK, say

from granite_switch.errors import ServingError
from granite_switch.play import views
from granite_switch.play.engine import Model
from granite_switch.play.local import Local
from granite_switch.play.remote import Remote, _event
from granite_switch.play.session import Session


def test_no_server_is_a_sentence(local: Local) -> None:
    with pytest.raises(ServingError, match="does not answer") as caught:
        Remote(f"http://127.0.0.1:{free_port()}/v1", local.files)
    assert "granite-switch serve" in caught.value.hint
    with pytest.raises(ServingError, match="does not answer"):
        Remote("nonsense", local.files)


def test_another_models_server_is_refused(local: Local, served: str) -> None:
    spec = local.files.spec
    other = replace(spec, adapters=(replace(spec.adapters[0], name="other"), *spec.adapters[1:]))
    with pytest.raises(ServingError, match=r"another model.*answerability"):
        Remote(served, replace(local.files, spec=other))


def test_a_server_that_is_gone_and_back(local: Local) -> None:
    port = free_port()
    with serving(local, port) as url:
        session = Session(Remote(url, local.files))
        first = say(session, *TALK[0])
    with pytest.raises(ServingError, match="does not answer"):
        say(session, *TALK[1])
    assert session.exchanges == [first]
    with serving(local, port):
        assert say(session, *TALK[1]).text.startswith('{"answerability"')


@pytest.mark.parametrize("told", [True, False])
def test_breaking_in_the_middle_and_keeping_counts_back(local: Local, told: bool) -> None:
    server = Server(local, free_port())
    server.told = told
    thread = threading.Thread(target=server.run)
    thread.start()
    server.wait()
    try:
        session = Session(Remote(f"http://127.0.0.1:{server.config.port}", local.files))
        server.breaks = True
        with pytest.raises(ServingError):
            say(session, *TALK[0])
        assert not session.exchanges
        server.breaks = False
        measure = say(session, *TALK[0]).measure
        assert (measure.cached is None) is not told
        assert (
            "--enable-prompt-tokens-details" in views.measures(session.exchanges, local.files.spec, True)
        ) is not told
    finally:
        server.end()
        thread.join(30)


def test_files_of_a_plain_model_are_refused(local: Local, served: str) -> None:
    from artefacts import ROOT

    from granite_switch.errors import CheckpointError

    assert httpx.get(f"{served}/v1/models").status_code == 200
    with pytest.raises(CheckpointError, match="not a composed model"):
        Model.read(ROOT / "sample" / "base")


@pytest.mark.parametrize("line", [
    "[]", "{", '{"choices": 5}', '{"choices": [7]}', '{"choices": [{"token_ids": ["a"]}]}', '{"usage": []}',
    '{"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": "many"}}}',
])  # fmt: skip
def test_an_event_that_is_no_completions(line: str, local: Local, served: str) -> None:
    with pytest.raises(ServingError, match="answer"), Remote(served, local.files)._reaching():
        _event(line)


def test_models_that_are_no_list_of_records(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ([], {"data": 5}, {"data": [{"id": 7}]}, {"data": [{"id": "m", "max_model_len": "long"}]}):
        response = httpx.Response(200, json=answer)
        monkeypatch.setattr(httpx.Client, "get", lambda *_, response=response, **__: response)
        with pytest.raises(ServingError, match="/v1/models"):
            Remote("http://127.0.0.1:1", local.files)
