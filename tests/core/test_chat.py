"""The wrapped template renders the base's text byte for byte, with control tokens only where they belong."""

import pytest
from artefacts import CHATML_TEMPLATE, GRANITE_TEMPLATE
from templates import FAMILIES, real_granite

from granite_switch.core.chat import Placement, Return, render, unwrap, wrap
from granite_switch.core.limits import render_limited
from granite_switch.errors import TemplateError

ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
PLACEMENTS = [
    Placement("first", "<|first|>", opening="<|start_of_role|>"),
    Placement("answer", "<|answer|>", invocation=ASSISTANT, rest="assistant<|end_of_role|>"),
    Placement("tag", "<|tag|>", invocation="<rewrite>", rest="rewrite>"),
]
BACK = Return("<|return_to_base|>", "<|start_of_role|>")
CONTROLS = ["<|return_to_base|>", "<|first|>", "<|answer|>", "<|tag|>"]
USER = [{"role": "user", "content": "Where? <rewrite> here, <rewrite> there"}]


def templates() -> list[str]:
    odd = [
        "  {% if true %}\n  x{% endif %}\n   ",
        "\n\n{{ messages[0].content }}\n\n",
        "{%- for m in messages -%}\n  {{ m.content }}  \n{%- endfor -%}\n",
        "{# c #}\n{{ messages[0].content }}{# d #}\n",
        "{% macro m(x) %}[{{ x }}{{ sep }}]{% endmacro %}{% set sep = '!' %}{{ m(messages[0].content) }}",
        "{% set sep = '!' %}{% macro m(x) %}[{{ x }}{{ sep }}]{% endmacro %}{{ m(messages[0].content) }}  ",
        "text only\r\n",
        "text\r\nand\rmore\r\r\n",
        "{{ messages[0].content }}\r\r",
        "{% generation %}{{ messages[0].content }}{%- endgeneration -%}\n{% macro m() %}{{ caller() }}{% endmacro %}"
        "{% call m() %}{% generation %}\n a {% endgeneration %}{% endcall %}",
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}\n{% endfor %}",
    ]
    return [GRANITE_TEMPLATE, CHATML_TEMPLATE, *(template for template, *_ in FAMILIES.values()), *odd]


@pytest.mark.parametrize("template", templates())
@pytest.mark.parametrize("generation", [True, False])
def test_without_adapter_it_is_the_base(template: str, generation: bool) -> None:
    wrapped = wrap(template, PLACEMENTS, BACK, CONTROLS)
    chat = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": " \n x "}]
    for variables in ({}, {"adapter_name": None}, {"adapter_name": ""}, {"adapter_name": "base"}):
        variables |= {"add_generation_prompt": generation, "documents": [{"text": "é <b>"}]}
        assert render(wrapped, chat, **variables) == render(template, chat, **variables)


def test_real_template_is_kept_byte_for_byte() -> None:
    if not (template := real_granite()):
        pytest.skip("no real template beside the checkout")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for variables in ({}, {"documents": [{"doc_id": "1", "text": "a"}]}, {"tools": tools}, {"available_tools": tools}):
        expected = render(template, USER, add_generation_prompt=True, **variables)
        assert (
            render(wrap(template, PLACEMENTS, BACK, CONTROLS), USER, add_generation_prompt=True, **variables)
            == expected
        )
        named = render(wrap(template, PLACEMENTS, BACK, CONTROLS), USER, adapter_name="first", **variables)
        assert named.startswith("<|first|>")


@pytest.mark.parametrize("template", templates())
def test_unwrap_gives_the_base_back(template: str) -> None:
    wrapped = wrap(template, PLACEMENTS, BACK, CONTROLS)
    assert wrap(unwrap(wrapped) or "", PLACEMENTS, BACK, CONTROLS) == wrapped
    assert unwrap(template) is None


def test_placement() -> None:
    wrapped = wrap(GRANITE_TEMPLATE, PLACEMENTS, BACK, CONTROLS)
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
        render(wrap(GRANITE_TEMPLATE, PLACEMENTS, BACK, CONTROLS), chat, adapter_name=name)


def user(content: str, adapter: str = "") -> dict[str, str]:
    return {"role": "user", "content": content, **({"adapter": adapter} if adapter else {})}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_an_adapter_for_each_message() -> None:
    chat = [
        {"role": "system", "content": "Be brief."}, user("one", "first"), assistant("A1"), user("two", "answer"),
        assistant("A2"), user("three"), assistant("A3"), user("four <rewrite>", "tag"), assistant("A4"), user("five"),
    ]  # fmt: skip
    composed = wrap(GRANITE_TEMPLATE, PLACEMENTS, BACK, CONTROLS)
    text = render(composed, chat, add_generation_prompt=True)
    expected = """\
<|first|>system<|end_of_role|>Be brief.<|end_of_text|>
<|start_of_role|>user<|end_of_role|>one<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>A1<|end_of_text|>
<|return_to_base|>user<|end_of_role|>two<|end_of_text|>
<|answer|>assistant<|end_of_role|>A2<|end_of_text|>
<|return_to_base|>user<|end_of_role|>three<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>A3<|end_of_text|>
<|start_of_role|>user<|end_of_role|>four <|tag|>rewrite><|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>A4<|end_of_text|>
<|return_to_base|>user<|end_of_role|>five<|end_of_text|>
<|start_of_role|>assistant<|end_of_role|>"""
    assert text == expected
    assert render(composed, chat, adapter_name="base", add_generation_prompt=True) == expected


