"""llama.cpp computes from the exported file what the transformers backend computes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from granite_switch.core.spec import SwitchSpec
from granite_switch.gguf import export

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the llama.cpp build: make test-gguf")

from llama_engine import Engine

pytestmark = pytest.mark.engine

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
TOLERANCE = 1e-5
LENGTH = 48


class Reference:
    """The transformers backend in float32, and the base's own token ids."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        import granite_switch.hf  # noqa: F401

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.spec: SwitchSpec = self.model.config.switch_spec
        self.base_vocabulary = min(self.spec.control_slots)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0].numpy()[:, : self.base_vocabulary]

    def prompt(self, name: str = "", at: int = 0, seed: int = 0, length: int = LENGTH) -> list[int]:
        """Random tokens with an adapter's control token in one place."""
        tokens = np.random.default_rng(seed).integers(6, self.base_vocabulary - 20, length).tolist()
        if name:
            tokens[at] = self.spec.adapter(name).token_id
        return tokens


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found[:, : wanted.shape[1]] - wanted).max())


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def engine(exported: Path) -> Iterator[Engine]:
    loaded = Engine(exported)
    yield loaded
    loaded.close()


CASES = [("", 0), ("check", 0), ("check", 20), ("cite", 17), ("rewrite", 0), ("rewrite", 31), ("rewrite", LENGTH - 1)]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_logits(engine: Engine, reference: Reference, name: str, at: int) -> None:
    tokens = reference.prompt(name, at)
    wanted = reference.logits(tokens)
    assert difference(engine.logits(tokens), wanted) < TOLERANCE
    if name:  # the adapter acts from its token onward
        substituted = [reference.spec.substitutes.get(token, token) for token in tokens]
        base = reference.logits(substituted)
        assert difference(base[:at], wanted[:at]) < TOLERANCE if at else True
        assert (np.abs(base - wanted)[at:].max(axis=1) > 0.01).all()


def test_three_sequences_in_one_batch(engine: Engine, reference: Reference) -> None:
    prompts = {
        0: reference.prompt("check", 0, seed=1, length=40),
        1: reference.prompt("", seed=2, length=33),
        2: reference.prompt("cite", 21, seed=3, length=48),
    }
    with engine.context(sequences=3) as context:
        found = context.decode(prompts)
    for sequence, tokens in prompts.items():
        assert difference(found[sequence], reference.logits(tokens)) < TOLERANCE


@pytest.mark.parametrize(("name", "at"), [("check", 0), ("rewrite", 13)])
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [5, 8, 1, 30, 4]], ids=["token by token", "in chunks"])
def test_pieces_equal_the_whole(engine: Engine, reference: Reference, name: str, at: int, sizes: list[int]) -> None:
    tokens = reference.prompt(name, at)
    found, start = [], 0
    with engine.context() as context:
        for size in sizes:
            found.append(context.decode({0: tokens[start : start + size]})[0])
            start += size
    assert difference(np.concatenate(found), reference.logits(tokens)) < TOLERANCE


def test_sequences_keep_their_adapters_while_decoding(engine: Engine, reference: Reference) -> None:
    prompts = {
        0: reference.prompt("cite", 9, seed=4),
        1: reference.prompt("check", 0, seed=5),
        2: reference.prompt(seed=6),
    }
    following = {0: [7, 8, 9], 1: [20, 21, 22], 2: [30, 31, 32]}
    with engine.context(sequences=3) as context:
        context.decode(prompts)
        for step in range(3):
            found = context.decode({s: [tokens[step]] for s, tokens in following.items()})
            for s, logits in found.items():
                wanted = reference.logits([*prompts[s], *following[s][: step + 1]])[-1:]
                assert difference(logits, wanted) < TOLERANCE


