"""BPE with byte fallback in llama.cpp gives the tokenizer's tokens, on real vocabularies and hypothesis' texts."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_pretokenizer import TEXTS
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import generate_merges

from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.gguf.pretokenizer import CL100K, detect
from granite_switch.gguf.vocabulary import Vocabulary, vocabulary

SDIST = Path(__file__).parents[2] / ".cache" / "sdist"
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
NEVER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


# how spaces are written: (normalizer, pre_tokenizer)
SPACES = {
    "prepend": (PREPEND, None),
    "never": (NEVER, None),
    "metaspace never": (None, metaspace("never")),
    "metaspace first": (None, metaspace("first")),
}


def llama_2(folder: Path) -> dict[str, Any]:
    """Llama 2's tokenizer.json, converted by transformers from the vocabulary in llama.cpp's sources."""
    found = {
        name: field.contents() for name, field in GGUFReader(real("ggml-vocab-llama-spm.gguf", folder)).fields.items()
    }
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)), skip_tokens=tokens[:259])
    return tokenizer_json(vocab, merges)


def real(name: str, folder: Path) -> Path:
    archives = list(SDIST.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pytest.skip("needs llama-cpp-python's sources in .cache/sdist: make test-gguf")
    with tarfile.open(archives[0]) as archive:
        member = next(m for m in archive if m.name.endswith(f"vendor/llama.cpp/models/{name}"))
        data = archive.extractfile(member)
        assert data
        (folder / name).write_bytes(data.read())
    return folder / name


def tokenizer_json(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    added = [
        {"id": vocab[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text in ("<unk>", "<s>", "</s>")
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": PREPEND,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def made(data: dict[str, Any]) -> tuple[Vocabulary, list[str], list[str]]:
    known = BaseTokenizer(data, {}, {}, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return vocabulary(known, known.size, SwitchSpec((), "", -1, -1))


class Pair:
    """A tokenizer in the library and in llama.cpp."""

    def __init__(self, data: dict[str, Any], folder: Path) -> None:
        from llama_engine import Engine

        self.library = Tokenizer.from_str(json.dumps(data))
        words, problems, self.warnings = made(data)
        assert not problems
        path = folder / "vocabulary.gguf"
        writer = GGUFWriter(path, "graniteswitch")
        from granite_switch.gguf.write import write_words

        write_words(writer, words, detect(data) or "")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.engine = Engine(path, vocab_only=True)

    def check(self, text: str) -> None:
        wanted = self.library.encode(text, add_special_tokens=False).ids
        assert self.engine.tokenize(text) == wanted, text


WORDS = [
    *"aB1é你▁🚀.'",
    "'s",
    "22",
    "!?",
    "s>",
    "the",
    "ing",
    "Straße",
    "<s>",
    "</s>",
    "<0x0A>",
    "日本語",
    "العربية",
    "ﬀ",
]
PARTS = (
    st.lists(
        st.sampled_from([*WORDS, " ", "  ", "    ", " river", "\n", "\r\n", "\t", "\u00a0", "e\u0301", "\u200b"])
        | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=6),  # releases know other new characters
        max_size=24,
    )
    .map("".join)
    .filter(lambda text: "\0" not in text)
)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return llama_2(tmp_path_factory.mktemp("llama"))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES.keys())
def test_llama_2(spaces: tuple[Any, Any], llama2: dict[str, Any], tmp_path: Path) -> None:
    pair = Pair({**llama2, "normalizer": spaces[0], "pre_tokenizer": spaces[1]}, tmp_path)
    first = bool(spaces[1]) and spaces[1]["prepend_scheme"] == "first"
    assert bool(pair.warnings) == first
    before = "<s>" if first else ""  # as the warning says: prompts that begin with a special token

    @settings(max_examples=2000)
    @given(PARTS)
    def check(text: str) -> None:
        pair.check(before + text)

    check()
    for text in TEXTS:
        pair.check(before + text)
    pair.engine.close()


SMALL = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abc"])}


def small(pieces: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    """A tokenizer of a few merges."""
    vocab = {**SMALL, **{left + right: len(SMALL) + i for i, (left, right) in enumerate(pieces)}}
    data = tokenizer_json({text: i for i, text in enumerate(vocab)}, pieces)
    return {**data, **changes, "model": {**data["model"], **changes.get("model", {})}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (small([("a", "b")], normalizer=None, pre_tokenizer=metaspace("always")), "prepend_scheme 'always'"),
        (small([("a", "b")], normalizer=None, pre_tokenizer=metaspace("first", split=True)), "prepend_scheme 'first'"),
        (small([("a", "b")], normalizer={"type": "NFKC"}), "normalizer NFKC"),
        (small([("a", "b"), ("ab", "c"), ("b", "c")]), "'a' and 'bc' are not a merge"),
        (small([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]), "alternate"),
        (
            small([("a", "b")], model={"vocab": {t: i for t, i in SMALL.items() if t != "<0x07>"}, "merges": []}),
            "<0x07>",
        ),
        (small([("a", "b")], model={"ignore_merges": True}), "ignore_merges"),
    ],
)
def test_what_llama_cpp_would_tokenise_otherwise(data: dict[str, Any], message: str) -> None:
    assert message in "\n".join(made(data)[1])
    assert not made(small([("a", "b"), ("ab", "c")]))[1]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("which", ["Llama 3", "SmolLM2"])
def test_byte_level_tokenizers_as_published(which: str, tmp_path: Path) -> None:
    pair = Pair(llama_3(tmp_path) if which == "Llama 3" else smollm2(), tmp_path)

    @settings(max_examples=2000)
    @given(PARTS)
    def check(text: str) -> None:
        ids = pair.library.encode(text, add_special_tokens=False).ids
        assume(pair.library.decode(ids, skip_special_tokens=False) == text)  # else bytes were dropped
        pair.check(text)

    assert any("lacks some bytes" in line for line in pair.warnings) == (which == "SmolLM2")
    check()
    for text in TEXTS:
        pair.check(text)
    pair.engine.close()


def llama_3(folder: Path) -> dict[str, Any]:
    """Llama 3's tokenizer.json, from its vocabulary in llama.cpp's sources."""
    found = {
        name: field.contents() for name, field in GGUFReader(real("ggml-vocab-llama-bpe.gguf", folder)).fields.items()
    }
    vocab = {text: i for i, text in enumerate(found["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]]
    data = tokenizer_json({**vocab, "<unk>": 0, "<s>": 0, "</s>": 0}, merges)
    kinds = found["tokenizer.ggml.token_type"]
    special = [{**data["added_tokens"][0], "id": i, "content": text} for text, i in vocab.items() if kinds[i] == 3]
    split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        **data,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **data["model"], "unk_token": None, "byte_fallback": False, "fuse_unk": False, "ignore_merges": True,
            "vocab": {text: i for text, i in vocab.items() if kinds[i] != 3},
        },
    }  # fmt: skip


def smollm2() -> dict[str, Any]:
    path = SDIST.parent / "real" / "base" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("needs the real model: make real")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
