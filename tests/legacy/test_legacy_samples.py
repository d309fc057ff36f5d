"""Small checkpoints written by the old programs, with their outputs. Skipped if they are not available."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.composition.upgrade import upgrade
from granite_switch.core import legacy

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "legacy"
TOLERANCE = 1e-5
VOCABULARY = 1024  # of the base

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not at hand")


@pytest.fixture(params=["g1", "g2", "g3"])
def sample(request: pytest.FixtureRequest) -> Path:
    return SAMPLES / request.param


def _cases(sample: Path) -> list[dict[str, Any]]:
    return json.loads((sample / "expected.json").read_text())


@torch.no_grad()
def _check(model: torch.nn.Module, case: dict[str, Any], tokens: list[int]) -> None:
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, -1, :VOCABULARY]
    want = torch.tensor(case["last_logits"])[:VOCABULARY]
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0, msg=f"{case['adapter_name']}: {tokens[:3]}")
    options = {"max_new_tokens": len(case["greedy"]), "do_sample": False}
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert generated[0, len(tokens) :].tolist() == case["greedy"], case["adapter_name"]


@pytest.mark.parametrize("disk", [False, True], ids=["plain", "disk"])
def test_computes_what_the_old_program_did(sample: Path, disk: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path} if disk else {}
    model, info = AutoModelForCausalLM.from_pretrained(sample, output_loading_info=True, **options)
    assert not any(info.values()), info
    for case in _cases(sample)[: 6 if disk else None]:
        _check(model, case, case["input_ids"])


def test_adapters_act_in_four_bits(sample: Path) -> None:
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(sample, quantization_config=how)
    base, *adapted = _cases(sample)[:6]
    changes = []
    for case in adapted:
        with torch.no_grad():
            got, plain = (model(torch.tensor([c["input_ids"]])).logits[0, -1, :VOCABULARY] for c in (case, base))
        want = torch.tensor(case["last_logits"])[:VOCABULARY] - torch.tensor(base["last_logits"])[:VOCABULARY]
        changes.append(float(torch.nn.functional.cosine_similarity(got - plain, want, dim=0)))
    assert min(changes) > 0.6, changes


def test_upgraded_computes_the_same(sample: Path, tmp_path: Path) -> None:
    upgrade(sample, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    before, spec = legacy.read(sample).spec, model.config.switch_spec
    renumbered = {a.token_id: spec.adapter(a.name).token_id for a in before.adapters}
    same = 0
    for case in _cases(sample):
        tokens = [renumbered.get(token, token) for token in case["input_ids"]]
        name = case["adapter_name"]
        if before.hiding and name:
            at = next(i for i, token in enumerate(tokens) if token in spec.control_slots)
            if tokens[at + 1] != spec.adapter(name).substitute_token_id:
                continue  # nothing of the invocation sequence follows the control token here
            tokens.pop(at + 1)
        _check(model, case, tokens)
        options = {"documents": case["documents"], "add_generation_prompt": True, "return_tensors": "pt"}
        text = spec.adapter(name).invocation_text if name else ""
        if text in case["prompt"]:
            ids = tokenizer.apply_chat_template(case["messages"], adapter_name=name, **options)["input_ids"]
            assert ids[0].tolist() == tokens
            same += 1
    assert same >= 8


def test_describes_itself(sample: Path) -> None:
    lines = legacy.describe(sample)
    assert lines[0].startswith(f"legacy format {sample.name[1]} ")
    assert "granite-switch upgrade" in "\n".join(lines)
