"""Composing quantised bases: known forms get the right shapes, all others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ALL, edit_json, make_adapter
from families import make_decoder
from quantised import FORMATS, quantise
from safetensors.torch import load_file, save_file

from granite_switch import compose
from granite_switch.composition.base import read_base
from granite_switch.errors import AdapterError, BaseModelError


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain base, and next to it a LoRA on every linear."""
    folder = tmp_path_factory.mktemp("plain")
    base = make_decoder(folder / "base", "granite", intermediate_size=192)
    make_adapter(folder / "whole", base, targets=ALL)
    return base


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", FORMATS)
class TestShapes:
    def test_are_the_plain_bases(self, plain, tmp_path, name):
        assert read_base(quantise(plain, tmp_path / "base", name)).linears == read_base(plain).linears
        assert read_base(quantise(plain, tmp_path / "some", name, keep=["down_proj", "layers.1.self_attn.q"])).linears

    @pytest.mark.parametrize("matrix", ["A", "B"])
    def test_an_adapter_of_another_width_is_refused(self, plain, tmp_path, name, matrix):
        base = quantise(plain, tmp_path / "base", name)
        adapter = make_adapter(tmp_path / "wrong", plain, targets=["gate_proj"])

        def halve(tensors: dict[str, torch.Tensor]) -> None:
            for key in [key for key in tensors if f"lora_{matrix}" in key]:
                tensors[key] = tensors[key][:, : tensors[key].shape[1] // 2] if matrix == "A" else tensors[key][:96]

        rewrite(adapter / "adapter_model.safetensors", halve)
        with pytest.raises(AdapterError, match="gate_proj"):
            compose(base, [adapter], tmp_path / "composed")
        assert not (tmp_path / "composed").exists()

    def test_tensors_that_do_not_agree_are_refused(self, plain, tmp_path, name):
        """Each tensor of one linear, cut in half or missing."""
        path = "model.layers.1.mlp.up_proj."
        base = quantise(plain, tmp_path / "base", name)
        whole = load_file(base / "model.safetensors")
        for key in [key for key in whole if key.startswith(path) and "global" not in key]:
            for cut in (lambda t: t[: len(t) // 2], lambda t: t[..., : t.shape[-1] // 2], None):
                changed = {k: v for k, v in whole.items() if k != key or cut}
                if cut:
                    changed[key] = cut(whole[key]).contiguous()
                    if changed[key].shape == whole[key].shape or not changed[key].numel():
                        continue
                    if key.endswith(".weight") and len(changed[key]) == len(whole[key]) and "compressed" in name:
                        continue  # per-tensor and per-row values do not determine the width; the weight tensor does
                save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
                if cut is None and key.endswith(("qweight", "weight", "weight_packed")):
                    assert path[:-1] not in read_base(base).linears or "weight_scale" in name
                    continue
                if cut is None and key.endswith("g_idx"):
                    continue  # this one is optional
                with pytest.raises(BaseModelError, match=r"up_proj"):
                    read_base(base).linears  # noqa: B018
        save_file(whole, base / "model.safetensors", metadata={"format": "pt"})

    def test_without_its_quantization_config_is_refused(self, plain, tmp_path, name):
        base = quantise(plain, tmp_path / "base", name)
        edit_json(base / "config.json", quantization_config=None)
        with pytest.raises(BaseModelError):
            compose(base, [plain.parent / "whole"], tmp_path / "composed")


REFUSED = {
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "hqq": {"quant_method": "hqq"},
    "None": {"bits": 4},
    "weight_block_size None": {"quant_method": "fp8"},
    "bits 8": {"quant_method": "gptq", "bits": 8},
    "bits 3": {"quant_method": "gptq", "bits": 3},
    "checkpoint_format 'gptq_v2'": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    "dynamic": {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
    "is_marlin_format": {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
    "version 'gemv'": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "marlin-24": {"quant_method": "compressed-tensors", "format": "marlin-24"},
    "mxfp4-pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {"group_0": {"format": "mxfp4-pack-quantized"}},
    },
    "sparsity_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "sparsity_config": {"format": "sparse-24-bitmask"},
    },
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_was_not_tried_is_refused_by_name(plain, tmp_path, named):
    base = quantise(plain, tmp_path / "base", "awq")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": REFUSED[named]}))
    with pytest.raises(BaseModelError) as caught:
        compose(base, [plain.parent / "whole"], tmp_path / "composed")
    assert named in caught.value.message
    assert f"quant_method {REFUSED[named].get('quant_method')!r}" in caught.value.message
    assert "full precision" in caught.value.hint
    assert not (tmp_path / "composed").exists()
