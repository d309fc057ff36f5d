"""Conversations send the right ids, and keeping the cache changes only the amount of work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import ASSISTANT
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

import granite_switch
import granite_switch.hf
from granite_switch import Conversation
from granite_switch.core.routing import slots, substitute
from granite_switch.errors import SwitchError
from granite_switch.hf.conversation import _length

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
        substituted = substitute(turn.ids, talk.spec.substitutes)
        assert tokenizer.decode(substituted) == plain
        assert turn.ids[: len(before)] == before
        assert turn.reused == max(0, len(before) - 1)
        # the adapter is active where the answer begins; the token that opens the new turn is the base's
        routed = slots(turn.ids, talk.spec.control_slots)
        assert routed[-1] == talk.spec.slot(adapter)
        if number:
            opening = next(i for i in range(len(before), len(turn.ids)) if substituted[i] == 2)
            assert routed[opening] == (talk.spec.slot(adapter) if adapter == "citations" else 0)
        answer = tokenizer.encode(f"In Oslo, number {number}.", add_special_tokens=False)
        text = talk.answer([*answer, end] if number % 2 else answer)  # complete, or cut off
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


@pytest.mark.parametrize("said", ["granite-switch-stands-for-the-answer", "x" * 40, "-xxxxxxxx-!", "<|unused_430|>"])
def test_what_users_write_cuts_no_turn(said: str, talk: Conversation, tokenizer: Any) -> None:
    for adapter in ("citations", "answerability", "base"):
        before = talk.ids
        turn = talk.ask(f"{said} {adapter} {said}", adapter)
        text = tokenizer.decode(turn.ids[len(before) :])
        wanted = said.replace("<|unused_", " ")
        assert f"user<|end_of_role|>{wanted} {adapter} {wanted}<|end_of_text|>" in text
        talk.answer(said)
    assert talk.messages[1]["content"] == said.replace("<|unused_", " ")


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
    (lambda t: (t.ask("x"), t.answer("y"), t.ask("z", "query_rewrite")), 'Add "<rewrite>"'),
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
    names = {"adapter_name": "base", "message_adapters": ["answerability", "base"]}
    assert turn.chat("m")["chat_template_kwargs"] == names
    assert all("adapter" not in message for message in turn.chat("m")["messages"])
    talk.answer("y")
    talk.ask(None, "answerability")
    talk.answer("z")
    with pytest.raises(SwitchError, match="completion"):
        talk.ask("And now?").chat("m")


class Broken(Exception):
    pass


def breaking(step: int, error: type[BaseException]) -> Any:
    """A logits processor that raises at one step."""
    left = iter(range(step, -1, -1))

    def process(ids: Any, scores: Any) -> Any:
        if not next(left):
            raise error
        return scores

    return LogitsProcessorList([process])


@pytest.mark.parametrize("error", [KeyboardInterrupt, Broken, torch.OutOfMemoryError])
def test_after_an_interruption_a_turn_equals_a_fresh_one(error: Any, model: Any, composed: Path) -> None:
    for step in range(5):
        talk = granite_switch.hf.Conversation(model, documents=DOCUMENTS)
        talk.say("Where does Anna live?", max_new_tokens=6)
        before = talk.ids, list(talk.messages)
        with pytest.raises(error):
            talk.say("Why?", "citations", max_new_tokens=6, logits_processor=breaking(step, error))
        assert (talk.ids, talk.messages) == before
        reply = talk.say("And when?", "answerability", max_new_tokens=6)
        assert reply.ids == alone(model, reply.turn.ids, 6)
        again = talk.say("How?", max_new_tokens=6)
        assert (again.ids, again.turn.reused > 0) == (alone(model, again.turn.ids, 6), True)


def test_an_interruption_inside_a_layer_leaves_no_torn_cache(model: Any, composed: Path) -> None:
    """The failed step ran in the first layers, not in the last."""
    talk = granite_switch.hf.Conversation(model, documents=DOCUMENTS)
    talk.say("Where does Anna live?", max_new_tokens=6)
    layers = [module for module in model.modules() if type(module).__name__.endswith("MLP")]
    handle = layers[-1].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        talk.say("Why?", "citations", max_new_tokens=6)
    handle.remove()
    reply = talk.say("And when?", "answerability", max_new_tokens=6)
    assert reply.ids == alone(model, reply.turn.ids, 6)


def test_options_that_change_the_cache_do_not_spoil_the_next_turn(model: Any, composed: Path) -> None:
    talk = granite_switch.hf.Conversation(model, documents=DOCUMENTS)
    for options in ({"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}, {}):
        talk.say("Where does Anna live?", "citations", aside=True, max_new_tokens=4, **options)
        reply = talk.say("Who?", "answerability", max_new_tokens=6)
        assert reply.ids == alone(model, reply.turn.ids, 6)


def test_a_cache_that_cannot_be_brought_back_is_not_used(model: Any, composed: Path) -> None:
    class State(DynamicLayer, LinearAttentionCacheLayerMixin):
        pass

    cache = DynamicCache(config=model.config)
    assert _length(cache) == 0
    with torch.no_grad():
        model(torch.tensor([[2, 5, 7]]), past_key_values=cache, use_cache=True)
    assert _length(cache) == 3
    cache.layers[1].crop(-1)
    assert _length(cache) == 0
    cache.layers[0].crop(-1)
    cache.layers[-1].crop(-1)
    assert _length(cache) == 2
    cache.layers[0].__class__ = State
    assert _length(cache) == 0


def alone(model: Any, ids: Any, count: int) -> tuple[int, ...]:
    """The model's text without an earlier cache."""
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return tuple(output[0, len(ids) :].tolist())


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
        assert alone(model, reply.turn.ids, 6) == reply.ids
        reused.append(reply.turn.reused / max(1, len(before)))
        assert talk.ids == (before if aside else (*reply.turn.ids, *reply.ids))
    if keep:
        assert all(share > 0.8 for share in reused[1:])
    else:  # a LoRA acts from the first token, so no cache can be reused before or after it
        assert reused[3] == reused[4] == reused[5] == 0
        assert reused[2] > 0.5
