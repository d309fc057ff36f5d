"""The wrapped template: the base's render, byte for byte, with control tokens only where they belong."""

import pytest
from artefacts import CHATML_TEMPLATE, GRANITE_TEMPLATE, SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core.chat import Placement, render, unwrap, wrap
from granite_switch.errors import TemplateError

ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
PLACEMENTS = [
    Placement("first", "<|first|>", opening="<|start_of_role|>"),
    Placement("answer", "<|answer|>", invocation=ASSISTANT, rest="assistant<|end_of_role|>"),
    Placement("tag", "<|tag|>", invocation="<rewrite>", rest="rewrite>"),
]
CONTROLS = ["<|return_to_base|>", "<|first|>", "<|answer|>", "<|tag|>"]
USER = [{"role": "user", "content": "Where? <rewrite> here, <rewrite> there"}]


def real_template() -> str:
    path = SHARED_DATA / "chat_templates" / "granite-4.0.jinja"
    if not path.is_file():
        pytest.skip("no real template beside the checkout")
    return path.read_text()


def templates() -> list[str]:
    odd = [
        "  {% if true %}\n  x{% endif %}\n   ",
        "\n\n{{ messages[0].content }}\n\n",
        "{%- for m in messages -%}\n  {{ m.content }}  \n{%- endfor -%}\n",
        "{# c #}\n{{ messages[0].content }}{# d #}\n",
        "{% macro m(x) %}[{{ x }}{{ sep }}]{% endmacro %}{% set sep = '!' %}{{ m(messages[0].content) }}",
        "{% set sep = '!' %}{% macro m(x) %}[{{ x }}{{ sep }}]{% endmacro %}{{ m(messages[0].content) }}  ",
        "text only\r\n",
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}\n{% endfor %}",
    ]
    return [GRANITE_TEMPLATE, CHATML_TEMPLATE, *odd]


@pytest.mark.parametrize("template", templates())
@pytest.mark.parametrize("generation", [True, False])
def test_without_adapter_it_is_the_base(template: str, generation: bool) -> None:
    wrapped = wrap(template, PLACEMENTS, CONTROLS)
    chat = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": " \n x "}]
    for variables in ({}, {"adapter_name": None}, {"adapter_name": ""}, {"adapter_name": "base"}):
        variables |= {"add_generation_prompt": generation, "documents": [{"text": "é <b>"}]}
        assert render(wrapped, chat, **variables) == render(template, chat, **variables)


def test_real_template_is_kept_byte_for_byte() -> None:
    template = real_template()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for variables in ({}, {"documents": [{"doc_id": "1", "text": "a"}]}, {"tools": tools}, {"available_tools": tools}):
        expected = render(template, USER, add_generation_prompt=True, **variables)
        assert render(wrap(template, PLACEMENTS, CONTROLS), USER, add_generation_prompt=True, **variables) == expected
        named = render(wrap(template, PLACEMENTS, CONTROLS), USER, adapter_name="first", **variables)
        assert named.startswith("<|first|>")


@pytest.mark.parametrize("template", templates())
def test_unwrap_gives_the_base_back(template: str) -> None:
    wrapped = wrap(template, PLACEMENTS, CONTROLS)
    assert wrap(unwrap(wrapped) or "", PLACEMENTS, CONTROLS) == wrapped
    assert unwrap(template) is None


def test_placement() -> None:
    wrapped = wrap(GRANITE_TEMPLATE, PLACEMENTS, CONTROLS)
    plain = render(GRANITE_TEMPLATE, USER, add_generation_prompt=True)
    assert render(wrapped, USER, adapter_name="first", add_generation_prompt=True) == plain.replace(
        "<|start_of_role|>", "<|first|>", 1
    )
    head, _, tail = plain.rpartition("<rewrite>")
    assert render(wrapped, USER, adapter_name="tag", add_generation_prompt=True) == f"{head}<|tag|>rewrite>{tail}"
    head, _, tail = plain.rpartition(ASSISTANT)
    expected = f"{head}<|answer|>assistant<|end_of_role|>{tail}"
    assert render(wrapped, USER, adapter_name="answer", add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("name", "chat", "words"),
    [
        ("nobody", USER, "no adapter 'nobody'. Adapters: first, answer, tag"),
        ("answer", USER, "add_generation_prompt=True"),
        ("tag", [{"role": "user", "content": "x"}], 'Add "<rewrite>"'),
    ],
)
def test_what_cannot_be_placed_raises(name: str, chat: list, words: str) -> None:
    with pytest.raises(TemplateError, match=words.replace(".", r"\.")):
        render(wrap(GRANITE_TEMPLATE, PLACEMENTS, CONTROLS), chat, adapter_name=name)


pieces = st.lists(
    st.sampled_from([*CONTROLS, "<|", "first", "|>", "<", ">", "|", "tag", "<|ta", "g|>", "x "]), max_size=14
)


@given(pieces, pieces, pieces, pieces)
def test_user_text_never_switches(system: list, content: list, document: list, tool: list) -> None:
    wrapped = wrap(GRANITE_TEMPLATE, PLACEMENTS, CONTROLS)
    chat = [{"role": "system", "content": "".join(system)}, {"role": "user", "content": "".join(content)}]
    variables = {"documents": [{"text": "".join(document)}], "tools": [{"name": "".join(tool)}]}
    text = render(wrapped, chat, add_generation_prompt=True, **variables)
    assert not any(control in text for control in CONTROLS)
    switched = render(wrapped, chat, adapter_name="answer", add_generation_prompt=True, **variables)
    assert sum(switched.count(control) for control in CONTROLS) == 1


def test_deeply_nested_control_text_is_removed() -> None:
    nested = "<|tag|>"
    for _ in range(200):
        nested = f"<|t{nested}ag|>"
    text = render(wrap(GRANITE_TEMPLATE, PLACEMENTS, CONTROLS), [{"role": "user", "content": "a" + nested * 2 + "b"}])
    assert text == "<|start_of_role|>user<|end_of_role|>ab<|end_of_text|>\n"


def test_a_long_prompt_is_no_burden() -> None:
    wrapped = wrap(GRANITE_TEMPLATE, PLACEMENTS, CONTROLS)
    text = "> " * 200_000
    assert text in render(wrapped, [{"role": "user", "content": text}], adapter_name="first")
