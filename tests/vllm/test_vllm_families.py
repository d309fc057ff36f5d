"""Every family of decoders, with adapters on every linear that PEFT targets in it: greedy text equal to PEFT's."""

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ASSISTANT, make_adapter
from conftest import running
from families import FAMILIES, load_decoder, make_decoder
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm import SamplingParams

import granite_switch
from granite_switch.core import routing
from granite_switch.core.layout import AdapterTensor, adapter_file
from granite_switch.core.spec import SwitchSpec

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
def greedy(model: Any, tokens: list[int], exchange: Any = lambda tokens: tokens) -> list[int]:
    """Greedy decoding without a cache, by definition."""
    tokens = list(tokens)
    for _ in range(NEW):
        tokens.append(int(model(input_ids=torch.tensor([exchange(tokens)]), use_cache=False).logits[0, -1].argmax()))
    return tokens[-NEW:]


def by_definition(made: Made, tokens: list[int]) -> list[int]:
    """The definition for any number of switches: each token's adapter is added to the base's linears."""
    model, spec, slots = load_decoder(made.base, made.family), switch_spec(made.composed), []

    def exchange(tokens: list[int]) -> list[int]:
        slots[:] = routing.slots(tokens, spec.control_slots)
        return routing.substitute(tokens, spec.substitutes)

    for slot, adapter in enumerate(spec.adapters, 1):
        tensors = load_file(made.composed / adapter_file(adapter.name))
        for path in adapter.ranks:
            a, b = (tensors[AdapterTensor(adapter.name, path, matrix).key] for matrix in "AB")
            product = adapter.scale_of(path) * b @ a

            def add(_: Any, inputs: Any, y: Any, product: torch.Tensor = product, slot: int = slot) -> Any:
                mine = torch.tensor([s == slot for s in slots])
                return y + (inputs[0] @ product.T) * mine[:, None]

            model.get_submodule(path).register_forward_hook(add)
    return greedy(model, tokens, exchange)


def switch_spec(folder: Path) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads((folder / "config.json").read_text())["switch"])


def prompts(folder: Path) -> dict[str | None, list[int]]:
    """The same chat with the base and each adapter, and 600 switches."""
    tokenizer, spec = AutoTokenizer.from_pretrained(folder), switch_spec(folder)
    result: dict[str | None, list[int]] = {}
    for name in (None, "whole", "part"):
        choice = {"adapter_name": name} if name else {}
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **choice)
        result[name] = tokenizer.encode(text, add_special_tokens=False)
    controls = [spec.base_token_id, *(adapter.token_id for adapter in spec.adapters)]
    result["switches"] = [t for i in range(600) for t in (controls[i * i % 7 % 3], 20 + i % 300)]
    return result


def expected(made: Made, tokens: dict[str | None, list[int]]) -> dict[str | None, list[int]]:
    """PEFT's greedy text; by the definition for more than one switch, which PEFT does not support."""
    substitutes = switch_spec(made.composed).substitutes
    result = {}
    for name in (None, "whole", "part"):
        model = load_decoder(made.base, made.family)
        if name:
            model = PeftModel.from_pretrained(model, made.adapters / name).eval()
        result[name] = greedy(model, [substitutes.get(t, t) for t in tokens[name]])
    return result | {"switches": by_definition(made, tokens["switches"])}


def test_greedy_text_is_pefts_in_chunks_in_a_mixed_batch_and_from_the_cache(made: Made) -> None:
    tokens = prompts(made.composed)
    texts = expected(made, tokens)  # before vLLM's Transformers backend changes transformers' classes in this process
    assert len({tuple(text) for text in texts.values()}) == 4
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with running(made.composed, max_num_batched_tokens=64, max_model_len=2048) as llm:
        for cached in (False, True):
            outputs = llm.generate([{"prompt_token_ids": t} for t in tokens.values()], sampling, use_tqdm=False)
            found = [list(output.outputs[0].token_ids) for output in outputs]
            assert dict(zip(tokens, found, strict=True)) == texts
            assert cached == all(output.num_cached_tokens for output in outputs)
