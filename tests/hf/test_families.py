"""Any decoder with adapters equals PEFT on the base's class in logits and text, and the base bit for bit.

A new family is a row in families.py.
"""

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ASSISTANT, make_adapter
from families import FAMILIES, load_decoder, make_decoder
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.core.routing import substitute

SEEDS = range(int(os.environ.get("FAMILY_SEEDS", "1")))
TOLERANCE = 1e-5
NEW = 8


@dataclass(frozen=True)
class Case:
    """A base, adapters drawn for it, and the model composed of them."""

    family: str
    base: Any
    model: Any
    adapters: dict[str, Path]

    @property
    def spec(self) -> Any:
        return self.model.config.switch_spec

    def peft(self, name: str) -> Any:
        return PeftModel.from_pretrained(load_decoder(self.base, self.family), self.adapters[name]).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(family: str, seed: int) -> Case:
        folder = tmp_path_factory.mktemp(f"{family}-{seed}")
        base = make_decoder(folder / "base", family, seed=seed, pad_vocab=seed * 5)
        adapters = {f"a{i}": draw(folder / f"a{i}", base, family, 10 * seed + i) for i in range(3)}
        compose(base, list(adapters.values()), folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return Case(family, base, model, adapters)

    return make


def draw(folder: Path, base: Path, family: str, seed: int) -> Path:
    """A random adapter: rank, patterns, scaling, targets, LoRA or aLoRA."""
    rng = random.Random(seed)
    targets = FAMILIES[family].targets
    chosen = targets if rng.random() < 0.4 else rng.sample(targets, rng.randint(1, len(targets)))
    ends = [name.rpartition(".")[2] for name in chosen]
    return make_adapter(
        folder,
        base,
        seed=seed,
        rank=rng.choice([1, 3, 8]),
        alpha=rng.choice([4, 7, 16]),
        targets=chosen,
        invocation=rng.choice([None, ASSISTANT, "<rewrite>"]),
        strength=0.1,
        use_rslora=rng.random() < 0.3,
        rank_pattern={ends[0]: 5} if rng.random() < 0.5 else {},
        alpha_pattern={ends[-1]: 3} if rng.random() < 0.5 else {},
    )


def prompts(case: Case, name: str, seed: int, count: int = 2, length: int = 21) -> torch.Tensor:
    """Random text with the adapter's control token at the position from which it acts."""
    adapter = case.spec.adapter(name)
    ids = torch.randint(10, 300, (count, length), generator=torch.Generator().manual_seed(seed))
    if adapter.technology == "lora":
        ids[:, 0] = adapter.token_id
    else:
        at, rest = length // 2, list(adapter.invocation_tokens[1:])
        ids[:, at] = adapter.token_id
        ids[:, at + 1 : at + 1 + len(rest)] = torch.tensor(rest, dtype=ids.dtype)
    return ids


def substituted(case: Case, ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([substitute(row, case.spec.substitutes) for row in ids.tolist()])


def text(model: Any, ids: torch.Tensor) -> list[list[int]]:
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=1
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_the_base_bit_for_bit(self, made, family, seed):
        case = made(family, seed)
        base, ids = load_decoder(case.base, family), torch.randint(10, 300, (2, 19))
        with torch.no_grad():
            expected, got = base(ids, output_hidden_states=True), case.model(ids, output_hidden_states=True)
        assert len(expected.hidden_states) == len(got.hidden_states)
        for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(got.logits[..., : expected.logits.shape[-1]], expected.logits)
        assert text(case.model, ids) == text(base, ids)
        assert type(case.model).__name__ == type(base).__name__.replace("For", "SwitchFor")

    def test_adapters_equal_peft(self, made, family, seed):
        case = made(family, seed)
        for name in case.spec.names:
            peft, ids = case.peft(name), prompts(case, name, seed)
            plain = substituted(case, ids)
            with torch.no_grad():
                expected, without = peft(input_ids=plain).logits, case.model(plain).logits
                got = case.model(ids).logits[..., : expected.shape[-1]]
            assert (without[..., : expected.shape[-1]] - expected).abs().max() > 1e-2, "the adapter does nothing"
            assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)
            assert text(case.model, ids) == text(peft, plain)

    def test_mixed_batches(self, made, family, seed):
        """In one batch, every adapter and the base give what each gives alone."""
        case = made(family, seed)
        rows = [prompts(case, name, seed, count=1) for name in case.spec.names] + [torch.randint(10, 300, (1, 21))]
        together = text(case.model, torch.cat(rows))
        assert together == [line for row in rows for line in text(case.model, row)]

    def test_packed_sequences(self, made, family, seed):
        """Sequences packed by `position_ids` give what each gives alone."""
        case = made(family, seed)
        if "hybrid" in family:
            pytest.skip("the base itself does not separate packed sequences by their positions")
        rows = [prompts(case, name, seed, count=1) for name in case.spec.names] + [torch.randint(10, 300, (1, 9))]
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        with torch.no_grad():
            packed = case.model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
            alone = torch.cat([case.model(row).logits for row in rows], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)

    def test_saved_and_loaded(self, made, family, seed, tmp_path):
        case = made(family, seed)
        case.model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(again) is type(case.model)
        assert again.state_dict().keys() == case.model.state_dict().keys()
        for name, tensor in case.model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        decoder, ids = AutoModel.from_pretrained(tmp_path, dtype=torch.float32), prompts(case, "a0", seed)
        with torch.no_grad():
            expected = case.model.base_model(ids).last_hidden_state
            assert torch.equal(decoder(ids).last_hidden_state, expected)
