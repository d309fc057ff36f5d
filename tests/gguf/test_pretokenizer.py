"""The pre-tokenizer name in the file makes llama.cpp split text as the tokenizer does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.errors import CheckpointError
from granite_switch.gguf import prepare
from granite_switch.gguf.pretokenizer import CL100K, GPT2, KNOWN, NAMES, SPELLINGS, detect, splits

TEXTS = [
    "It's 2026: we've spent 1234567 (or 12.5 %) -- on 'THIS', you'LL say. I'D not.",
    "  two  spaces\t\ttabs \n\n \n  lines\r\n\r\n   end   ",
    "naïve Größe ÉCOLE Ελλάδα Привет мир 你好,世界 日本語テキスト 한국어 हिन्दी العربية 🚀🧑‍🚀 e\u0301",
    "def f(x):\n    return x**2 + x[0]['key'] != None  # comment\n\n\tif a<b && c>=d: pass",
    "<|start_of_role|>user<|end_of_role|> https://example.org/a?b=c&d=1 a_b-c ½ ² Ⅷ ٣٤٥",
    '{"doc_id": "1", "text": "a red house", "n": [1, 22, 333, 4444]}',
    "'s 't 're x'S x'Re '''quotes''' ``code`` $100 €5 1,000,000",
    "\u00a0nbsp\u2003em\u3000wide",
]
OTHER = {
    "no pre-tokenizer": None,
    "no bytes": {"type": "Whitespace"},
    "a space before": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
    "another expression": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "another behaviour": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "MergedWithNext", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "digits together": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}


def tokenizer_of(expressions: tuple[str, ...], ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE trained on the texts; merges cross every boundary that the expressions do not create."""
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    pieces = [pre_tokenizers.Split(Regex(text), "isolated") for text in expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end_of_text|>"],
        show_progress=False,
    )
    free = Tokenizer(BPE())
    free.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    free.train_from_iterator(TEXTS * 3, trainer)
    data, model = json.loads(tokenizer.to_str()), json.loads(free.to_str())
    data["added_tokens"] = model["added_tokens"]
    data["model"] = {**model["model"], "ignore_merges": ignore_merges}
    return Tokenizer.from_str(json.dumps(data))


def data_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def test_granites_own_structures() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert detect(data_of(tokenizer)) == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert detect(data_of(tokenizer)) == "refact"  # Granite 3
    assert detect(data_of(tokenizer_of((CL100K,)))) == "dbrx"  # Granite 4
    removed = data_of(tokenizer_of((CL100K,)))
    removed["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert detect(removed) == "dbrx"


def test_every_row_is_found_and_every_name_exists() -> None:
    for (expressions, ignore_merges), name in KNOWN.items():
        assert detect(data_of(tokenizer_of(expressions, ignore_merges))) == name
        assert name in NAMES
    assert detect(data_of(tokenizer_of((GPT2,), ignore_merges=True))) is None


@given(
    st.lists(
        st.sampled_from(
            ["a", "B", "é", "'s", "'", "1", "22", " ", "  ", "\n", "\r\n", "\t", ".", "!?", "你", "\u00a0"]
        ),
        max_size=20,
    )
)
def test_spellings_split_alike(parts: list[str]) -> None:
    text = "".join(parts)
    for spelling, expression in SPELLINGS.items():
        mine, known = (
            pre_tokenizers.Split(Regex(e), "isolated").pre_tokenize_str(text) for e in (spelling, expression)
        )
        assert mine == known


@pytest.mark.parametrize("pre_tokenizer", OTHER.values(), ids=OTHER.keys())
def test_anything_else_is_not_guessed(pre_tokenizer: Any) -> None:
    assert splits(pre_tokenizer or {}) not in [expressions for expressions, _ in KNOWN]
    assert detect({"pre_tokenizer": pre_tokenizer, "model": {}}) is None
    lower = {"pre_tokenizer": {"type": "ByteLevel"}, "normalizer": {"type": "Lowercase"}, "model": {}}
    assert detect(lower) is None


def test_unknown_asks_for_the_name(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    data = json.loads((model / "tokenizer.json").read_text())
    data["pre_tokenizer"] = OTHER["another expression"]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="no pre-tokenizer") as caught:
        prepare(tmp_path / "model")
    assert "--pre" in caught.value.hint
    assert "gpt-2" in caught.value.hint
    assert prepare(tmp_path / "model", pre="qwen2").pre == "qwen2"
    with pytest.raises(CheckpointError, match="no such pre-tokenizer"):
        prepare(model, pre="gpt2")
    plan = prepare(model, pre="dbrx")
    assert plan.pre == "dbrx"
    assert "splits text as gpt-2 does" in plan.warnings[0]


@pytest.mark.engine
@pytest.mark.parametrize(("row", "name"), KNOWN.items(), ids=KNOWN.values())
def test_the_engine_tokenises_alike(row: tuple[tuple[str, ...], bool], name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(*row)
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert tokens_in_engine(tokenizer, name, tmp_path) == wanted
    for other, its in KNOWN.items():  # a wrong name is noticed
        if other[0] != row[0]:
            assert tokens_in_engine(tokenizer, its, tmp_path) != wanted


def tokens_in_engine(tokenizer: Tokenizer, pre: str, folder: Path) -> list[list[int]]:
    from llama_engine import Engine

    write_vocabulary(tokenizer, pre, folder / "vocabulary.gguf")
    loaded = Engine(folder / "vocabulary.gguf", vocab_only=True)
    try:
        return [loaded.tokenize(text) for text in TEXTS]
    finally:
        loaded.close()


def write_vocabulary(tokenizer: Tokenizer, pre: str, path: Path) -> None:
    """Write a GGUF file with only a tokenizer."""
    from gguf import GGUFWriter

    from granite_switch.core.spec import SwitchSpec
    from granite_switch.gguf.vocabulary import vocabulary
    from granite_switch.gguf.write import write_words

    known = BaseTokenizer(data_of(tokenizer), {}, {}, {"eos_token": "<|end_of_text|>"})
    words, problems, _ = vocabulary(known, known.size, SwitchSpec((), "", -1, -1))
    assert not problems
    writer = GGUFWriter(path, "graniteswitch")
    write_words(writer, words, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
