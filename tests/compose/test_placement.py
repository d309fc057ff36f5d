"""Control tokens are placed correctly in all kinds of templates, including those that start with a BOS token."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from artefacts import make_adapter, make_base
from templates import LLAMA, LLAMA_TEMPLATE
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from granite_switch import compose
from granite_switch.composition.placement import chats, opening, turn
from granite_switch.composition.verify import verify
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import AdapterError, SwitchError

GEMMA = ["<bos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
GEMMA_TEMPLATE = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
BOS = {
    "llama": (LLAMA_TEMPLATE, LLAMA, "<|start_header_id|>assistant<|end_header_id|>"),
    "gemma": (GEMMA_TEMPLATE, GEMMA, "<start_of_turn>model\n"),
}
OPEN = "<|start_of_role|>"
ASK = [{"role": "user", "content": "Where does Anna live?"}]


@pytest.fixture(scope="module", params=BOS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    template, specials, invocation = BOS[request.param]
    folder = tmp_path_factory.mktemp("bos")
    base = make_base(folder / "base", layers=1, template=template, specials=specials)
    make_adapter(folder / "pool/whole", base, seed=1, rank=1)
    make_adapter(folder / "pool/answer", base, seed=2, rank=1, invocation=invocation)
    compose(base, [folder / "pool"], folder / "model")
    return base, folder / "model"


def read_spec(folder: Path) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads((folder / "config.json").read_text())["switch"])


def ids(folder: Path, messages: list = ASK, **variables: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **variables)[
        "input_ids"
    ]


def test_a_loras_control_token_takes_the_place_of_bos(model: tuple[Path, Path]) -> None:
    base, composed = model
    spec = read_spec(composed)
    plain = ids(base)
    assert plain[0] == 0
    assert spec.adapter("whole").substitute_token_id == 0
    assert ids(composed, adapter_name="whole") == [spec.adapter("whole").token_id, *plain[1:]]
    assert ids(composed) == plain
    answer = ids(composed, adapter_name="answer")
    at = answer.index(spec.adapter("answer").token_id)
    assert answer[:at] + [2] + answer[at + 1 :] == plain
    assert at > 3
    verify(composed)


def test_return_to_base_takes_the_place_of_what_opens_a_turn(model: tuple[Path, Path]) -> None:
    base, composed = model
    messages = [{**ASK[0], "adapter": "whole"}, {"role": "assistant", "content": "In Oslo."}, *ASK]
    spec = read_spec(composed)
    assert spec.base_substitute_token_id == 2
    found = ids(composed, messages)
    plain = ids(base, [{k: v for k, v in m.items() if k != "adapter"} for m in messages])
    assert found.count(spec.base_token_id) == found.count(spec.adapter("whole").token_id) == 1
    assert [spec.substitutes.get(i, i) for i in found] == plain


def test_the_token_that_opens_a_turn(base: Path) -> None:
    tokenizer = read_tokenizer(base)
    samples = chats(tokenizer.templates["default"], tokenizer.special_tokens)
    first = opening(samples, tokenizer.library)
    assert (first.text, turn(tokenizer.templates["default"], samples, tokenizer.library)) == (
        "<|start_of_role|>",
        first,
    )


def test_where_a_missing_invocation_text_goes(base: Path, adapters: Path, tmp_path: Path) -> None:
    entries = [{"path": str(adapters / "query_rewrite"), "invocation_placement": "prefix"}]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(entries))
    compose(base, [tmp_path / "m.yaml"], tmp_path / "manifest")
    compose(base, [adapters / "query_rewrite"], tmp_path / "option", place={"query_rewrite": "prefix"})
    written = [{"role": "user", "content": "<rewrite>Where does Anna live?"}]
    for folder in ("manifest", "option"):
        verify(tmp_path / folder)
        expected = ids(tmp_path / folder, written, adapter_name="query_rewrite")
        assert ids(tmp_path / folder, adapter_name="query_rewrite") == expected
    same = [(tmp_path / folder / "config.json").read_bytes() for folder in ("manifest", "option")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("place", "words"),
    [({"query_rewrite": "middle"}, "not 'middle'"), ({"nobody": "prefix"}, "no adapter nobody"),
     ({"citations": "prefix"}, "has no invocation text")],
)  # fmt: skip
def test_places_that_are_none(place: dict, words: str, base: Path, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words):
        compose(base, [adapters], tmp_path / "model", place=place)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10 ** 10 }}", "needs more than 1024 MB"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        (
            OPEN + "{% if adapter_name %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages[0].content }}",
            "needs more than 1024 MB",
        ),
        (OPEN + "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% endcall\t\t%}", "contains the markers"),
    ],
)
def test_templates_that_do_harm_are_refused(template: str, words: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layers=1, template=template)
    make_adapter(tmp_path / "whole", base, rank=1)
    with pytest.raises(SwitchError, match=words):
        compose(base, [tmp_path / "whole"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_special_tokens_with_a_space_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layers=1, template="<|start_of_role|>{{ messages[0].content }}")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|end of turn|>"])
    tokenizer.save(str(base / "tokenizer.json"))
    make_adapter(tmp_path / "whole", base, rank=1)
    with pytest.raises(SwitchError, match="special tokens with a space"):
        compose(base, [tmp_path / "whole"], tmp_path / "model")