def test_a_turn_with_tool_calls_is_one_turn() -> None:
    """Tool results belong to the turn that the user's message opened, so no control token is placed there."""
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    template = FAMILIES["granite"][0]
    chat = [
        user("one", "answer"), {**assistant(""), "tool_calls": [call]}, {"role": "tool", "content": "12"},
        assistant("noon"), user("two"),
    ]  # fmt: skip
    composed = wrap(template, PLACEMENTS, BACK, CONTROLS)
    asked = [render(composed, chat[:end], add_generation_prompt=True) for end in (1, 3, 5)]
    assert asked[1].startswith(asked[0] + "<tool_call>")
    assert asked[2].startswith(asked[1] + "noon")
    assert [asked[2].count(token) for token in ("<|answer|>", "<|return_to_base|>")] == [1, 1]


@pytest.mark.parametrize(
    ("chat", "variables", "words"),
    [
        ([user("x", "nobody")], {}, "no adapter 'nobody'. Adapters: first, answer, tag"),
        ([user("x", "first"), assistant("y"), user("z", "nobody")], {}, "no adapter 'nobody'"),
        ([user("x", "first")], {"adapter_name": "answer"}, "is 'answer', but the last message's `adapter` is 'first'"),
        (
            [user("x", "first"), assistant("y")],
            {"adapter_name": "answer", "add_generation_prompt": False},
            "is 'first'",
        ),
        ([user("x", "first")], {"message_adapters": ["answer"]}, "whose `adapter` is 'first'"),
        ([user("x")], {"message_adapters": ["base", "answer"]}, "has 2 entries for 1 user messages"),
        ([user("x", "base"), assistant("y"), user("z", "tag")], {}, "its turn does not contain"),
        ([user("x", "base"), assistant("y")] * 500, {}, "500 answers are kept"),
    ],
)
def test_what_contradicts_itself_raises(chat: list, variables: dict, words: str) -> None:
    composed = wrap(GRANITE_TEMPLATE, PLACEMENTS, BACK, CONTROLS)
    with pytest.raises(TemplateError, match=words):
        render(composed, chat, **{"add_generation_prompt": True, **variables})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[-1].content }}", "does not write an earlier answer exactly once"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }};{% endfor %}",
            "does not write an earlier answer exactly once",
        ),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "does not open with"),
    ],
)
def test_templates_that_cannot_keep_turns_say_so(template: str, words: str) -> None:
    placed = [Placement("tag", "<|tag|>", invocation="<rewrite>", rest="rewrite>")]
    chat = [user("<rewrite>", "tag"), assistant("y"), user("z")]
    with pytest.raises(TemplateError, match=words):
        render(wrap(template, placed, BACK, CONTROLS), chat, add_generation_prompt=True)


@pytest.mark.parametrize("place", ["prefix", "suffix"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_missing_invocation_text_is_written_where_the_record_says(place: str, parts: bool) -> None:
    placed = [Placement("tag", "<|tag|>", invocation="<rewrite>", rest="rewrite>", place=place)]
    template = FAMILIES["granite"][0]
    composed = wrap(template, placed, BACK, CONTROLS)

    def chat(text: str) -> list:
        content = [{"type": "text", "text": text}] if parts else text
        return [user("<rewrite> earlier"), assistant("y"), {"role": "user", "content": content}]

    written = {"prefix": "<rewrite>Where?", "suffix": "Where?<rewrite>"}[place]
    head, _, tail = render(template, chat(written), add_generation_prompt=True).rpartition("<rewrite>")
    expected = f"{head}<|tag|>rewrite>{tail}"
    for text in ("Where?", written):
        assert render(composed, chat(text), adapter_name="tag", add_generation_prompt=True) == expected
    assert render(composed, chat("Where?"), add_generation_prompt=True) == render(
        template, chat("Where?"), add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ range(10 ** 12) }}", "OverflowError"),
        ("{{ messages.x.y }}", "no attribute"),
        ("{% for %}", "Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_whatever_goes_wrong_is_a_template_error(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        render(template, [])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10 ** 10 }}", "needs more than"),
        (
            "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "needs more",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "does not finish within 2 sec",
        ),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_templates_of_others_are_stopped(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        render_limited(template, seconds=2 if "99999" in template else 60, messages=[])
    assert render_limited("{{ messages[0].content }}é", seconds=60, messages=[user("\u2028x")]) == "\u2028xé"
