"""Every family of decoders, with adapters on every linear that PEFT targets in it: greedy text equal to PEFT's."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ASSISTANT, make_adapter
from conftest import running, transformers_model
from families import FAMILIES, load_decoder, make_decoder
from peft import PeftModel
from vllm import SamplingParams

import granite_switch

MESSAGES = [{"role": "user", "content": "Where does Anna live? Anna lives in Oslo, near the old harbour. " * 6}]
NEW = 10


@dataclass(frozen=True)
class Made:
    family: str
    base: Path
    adapters: Path
    composed: Path


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A base, a LoRA on all of its linears and an aLoRA on some, and the three composed."""
    folder, targets = tmp_path_factory.mktemp(request.param), FAMILIES[request.param].targets
    base = make_decoder(folder / "base", request.param)
    make_adapter(folder / "adapters" / "whole", base, rank=8, targets=targets, strength=0.2)
    make_adapter(
        folder / "adapters" / "part", base, seed=2, rank=3, targets=targets[::2], invocation=ASSISTANT, strength=0.4
    )
    granite_switch.compose(base, [folder / "adapters"], folder / "composed")
    yield Made(request.param, base, folder / "adapters", folder / "composed")
    gc.collect()


@torch.no_grad()
def greedy(model: Any, tokens: list[int], count: int = NEW) -> list[int]:
    """Without a cache: the definition of greedy text."""
    tokens = list(tokens)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits[: model.config.vocab_size].argmax()))
    return tokens[-count:]


def test_greedy_text_is_pefts_in_chunks_in_a_mixed_batch_and_from_the_cache(made: Made) -> None:
    tokens, expected = {}, {}
    with running(made.composed, max_num_batched_tokens=64, max_model_len=2048) as llm:
        spec = llm.llm_engine.model_config.hf_config.switch_spec
        for name in (None, "whole", "part"):
            text = llm.get_tokenizer().apply_chat_template(
                MESSAGES, tokenize=False, add_generation_prompt=True, **({"adapter_name": name} if name else {})
            )
            tokens[name] = llm.get_tokenizer().encode(text, add_special_tokens=False)
        controls = [spec.base_token_id, *(adapter.token_id for adapter in spec.adapters)]
        tokens["switches"] = [t for i in range(600) for t in (controls[i * i % len(controls)], 20 + i % 300)][:1300]
        rounds = []
        for _ in range(2):
            sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
            outputs = llm.generate([{"prompt_token_ids": t} for t in tokens.values()], sampling, use_tqdm=False)
            rounds.append([list(output.outputs[0].token_ids) for output in outputs])
        cached = [output.num_cached_tokens for output in outputs]
    exchanged = {name: [spec.substitutes.get(t, t) for t in prompt] for name, prompt in tokens.items()}
    base = load_decoder(made.base, made.family)
    expected[None] = greedy(base, exchanged[None])
    for name in ("whole", "part"):
        peft = PeftModel.from_pretrained(load_decoder(made.base, made.family), made.adapters / name).eval()
        expected[name] = greedy(peft, exchanged[name])
    expected["switches"] = greedy(transformers_model(made.composed), tokens["switches"])
    assert len({tuple(text) for text in expected.values()}) == 4
    assert all(cached)
    assert dict(zip(tokens, rounds[0], strict=True)) == expected
    assert rounds[1] == rounds[0]
