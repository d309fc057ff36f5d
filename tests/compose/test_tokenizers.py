"""A composed model's tokenizer reads as its base's: in transformers, for every tokenizer class, and in this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from artefacts import ROOT, edit_json, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent))
from tokenizer_folders import CASES, Case, write_base, write_composed
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import granite_switch.hf  # noqa: F401  (registers the Auto classes; the worker does without)
from granite_switch import Conversation, compose
from granite_switch.autotokenizer import differences
from granite_switch.composition import proof
from granite_switch.composition.reading import _REGISTERED, read_as_base
from granite_switch.composition.verify import find_problems
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import BaseModelError, SwitchError

TEXTS = int(os.environ.get("TOKENIZER_TEXTS", "15"))  # per case; 2000 for a thorough run
ADA = "Ada said:\n\n\"It's 1871!\"\n- see (Tarn), x=12345;\n\n\tHugo's harp"
# releases that read a byte-level tokenizer.json as Llama's sentencepiece one, for base and composed model alike
MISREAD = Version(transformers.__version__) < Version("5.22")

_PIECES = st.one_of(
    st.sampled_from(
        ["It's", "we'LL", " the", "river", "Straße", "naïve", "e\u0301", "日本語", "кириллица", "हिन्दी", "👩‍👩‍👧"]
    ),
    st.sampled_from(
        ["<|end_of_text|>", "<|start_of_role|>", "<s>", "</s>", "<unk>", "<bos>", "<think>", "<tool>", "mill"]
    ),
    st.sampled_from(["<|endoftext|>", "<extra>", "<begin>", "<image>", "<0x0A>", "▁", "Ġ", "\u00a0", "\u200b", "\r\n"]),
    st.text(alphabet=" \t\n\r", min_size=1, max_size=6),
    st.text(alphabet="0123456789.,", min_size=1, max_size=9),
    st.text(alphabet="\"'`“”()[]{}=!?;:-", min_size=1, max_size=4),
    st.text(max_size=8),
)
TEXT = st.lists(_PIECES, max_size=12).map("".join)


def _folders(case: Case, root: Path) -> tuple[Path, Path]:
    base, composed = (root / str(CASES.index(case)) / name for name in ("base", "composed"))
    return (base, composed) if base.is_dir() else (write_base(base, case), write_composed(composed, base))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def _misread(case: Case) -> bool:
    if case.tokenizer_class is None and case.model_type in _REGISTERED.keys() - TOKENIZER_MAPPING_NAMES.keys():
        return True  # an earlier release has no class for it; composing there would refuse it
    plain = (case.tokenizer_class or "").removesuffix("Fast") == "LlamaTokenizer"
    return MISREAD and plain and case.kind == "bytes" and case.model_type == "llama"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_are_the_bases(case: Case, root: Path) -> None:
    if _misread(case):
        pytest.skip("this release reads the base itself differently from the newest")
    base, composed = _folders(case, root)
    theirs, ours = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(composed)
    file = read_tokenizer(composed).library
    assert type(ours) is type(theirs)

    @given(TEXT)
    @settings(max_examples=TEXTS, database=None)
    def check(text: str) -> None:
        for add in (True, False):
            ids = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == ids
            assert file.encode(text, add_special_tokens=add).ids == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            if case.config.get("clean_up_tokenization_spaces") is None:
                assert file.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip)

    check()


def test_without_importing_us(root: Path) -> None:
    """A process that has not registered `granite_switch` reads every case as its base, without a warning."""
    cases = [case for case in CASES if not _misread(case)]
    pairs = [list(map(str, _folders(case, root))) for case in cases]
    worker = Path(__file__).parent / "tokenizer_worker.py"
    run = subprocess.run([sys.executable, worker], input=json.dumps(pairs), capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert not {str(case): lines for case, lines in zip(cases, found["differences"], strict=True) if lines}
    assert not [line for line in found["warnings"] if "granite_switch" in line or "model of type" in line]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's base with the tokenizer class that the tokenizer_config.json of real Granite folders names."""
    folder = tmp_path_factory.mktemp("sample") / "base"
    shutil.copytree(ROOT / "sample" / "base", folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    return folder


def test_the_sample_as_granite_is_published(sample: Path, tmp_path: Path) -> None:
    composed = tmp_path / "model"
    compose(sample, [ROOT / "sample" / "library"], composed, base_name="granite-switch-sample")
    expected = AutoTokenizer.from_pretrained(sample).encode(ADA, add_special_tokens=False)
    assert len(expected) == 42
    assert AutoTokenizer.from_pretrained(composed).encode(ADA, add_special_tokens=False) == expected
    assert read_tokenizer(composed).library.encode(ADA, add_special_tokens=False).ids == expected

    edit_json(composed / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # as earlier versions composed it
    unregistered = AutoTokenizer.from_pretrained(composed, config=PreTrainedConfig())
    assert len(unregistered.encode(ADA, add_special_tokens=False)) == 43
    problems = find_problems(composed)
    assert problems
    assert all(line.startswith("AutoTokenizer: ") for line in problems)


def test_truncation_and_padding_do_not_touch_prompts(adapters: Path, tmp_path: Path) -> None:
    """A `max_length` left from training used to cut off the control token; fixed padding ended prompts with pads."""
    base = make_base(tmp_path / "base", pad_vocab=9)
    truncation = {"max_length": 32, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 4000}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"}
    edit_json(base / "tokenizer.json", truncation=truncation, padding=padding)
    composed = tmp_path / "model"
    compose(base, [adapters], composed)
    edit_json(composed / "tokenizer.json", truncation=truncation, padding=padding)  # restored: reading resets it too
    for adapter in ("answerability", "citations"):
        turn = Conversation(composed).ask("Where does Anna live? " * 100, adapter)
        assert 1 not in turn.ids
        assert len(turn.ids) > 500
        assert sum(token in Conversation(composed).spec.control_slots for token in turn.ids) == 1


def test_a_proof_that_is_not_needed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that proves the tokenizer starts before the base is read, and ends with a base that is refused."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(SwitchError):
        compose(tmp_path / "nothing", [tmp_path], tmp_path / "out")
    assert [process.poll() is None for process in started] == [False]


def test_a_proof_that_fails_names_what_differs(root: Path) -> None:
    base = write_base(root / "cohere" / "base", Case("cohere", "CohereTokenizer", "bytes"))
    composed = write_composed(root / "cohere" / "composed", base)
    with pytest.raises(BaseModelError, match="reads the composed tokenizer differently") as raised:
        proof.check(proof.differences(composed, base))
    assert any("they differ from index" in line for line in raised.value.problems)


@pytest.mark.parametrize("key", ["added_tokens_decoder", "extra_special_tokens"])
def test_control_tokens_that_are_undone_are_found(key: str, root: Path) -> None:
    base = write_base(root / key / "base", Case("llama", "PreTrainedTokenizerFast", "bytes"))
    composed = write_composed(root / key / "composed", base)
    assert not differences(composed, base)
    data = json.loads((composed / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|switch:cite|>"]
    edit_json(composed / "tokenizer.json", **data)
    edit_json(
        composed / "tokenizer_config.json", **{key: ["<|switch:cite|>"]} if key.startswith("extra") else {key: {}}
    )
    with pytest.raises(BaseModelError):
        proof.check(proof.differences(composed, base))


def test_code_of_its_own_is_refused(tmp_path: Path) -> None:
    auto_map = {"auto_map": {"AutoTokenizer": [None, "tokenization.Own"]}}
    base = write_base(tmp_path / "base", Case("llama", "OwnTokenizer", "bytes", auto_map))
    with pytest.raises(BaseModelError, match="auto_map"):
        read_as_base(base, {"model_type": "llama"})


def test_a_unigram_model_under_a_bpe_class_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", Case("llama", "LlamaTokenizer", "metaspace"))
    edit_json(base / "tokenizer.json", model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]})
    with pytest.raises(BaseModelError, match="Unigram model cannot be read as LlamaTokenizer"):
        read_as_base(base, {"model_type": "llama"})


def test_sentencepiece_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json") as raised:
        read_tokenizer(tmp_path)
    assert "sentencepiece" in str(raised.value.hint)


def test_the_way_out_of_sentencepiece_leads_there(tmp_path: Path) -> None:
    """The hint's command makes a folder that composes, and that reads as transformers reads the sentencepiece model."""
    spm: Any = pytest.importorskip("sentencepiece")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(["the river ends in the sea", "It's 1871! naïve café", "x = 12345; (Tarn)"] * 30))
    base = tmp_path / "base"
    base.mkdir()
    options = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "hard_vocab_limit": False}
    spm.SentencePieceTrainer.train(input=str(lines), model_prefix=str(base / "tokenizer"), **options)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    theirs = AutoTokenizer.from_pretrained(base)
    with pytest.raises(BaseModelError) as raised:
        read_tokenizer(base)
    command = str(raised.value.hint).partition(": ")[2].replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    shutil.copytree(tmp_path / "NEW", base, dirs_exist_ok=True)
    composed = write_composed(tmp_path / "composed", base)
    ours = AutoTokenizer.from_pretrained(composed)
    for text in (ADA, "  two  spaces\n\tand naïve café", "日本語 <s> x"):
        assert ours.encode(text) == theirs.encode(text)
    assert not differences(composed, base)
