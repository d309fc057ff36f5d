"""Quantised bases in vLLM on CPU: with an adapter they equal PEFT on the dequantised weights."""

from pathlib import Path

import pytest
import torch
from artefacts import ALL, make_adapter
from conftest import running
from families import load_decoder, make_decoder
from peft import PeftModel
from quantised import meant_by, quantise
from vllm import SamplingParams

import granite_switch
from granite_switch.core.border import read_json
from granite_switch.core.spec import SwitchSpec

# mean differences of log-probabilities, from rounding to bfloat16 and from quantised activations
FORMATS = {
    "compressed-tensors W4A16": 0.02,
    "compressed-tensors W8A8": 0.04,
    "compressed-tensors FP8": 0.08,
    "gptq": 0.02,
    "awq": 0.02,
}
IDS = torch.randint(10, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, and next to it a LoRA on every linear."""
    folder = tmp_path_factory.mktemp("plain")
    base = make_decoder(folder / "base", "granite", intermediate_size=256)
    make_adapter(folder / "whole", base, rank=8, targets=ALL, strength=0.2)
    return base


@torch.no_grad()
def expected(base: Path, adapter: Path | None) -> torch.Tensor:
    """Log-probabilities [T, V] with the base's dequantised weights, in float32."""
    model = load_decoder(meant_by(base), "granite")
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    return model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", [n if "W4A16" in n else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS])
def test_adapters_are_pefts(plain: Path, tmp_path: Path, name: str) -> None:
    base = quantise(plain, tmp_path / "base", name)
    granite_switch.compose(base, [plain.parent / "whole"], tmp_path / "composed")
    (adapter,) = SwitchSpec.from_dict(read_json(tmp_path / "composed" / "config.json")["switch"]).adapters
    IDS[0] = adapter.substitute_token_id
    wanted = [expected(base, None), expected(base, plain.parent / "whole")]
    assert (wanted[0] - wanted[1]).abs().mean() > 0.3, "the adapter does nothing"
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=5)
    prompts = [IDS, [adapter.token_id, *IDS[1:]]]
    with running(tmp_path / "composed", dtype="bfloat16", max_model_len=512) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    for output, values in zip(outputs, wanted, strict=True):
        seen = [
            abs(one.logprob - float(values[at, token]))
            for at, ones in enumerate(output.prompt_logprobs[1:])
            for token, one in ones.items()
        ]
        print(f"{name}: {max(seen):.3f}, mean {sum(seen) / len(seen):.4f}")
        assert sum(seen) / len(seen) < FORMATS[name]
