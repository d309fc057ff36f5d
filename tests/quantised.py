"""Quantised bases as quantisers write them, made by hand from a plain base, each with its dequantised weights.

A new format is one function. It takes a weight [out, in] and returns its tensors, by the last part of their names, and
the dequantised weight.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from artefacts import edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # order of the values in a word


@dataclass(frozen=True)
class Packed:
    """One quantised linear."""

    tensors: Mapping[str, Tensor]
    weight: Tensor  # [out, in], dequantised


@dataclass(frozen=True)
class Format:
    """A way to quantise."""

    config: Mapping[str, Any]
    pack: Callable[[Tensor], Packed]


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack [n, k] values of `bits` bits into [n, k * bits / 32] int32 words, the first value in the lowest bits."""
    count = 32 // bits
    shifts = torch.arange(count) * bits
    words = (values.long().reshape(len(values), -1, count) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def grouped(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers in groups along the input: [out, in] around zero, [out, in / GROUP] scales in bfloat16."""
    top = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / top).bfloat16()
    values = (groups / scales.float()[..., None]).round().clamp(-top - 1, top)
    return values.flatten(1), scales


def meant(values: Tensor, scales: Tensor) -> Tensor:
    return (values.unflatten(1, (scales.shape[1], -1)) * scales.float()[..., None]).flatten(1)


def ct_packed(bits: int) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        values, scales = grouped(weight, bits)
        words, shape = pack_words(values + 2 ** (bits - 1), bits), torch.tensor(weight.shape)
        return Packed({"weight_packed": words, "weight_scale": scales, "weight_shape": shape}, meant(values, scales))

    return pack


def ct_int8(weight: Tensor) -> Packed:
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight / scales.float()).round()
    return Packed({"weight": values.to(torch.int8), "weight_scale": scales}, values * scales.float())


def ct_float8(weight: Tensor) -> Packed:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scales.float()).to(torch.float8_e4m3fn)
    return Packed({"weight": values, "weight_scale": scales}, values.float() * scales.float())


def fp8_blocks(weight: Tensor) -> Packed:
    """Blocks of 32 x 32, as DeepSeek's of 128 x 128."""
    blocks = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))  # [o, 32, i, 32]
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    tensors = {"weight": values.flatten(2).flatten(0, 1), "weight_scale_inv": scales}
    return Packed(tensors, (values.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1))


def gptq(weight: Tensor) -> Packed:
    values, scales = grouped(weight, 4)
    zeros = torch.full((scales.shape[1], len(weight)), 7)  # stored minus one
    tensors = {
        "qweight": pack_words(values + 8, 4).T,
        "qzeros": pack_words(zeros, 4),
        "scales": scales.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return Packed(tensors, meant(values, scales.half()))


def awq(weight: Tensor) -> Packed:
    values, scales = grouped(weight, 4)
    zeros = torch.full((scales.shape[1], len(weight)), 8)

    def words(matrix: Tensor) -> Tensor:
        return pack_words(matrix.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)

    tensors = {"qweight": words((values + 8).T), "qzeros": words(zeros), "scales": scales.T.contiguous().half()}
    return Packed(tensors, meant(values, scales.half()))


def fp4(weight: Tensor) -> Packed:
    """NVFP4: two 4-bit values per byte, an 8-bit scale per 16 values, and one global scale."""
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    whole = 448 * 6 / weight.abs().amax()
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    scaled = groups / (scales.float() / whole)[..., None]
    codes = (scaled.abs()[..., None] - steps).abs().argmin(-1)
    values = (steps[codes] * scaled.sign() * (scales.float() / whole)[..., None]).flatten(1)
    codes = (codes + 8 * (scaled < 0)).flatten(1).to(torch.uint8)
    tensors = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales,
        "weight_global_scale": whole.reshape(1),
    }
    return Packed(tensors, values)


def ct(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


_GROUPS = {"strategy": "group", "group_size": GROUP}
_TOKENS = {"strategy": "token", "dynamic": True}
FORMATS: Mapping[str, Format] = {
    "compressed-tensors W8A8": Format(
        ct("int-quantized", _arguments(8, "int", "channel"), {**_arguments(8, "int", ""), **_TOKENS}), ct_int8
    ),
    "compressed-tensors FP8": Format(
        ct("float-quantized", _arguments(8, "float", "channel"), {**_arguments(8, "float", ""), **_TOKENS}), ct_float8
    ),
    "compressed-tensors W4A16": Format(ct("pack-quantized", {**_arguments(4, "int", ""), **_GROUPS}), ct_packed(4)),
    "compressed-tensors W8A16": Format(ct("pack-quantized", {**_arguments(8, "int", ""), **_GROUPS}), ct_packed(8)),
    "compressed-tensors NVFP4": Format(
        ct("nvfp4-pack-quantized", _arguments(4, "float", "tensor_group", group_size=16)), fp4
    ),
    "fp8 in blocks": Format(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]},
        fp8_blocks,
    ),
    "gptq": Format(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
        | {"checkpoint_format": "gptq", "lm_head": False},
        gptq,
    ),
    "awq": Format(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        awq,
    ),
}


def quantise(
    plain: Path, folder: Path, name: str, *, keep: Sequence[str] = (), targets: Any = None, **more: Any
) -> Path:
    """Write a quantised base, and next to it the plain base with the dequantised weights.

    Args:
        plain: a base in full precision, in one file.
        name: a key of `FORMATS`.
        keep: parts of the paths of linears that are not quantised.
        targets: of compressed-tensors' group, instead of "Linear".
        more: further keys of quantization_config.
    """
    stands = meant_by(folder)
    shutil.copytree(plain, folder)
    shutil.copytree(plain, stands)
    tensors, weights = load_file(plain / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        path = key.removesuffix(".weight")
        if any(part in path for part in keep):
            continue
        packed = FORMATS[name].pack(tensors.pop(key).float())
        tensors |= {f"{path}.{kind}": tensor.contiguous() for kind, tensor in packed.tensors.items()}
        weights[key] = packed.weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(load_file(plain / "model.safetensors") | weights, stands / "model.safetensors", metadata={"format": "pt"})
    quantisation = {**copy.deepcopy(dict(FORMATS[name].config)), **more}
    if targets:
        quantisation["config_groups"]["group_0"]["targets"] = targets
    edit_json(folder / "config.json", quantization_config=quantisation)
    return folder


def meant_by(folder: Path) -> Path:
    return folder.with_name(folder.name + "-meant")
