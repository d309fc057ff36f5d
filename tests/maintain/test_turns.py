"""With an adapter for each message, a stateless client sends exactly the ids that a conversation keeps.

`SOAK=1` draws 2,000 conversations for each template.
"""

from pathlib import Path
from typing import Any

import pytest
from artefacts import make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import SOAK
from templates import FAMILIES
from transformers import AutoTokenizer

from granite_switch import Conversation, compose
from granite_switch.core.routing import slots, substitute
from granite_switch.errors import TemplateError

NAMES = ["base", "whole", "other", "answer", "tag", "put"]


@pytest.fixture(scope="module", params=FAMILIES)
def switch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA, and aLoRA invoked by the start of an answer, by a user's tag, and by a tag that the template writes."""
    template, specials, invocation = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("turns")
    base = make_base(folder / "base", layers=1, template=template, specials=specials)
    make_adapter(folder / "pool/whole", base, seed=1, rank=1)
    make_adapter(folder / "pool/other", base, seed=2, rank=1)
    make_adapter(folder / "pool/answer", base, seed=3, rank=1, invocation=invocation)
    make_adapter(folder / "pool/tag", base, seed=4, rank=1, invocation="<rewrite>")
    make_adapter(folder / "pool/put", base, seed=5, rank=1, invocation="<guardian>")
    compose(base, [folder / "pool"], folder / request.param, place={"put": "suffix"})
    return folder / request.param


words = st.sampled_from(["Who?", "where does Anna live", "the <|tag|> mill", "x <guardian> y", "-xxxxxxxx-!", "Oslo."])
answers = st.sampled_from(["At the mill.", "yes <|whole|> no", "In Oslo, near the old harbour.", '{"a": 1}'])
turns = st.tuples(words, st.sampled_from(NAMES), answers)


def test_messages_give_the_ids_that_a_conversation_keeps(switch: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(switch)

    @settings(max_examples=2000 if SOAK else 40)
    @given(st.lists(turns, min_size=1, max_size=5), st.booleans(), st.booleans(), st.integers(0, 2))
    def run(script: list[tuple[str, str, str]], system: bool, documents: bool, after: int) -> None:
        pages = [{"doc_id": "1", "title": "", "text": "Anna <|tag|> lives in Oslo."}] if documents else None
        talk = Conversation(switch, system="Be brief." if system else "", documents=pages)
        messages: list[dict[str, Any]] = [dict(m) for m in talk.messages]
        for number, (text, adapter, answer) in enumerate(script):
            text = text + " <rewrite>" if adapter == "tag" else text
            first = switch.name == "llama" and number and adapter in ("whole", "other")
            if first and messages[-2].get("adapter") != adapter:
                with pytest.raises(TemplateError, match="acts from the prompt's first token"):
                    talk.ask(text, adapter)
                return
            turn = talk.ask(text, adapter)
            messages.append({"role": "user", "content": text, "adapter": adapter})
            for marked, more in ((messages, {}), ([*plain(messages)], {"message_adapters": marks(messages)})):
                ids = tokenizer.apply_chat_template(
                    marked, documents=pages, add_generation_prompt=True, return_dict=True, **more
                )["input_ids"]  # fmt: skip
                assert tokenizer.decode(ids) == tokenizer.decode(turn.ids)
                assert ids == list(turn.ids)
            routed = slots(turn.ids, talk.spec.control_slots)
            assert routed[-1] == talk.spec.slot(adapter)
            assert turn.reused == max(0, len(talk.ids) - 1)
            talk.answer(answer)
            messages.append({"role": "assistant", "content": answer})
        # the last answer belongs to the conversation, and the substituted ids are text without a control token
        assert not set(substitute(talk.ids, talk.spec.substitutes)) & set(talk.spec.control_slots)

    run()


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "adapter"} for message in messages]


def marks(messages: list[dict[str, Any]]) -> list[str]:
    return [message["adapter"] for message in messages if message["role"] == "user"]
