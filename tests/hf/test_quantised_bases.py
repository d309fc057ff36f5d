"""Models composed from quantised bases equal the quantised base plus the definition of the adapters.

Here are the forms that transformers runs on CPU; the vLLM tests have those that vLLM runs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ALL, make_adapter
from families import make_decoder
from peft import PeftModel
from quantised import FORMATS, meant_by, quantise
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.core.layout import AdapterTensor, adapter_file
from granite_switch.hf.updates import Updates

pytest.importorskip("compressed_tensors")
RUN = [name for name in FORMATS if name.startswith(("compressed", "fp8"))]
EXACT = ("compressed-tensors W4A16", "compressed-tensors W8A16", "fp8 in blocks")  # activations stay in float32
IDS = torch.randint(10, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, and next to it a LoRA on every linear."""
    folder = tmp_path_factory.mktemp("plain")
    base = make_decoder(folder / "base", "granite", intermediate_size=256)
    make_adapter(folder / "whole", base, rank=8, targets=ALL, strength=0.2)
    return base


def load(folder: Path, name: str) -> Any:
    dtype = torch.bfloat16 if "NVFP4" in name else torch.float32  # compressed-tensors unpacks it as bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


def add_by_definition(model: Any, composed: Any, folder: Path) -> None:
    """Hooks that add s B A x to the linears of the plain quantised base."""
    (adapter,) = composed.config.switch_spec.adapters
    tensors = load_file(folder / adapter_file(adapter.name))
    for path in adapter.ranks:
        a, b = (tensors[AdapterTensor(adapter.name, path, matrix).key].to(model.dtype) for matrix in "AB")

        def add(_: Any, inputs: Any, y: Any, a: Any = a, b: Any = b, scale: float = adapter.scale_of(path)) -> Any:
            return y + inputs[0] @ a.T @ b.T * scale

        model.get_submodule(path).register_forward_hook(add)


def check(plain: Path, base: Path, name: str) -> Any:
    """Check that slot 0 is the base, bit for bit, and slot 1 the base plus the adapter by definition."""
    folder = base.with_name("composed")
    compose(base, [plain.parent / "whole"], folder)
    try:
        quantised = load(base, name)
    except AttributeError as error:
        pytest.skip(f"this release cannot load the base itself: {error}")  # 5.16, fp8 without experts
    model = load(folder, name)
    rows = quantised.config.vocab_size
    without = logits(quantised, IDS)
    assert torch.equal(logits(model, IDS)[..., :rows], without)
    (adapter,) = model.config.switch_spec.adapters
    ids = IDS.clone()
    ids[:, 0] = adapter.token_id
    substituted = IDS.clone()
    substituted[:, 0] = adapter.substitute_token_id
    got = logits(model, ids)[..., :rows]
    add_by_definition(quantised, model, folder)
    expected = logits(quantised, substituted)
    assert (got - without).abs().max() > 0.5, "the adapter does nothing"
    tolerance = 2e-2 if model.dtype == torch.bfloat16 else 1e-4
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    if name in EXACT:
        peft = PeftModel.from_pretrained(load(meant_by(base), ""), plain.parent / "whole").eval()
        meant = logits(peft, substituted)
        assert (got - meant).abs().max() <= 1e-4 * meant.abs().max()
    return model


@pytest.mark.parametrize("name", RUN)
def test_is_the_quantised_base_with_the_adapter(plain, tmp_path, name):
    check(plain, quantise(plain, tmp_path / "base", name), name)


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*_proj"], ["re:model.layers.*"]])
@pytest.mark.parametrize("name", ["compressed-tensors W4A16", "compressed-tensors W8A8"])
def test_patterns_meet_the_bases_linears_only(plain, tmp_path, name, targets):
    """`targets` are regular expressions that match from the start, so `.*_proj` matches `q_proj_lora` too."""
    ignore = {"ignore": ["lm_head", "re:.*down_proj", "model.layers.0.self_attn.v_proj"]}
    kept = ("down_proj", "layers.0.self_attn.v_proj")
    base = quantise(plain, tmp_path / "base", name, keep=kept, targets=targets, **ignore)
    model = check(plain, base, name)
    seen = {path: hasattr(module, "quantization_scheme") for path, module in model.named_modules()}
    assert all(seen[path] != path.endswith(kept) for path in seen if path.endswith("_proj"))
    assert not [path for path, module in model.named_modules() if isinstance(module, Updates) and seen[path]]


@pytest.mark.parametrize("skip", ["down_proj", "model.layers.0", "q_proj"])
def test_modules_to_not_convert(plain, tmp_path, skip):
    """A prefix of paths, or their end."""
    base = quantise(plain, tmp_path / "base", "fp8 in blocks", keep=[skip], modules_to_not_convert=[skip, "lm_head"])
    check(plain, base, "fp8 in blocks")