def test_a_missing_rotary_order_shows(
    model: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite_switch.gguf.tensors.interleaved", lambda rows, heads: rows)
    export(model, tmp_path / "out.gguf")
    broken = Engine(tmp_path / "out.gguf")
    tokens = reference.prompt("check", 0)
    assert difference(broken.logits(tokens), reference.logits(tokens)) > 0.1
    broken.close()


def test_control_tokens_have_no_logit_of_their_own(engine: Engine, reference: Reference) -> None:
    logits = engine.logits(reference.prompt("check", 0))
    assert not logits[:, list(reference.spec.control_slots)].any()


VARIANTS: dict[str, dict[str, Any]] = {
    "untied, wide heads, one kv head": {"tied": False, "head_dim": 32, "kv_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "yarn": {
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "yarn, own attention factor": {
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
            "attention_factor": 1.7,
        },
    },
    "Llama's multipliers": {
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("base", VARIANTS.values(), ids=VARIANTS.keys())
def test_other_bases(make_model: Any, tmp_path: Path, base: dict[str, Any]) -> None:
    folder = make_model(**base)
    export(folder, tmp_path / "out.gguf")
    reference, engine = Reference(folder), Engine(tmp_path / "out.gguf")
    for name, at in (("", 0), ("check", 0), ("cite", 25)):
        tokens = reference.prompt(name, at)
        wanted = reference.logits(tokens)
        assert difference(engine.logits(tokens), wanted) < TOLERANCE * max(1, np.abs(wanted).max())
    engine.close()


@pytest.mark.parametrize(("outtype", "error"), [("f16", 0.005), ("bf16", 0.04), ("q8_0", 0.04)])
def test_smaller_types(model: Path, reference: Reference, tmp_path: Path, outtype: str, error: float) -> None:
    export(model, tmp_path / "out.gguf", outtype=outtype)
    engine = Engine(tmp_path / "out.gguf")
    for name, at in (("", 0), ("check", 0), ("cite", 25)):
        tokens = reference.prompt(name, at)
        wanted = reference.logits(tokens)
        found = engine.logits(tokens)[:, : wanted.shape[1]]
        off = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert off < error
        if name:  # the adapter has an effect: these are not just the base's logits
            base = reference.logits([reference.spec.substitutes.get(token, token) for token in tokens])
            assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(base - wanted)
    engine.close()


def test_the_engine_tokenises_rendered_prompts_alike(engine: Engine, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
    for name in (None, "check", "cite", "rewrite"):
        options = {"adapter_name": name, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert engine.tokenize(text, around=True) == ids


@pytest.mark.parametrize("version", ["g2", "g3"])
def test_legacy_formats_equal_the_old_programs(version: str, tmp_path: Path) -> None:
    folder = SHARED_DATA / "legacy" / version
    if not folder.is_dir():
        pytest.skip("the samples are not beside the checkout")
    export(folder, tmp_path / "out.gguf")
    engine = Engine(tmp_path / "out.gguf")
    config = json.loads((folder / "config.json").read_text())
    controls = config["adapter_token_ids"]
    compared = 0
    for case in json.loads((folder / "expected.json").read_text()):
        tokens = case["input_ids"]
        if len({token for token in tokens if token in controls}) > 1:
            continue  # one adapter per sequence here
        wanted = np.array([case["last_logits"]], np.float32)[:, : min(controls)]
        assert difference(engine.logits(tokens)[-1:], wanted) < TOLERANCE
        compared += 1
    assert compared >= 10
    engine.close()


def test_the_example_generates_what_transformers_generates(
    model: Path, exported: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from transformers import AutoTokenizer
    from with_llama_cpp import adapters, answer

    llm = llama_cpp.Llama(str(exported), n_ctx=256, type_k=0, type_v=0, n_threads=1, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert adapters(llm) == ["check", "cite", "rewrite"]
    messages = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
    for name in ("base", "check", "cite", "rewrite"):  # in turn, over one kept cache
        prompt = tokenizer.apply_chat_template(
            messages, adapter_name=name, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            sequence = reference.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
        wanted = tokenizer.decode(sequence[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        # bytes that are no text: llama-cpp-python drops them, transformers marks them
        assert answer(llm, messages, name, max_tokens=12) == wanted.replace("\ufffd", "")
    llm.close()
