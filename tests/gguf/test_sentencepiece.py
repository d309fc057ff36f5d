"""BPE with byte fallback in llama.cpp: the tokens of the tokenizer, on real vocabularies and on hypothesis' texts."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretokenizer import TEXTS, write_vocabulary
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


# what writes spaces: (normalizer, pre_tokenizer)
SPACES = {
    "prepend": (PREPEND, None),
    "never": (NEVER, None),
    "metaspace never": (None, metaspace("never")),
    "metaspace first": (None, metaspace("first")),
}


def llama_2(folder: Path) -> dict[str, Any]:
    """Llama 2's tokenizer.json, from its vocabulary in llama.cpp's sources by transformers' own conversion."""
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
        pytest.importorskip("llama_cpp", reason="needs the llama.cpp build: make test-gguf")
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


PARTS = st.lists(
    st.sampled_from(
        ["a", "B", "é", "'s", "'", "1", "22", " ", "  ", "    ", "\n", "\r\n", "\t", ".", "!?", "你", "\u00a0", "▁", "s>"]
        + ["the", " river", "ing", "Straße", "🚀", "<s>", "</s>", "<0x0A>", "日本語", "العربية", "e\u0301", "ﬀ", "\u200b"]
    )
    | st.text(max_size=6),
    max_size=24,
).map("".join).filter(lambda text: "\0" not in text)  # fmt: skip


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return llama_2(tmp_path_factory.mktemp("llama"))


@pytest.mark.engine
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
