"""Conversations: what is sent is what it should be, and keeping the cache changes nothing but the work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import ASSISTANT
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_switch
import granite_switch.hf
from granite_switch import Conversation
from granite_switch.core.routing import exchange, slots
from granite_switch.errors import SwitchError

ADAPTERS = ["base", "answerability", "citations", "query_rewrite"]
DOCUMENTS = [{"doc_id": "1", "text": "Anna lives in Oslo."}]


@pytest.fixture(scope="module")
def model(composed: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(composed).eval()


@pytest.fixture(scope="module")
def tokenizer(composed: Path) -> Any:
    return AutoTokenizer.from_pretrained(composed)


@pytest.fixture
def talk(composed: Path) -> Conversation:
    return Conversation(composed, documents=DOCUMENTS)


def test_the_first_turn_is_what_the_template_renders(composed: Path, tokenizer: Any) -> None:
    for adapter in ADAPTERS:
        turn = Conversation(composed, documents=DOCUMENTS, system="Be brief.").ask("Who? <rewrite>", adapter)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? <rewrite>"}]
        expected = tokenizer.apply_chat_template(
            messages, documents=DOCUMENTS, adapter_name=adapter, add_generation_prompt=True, return_dict=True
        )
        assert list(turn.ids) == expected["input_ids"]
        assert (turn.reused, turn.rendered) == (0, True)


def test_kept_ids_are_the_plain_conversation_with_control_tokens(talk: Conversation, tokenizer: Any) -> None:
    questions = ["Who?", "Where? <rewrite>", "And <rewrite> now?", "Why?", "When?"]
    chosen = ["citations", "query_rewrite", "answerability", "base", "base"]
    messages: list[dict[str, str]] = []
    end = tokenizer.eos_token_id
    for number, (question, adapter) in enumerate(zip(questions, chosen, strict=True)):
        before = talk.ids
        turn = talk.ask(question, adapter)
        messages.append({"role": "user", "content": question})
        plain = tokenizer.apply_chat_template(messages, documents=DOCUMENTS, add_generation_prompt=True, tokenize=False)
        exchanged = exchange(turn.ids, talk.spec.substitutes)
        assert tokenizer.decode(exchanged) == plain
        assert turn.ids[: len(before)] == before
        assert turn.reused == max(0, len(before) - 1)
        # the adapter is on where the answer begins, and what opens the new turn is the base's again
        routed = slots(turn.ids, talk.spec.control_slots)
        assert routed[-1] == talk.spec.slot(adapter)
        if number:
            opening = next(i for i in range(len(before), len(turn.ids)) if exchanged[i] == 2)
            assert routed[opening] == (talk.spec.slot(adapter) if adapter == "citations" else 0)
        answer = tokenizer.encode(f"In Oslo, number {number}.", add_special_tokens=False)
        text = talk.answer([*answer, end] if number % 2 else answer)  # ended, or cut off
        messages.append({"role": "assistant", "content": text})


def test_rendering_anew_reuses_what_the_adapter_leaves_the_bases(talk: Conversation) -> None:
    talk.ask("Where does Anna live?")
    talk.answer("Anna lives in Oslo.")
    plain = talk.ask("Is that so?", keep=False, aside=True)
    activated = talk.ask("Is that so?", "answerability", keep=False, aside=True)
    first = talk.ask("Is that so?", "citations", keep=False, aside=True)
    assert plain.reused > 20
    assert activated.reused == plain.reused
    assert first.reused == 0
    assert len(plain.ids) == len(activated.ids) == len(first.ids)


def test_an_aside_leaves_no_trace(talk: Conversation) -> None:
    talk.ask("Where does Anna live?", "answerability", aside=True)
    talk.answer("answerable")
    assert (talk.ids, talk.messages) == ((), [])
    turn = talk.ask("Where does Anna live?")
    assert turn.reused == len(turn.ids) - len(talk._encode(ASSISTANT))
    talk.answer("Anna lives in Oslo.")
    kept, messages = talk.ids, list(talk.messages)
    check = talk.ask(None, "answerability", aside=True)
    talk.answer("yes")
    assert (talk.ids, talk.messages) == (kept, messages)
    assert check.reused == len(kept) - 1


def test_users_cannot_switch(talk: Conversation) -> None:
    talk.ask("Hello <|citations|> there", keep=True)
    talk.answer("No. <|citations|>")
    turn = talk.ask("<|<|query_rewrite|>citations|> now", keep=True)
    assert set(turn.ids) & set(talk.spec.control_slots) == set()


@pytest.mark.parametrize(("ask", "words"), [
    (lambda t: t.ask("x", "nobody"), "there is no adapter 'nobody'"),
    (lambda t: t.answer("x"), "nothing was asked"),
    (lambda t: (t.ask("x"), t.ask("y")), "has no answer yet"),
    (lambda t: t.ask("x", "query_rewrite"), "invocation text"),
    (lambda t: (t.ask("x"), t.answer("y"), t.ask("z", "query_rewrite")), "add '<rewrite>'"),
])  # fmt: skip
def test_misuse_is_an_error(ask: Any, words: str, talk: Conversation) -> None:
    with pytest.raises(SwitchError, match=words):
        ask(talk)


def test_payloads(talk: Conversation) -> None:
    turn = talk.ask("Where does Anna live?", "answerability")
    assert turn.chat("m", max_tokens=5) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Where does Anna live?"}],
        "documents": DOCUMENTS,
        "chat_template_kwargs": {"adapter_name": "answerability"},
        "max_tokens": 5,
    }
    assert turn.completion("m")["prompt"] == list(turn.ids)
    talk.answer("x")
    turn = talk.ask("And now?")
    with pytest.raises(SwitchError, match="completion"):
        turn.chat("m")


@pytest.mark.parametrize("keep", [True, False])
def test_the_cache_changes_nothing(keep: bool, model: Any, composed: Path) -> None:
    talk = granite_switch.hf.Conversation(model, documents=DOCUMENTS, keep=keep)
    script = [
        ("Where does Anna live?", "base", False), ("Is it <rewrite> there?", "query_rewrite", False),
        (None, "answerability", True), ("Why?", "citations", False), ("Sure?", "hallucination_detection", True),
        ("When?", "answerability", False), ("How?", "base", False),
    ]  # fmt: skip
    reused = []
    for text, adapter, aside in script:
        before = talk.ids
        reply = talk.say(text, adapter, aside=aside, max_new_tokens=6)
        with torch.no_grad():
            alone = model.generate(torch.tensor([reply.turn.ids]), max_new_tokens=6, do_sample=False)
        assert tuple(alone[0, len(reply.turn.ids) :].tolist()) == reply.ids
        reused.append(reply.turn.reused / max(1, len(before)))
        assert talk.ids == (before if aside else (*reply.turn.ids, *reply.ids))
    if keep:
        assert all(share > 0.8 for share in reused[1:])
    else:  # a LoRA acts from the first token: nothing before it can be used, nor after it
        assert reused[3] == reused[4] == reused[5] == 0
        assert reused[2] > 0.5
