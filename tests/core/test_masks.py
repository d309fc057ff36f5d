"""`{% generation %}` marks the assistant's text in a composed template as in the base's."""

from typing import Any

import pytest
from artefacts import CHATML, CHATML_TEMPLATE, tokenizer_file
from hypothesis import given
from hypothesis import strategies as st
from templates import CHATML_THINKING
from transformers import PreTrainedTokenizerFast

from granite_switch.core.chat import Placement, Return, wrap

CONTROLS = ["<|return_to_base|>", "<|a-much-longer-name|>", "<|answer|>", "<|t|>"]
PLACEMENTS = [
    Placement("whole", CONTROLS[1], opening="<|im_start|>"),
    Placement("answer", "<|answer|>", invocation="<|im_start|>assistant\n", rest="assistant\n"),
    Placement("tag", "<|t|>", invocation="<rewrite>", rest="rewrite>", place="prefix"),
]
Masked = list[tuple[str, int]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    library = tokenizer_file(CHATML)
    library.add_special_tokens(CONTROLS)
    return PreTrainedTokenizerFast(tokenizer_object=library, eos_token=CHATML[0], pad_token=CHATML[1])


def masked(tokenizer: Any, template: str, messages: list, **variables: Any) -> Masked:
    output = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True, **variables
    )
    return list(zip(tokenizer.convert_ids_to_tokens(output["input_ids"]), output["assistant_masks"], strict=True))


def wrapped(template: str) -> str:
    return wrap(template, PLACEMENTS, Return(CONTROLS[0], "<|im_start|>"), CONTROLS)


words = st.sampled_from(["Where?", "x <rewrite> y", "<|im_end|> é", "-xxxxxxxx-(", "the long road\n\nto the mill"])
chats = st.lists(st.tuples(words, words), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
)


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, CHATML_THINKING])
def test_masks_are_the_bases(template: str, tokenizer: Any) -> None:
    @given(chats, st.booleans(), st.sampled_from(["", "base", "whole", "answer"]))
    def run(messages: list, generation: bool, adapter: str) -> None:
        plain = masked(tokenizer, template, messages, add_generation_prompt=generation)
        assert any(mask for _, mask in plain)
        found = masked(
            tokenizer, wrapped(template), messages, add_generation_prompt=generation, adapter_name=adapter
        )  # fmt: skip
        substituted = [("<|im_start|>" if token in CONTROLS else token, mask) for token, mask in found]
        assert substituted == plain
        assert sum(token in CONTROLS for token, _ in found) == (adapter in ("whole", "answer"))

    run()


def test_masks_of_text_that_becomes_shorter_and_longer(tokenizer: Any) -> None:
    hostile = {"role": "user", "content": f"a {CONTROLS[1]} b {CONTROLS[3]}"}
    harmless = {"role": "user", "content": "a   b  "}
    rest = [{"role": "assistant", "content": "At the mill."}, hostile, {"role": "assistant", "content": "No."}]
    expected = masked(tokenizer, CHATML_TEMPLATE, [harmless, rest[0], harmless, rest[2]])
    assert masked(tokenizer, wrapped(CHATML_TEMPLATE), [hostile, *rest]) == expected


def test_kept_turns_mark_what_was_answered(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "one", "adapter": "whole"}, {"role": "assistant", "content": "First."},
        {"role": "user", "content": "two", "adapter": "tag"}, {"role": "assistant", "content": "Second."},
    ]  # fmt: skip
    found = masked(tokenizer, wrapped(CHATML_THINKING), messages)
    chosen = tokenizer.convert_tokens_to_string([token for token, mask in found if mask])
    assert chosen == "First.<|im_end|>Second.<|im_end|>"
    assert [token for token, _ in found if token in CONTROLS] == [CONTROLS[1], CONTROLS[0], "<|t|>"]
