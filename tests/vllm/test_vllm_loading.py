"""Checkpoints that load, and those that are refused at startup."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import edit_json, make_adapter
from conftest import ALL, ASSISTANT, runner_of, running, start, transformers_model
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.model_executor.models.granite import GraniteForCausalLM

import granite_switch
from granite_switch.core.layout import AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import ServingError

FUSED = {  # legacy module -> the linears that it fuses
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    "shared_mlp.output_linear": ("mlp.down_proj",),
}


def greedy(llm: Any, prompts: list[list[int]], count: int = 10, **sampling: Any) -> list[Any]:
    settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **sampling)
    return [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)]


def prompts_for(folder: Path) -> list[list[int]]:
    """Prompts for the base and each adapter, for any names of control tokens."""
    spec = SwitchSpec.from_dict(json.loads((folder / "config.json").read_text())["switch"])
    text = [7, 60, 61, 90, 12, 33]
    return [text, *([*text, adapter.token_id, 41, 42] for adapter in spec.adapters)]


def write_older(model: Path, folder: Path, version: int) -> Path:
    """Rewrite a format 1 model in legacy format 2 or 3."""
    config = json.loads((model / "config.json").read_text())
    spec = SwitchSpec.from_dict(config.pop("switch"))
    tensors: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    rank = 8
    old = {name: t for name, t in tensors.items() if name.endswith("norm.weight") or name.startswith("model.embed")}
    for layer in range(config["num_hidden_layers"]):
        for fused, parts in FUSED.items():
            module, linears = f"model.layers.{layer}.{fused}", [f"model.layers.{layer}.{part}" for part in parts]
            weights = [tensors[f"{linear}.weight"] for linear in linears]
            old[f"{module}.base_layer.weight"] = torch.cat(weights)
            for part, (linear, weight) in enumerate(zip(linears, weights, strict=True)):
                suffix = f"_slices.{part}" if len(linears) > 1 else ""
                a = old[f"{module}.lora_A{suffix}"] = torch.zeros(len(spec.adapters), 1, rank, weight.shape[1])
                b = old[f"{module}.lora_B{suffix}"] = torch.zeros(len(spec.adapters), 1, weight.shape[0], rank)
                for index, adapter in enumerate(spec.adapters):
                    if r := adapter.ranks.get(linear):
                        keys = [AdapterTensor(adapter.name, linear, matrix).key for matrix in "AB"]
                        a[index, 0, :r] = tensors[keys[0]]
                        b[index, 0, :, :r] = tensors[keys[1]] * adapter.scale_of(linear)
    old["model.switch.control_to_substitute_lut"] = torch.arange(config["vocab_size"])
    reset = version == 3
    config |= {
        "num_hidden_layers": config["num_hidden_layers"] + version - 1,
        "num_adapters": len(spec.adapters),
        "adapter_names": [a.name for a in spec.adapters],
        "adapter_ranks": [rank] * len(spec.adapters),
        "adapter_token_ids": [spec.base_token_id] * reset + [a.token_id for a in spec.adapters],
        "adapter_substitute_token_ids": [spec.base_substitute_token_id] * reset
        + [a.substitute_token_id for a in spec.adapters],
        "lora_target_modules": ["qkv_proj", "o_proj", "shared_input_linear", "shared_output_linear"],
        "max_lora_rank": rank,
        "shared_intermediate_size": config["intermediate_size"],
        **({"ms_code_m": 6, "switch_type": "multi"} if reset else {}),
    }
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    save_file({name: tensor.contiguous() for name, tensor in old.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_legacy_formats_load_as_they_are(
    composed: Path, tmp_path: Path, version: int, reference: Callable[[list[int], int], list[int]]
) -> None:
    old = write_older(composed, tmp_path / "old", version)
    prompts = prompts_for(composed)
    with running(old) as llm:
        assert [list(o.token_ids) for o in greedy(llm, prompts)] == [reference(p, 10) for p in prompts]


def test_legacy_format_1_is_refused_with_the_command(composed: Path, tmp_path: Path) -> None:
    old = write_older(composed, tmp_path / "old", 2)
    edit_json(old / "config.json", adapter_substitute_token_ids=None, hiding_groups={"controls": ["answerability"]})
    with pytest.raises(Exception, match="granite-switch upgrade OLD NEW"):
        start(old)


def test_missing_and_unknown_adapter_tensors_are_all_named(composed: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(composed, broken)
    file = broken / "adapter-citations.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    tensors[names[0].replace("layers.0", "layers.1").replace("down", "gate")] = tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][:1].contiguous()
    save_file(tensors, file)
    with pytest.raises(Exception, match=rf"(?s){names[0]}: missing.*{names[1]}: shape \[1, "):
        start(broken)


@pytest.mark.parametrize(("linear", "axis"), [("self_attn.k_proj", 0), ("mlp.down_proj", 1)])
def test_a_weight_that_vllm_reorders_is_refused_by_name(
    composed: Path, monkeypatch: pytest.MonkeyPatch, linear: str, axis: int
) -> None:
    """As vLLM reorders the queries and keys of Llama 4, for which adapters in the files' order are wrong."""
    load = GraniteForCausalLM.load_weights

    def reordered(self: Any, weights: Any) -> Any:
        return load(self, ((name, t.roll(1, axis) if linear in name else t) for name, t in weights))

    monkeypatch.setattr(GraniteForCausalLM, "load_weights", reordered)
    with pytest.raises(ServingError, match="vLLM reorders") as caught:
        start(composed)
    assert set(caught.value.problems) == {f"model.layers.{layer}.{linear}" for layer in range(2)}


def test_a_load_without_weights_has_adapters_to_run(composed: Path) -> None:
    with running(composed, load_format="dummy") as llm:
        linear = runner_of(llm).model.model.layers[0].mlp.down_proj
        adapters = runner_of(llm).model.spec.adapters
        acting = {s for s, a in enumerate(adapters, 1) if "model.layers.0.mlp.down_proj" in a.ranks}
        assert set(linear.quant_method.pairs) == acting != set()
        assert len(greedy(llm, prompts_for(composed))[0].token_ids) == 10


@pytest.mark.slow
def test_a_quantised_base_stays_quantised_and_its_adapters_do_not(base: Path, tmp_path: Path) -> None:
    quantised = quantise(base, tmp_path / "base")
    make_adapter(tmp_path / "adapters" / "a", base, rank=8, targets=ALL, strength=0.2)
    make_adapter(tmp_path / "adapters" / "b", base, seed=2, rank=4, invocation=ASSISTANT, strength=0.5)
    granite_switch.compose(quantised, [tmp_path / "adapters"], tmp_path / "model")
    prompts = prompts_for(tmp_path / "model")
    with running(quantised, dtype="bfloat16") as llm:
        plain = greedy(llm, prompts[:1])[0].token_ids
    with running(tmp_path / "model", dtype="bfloat16") as llm:
        linear = runner_of(llm).model.model.layers[0].mlp.down_proj
        assert type(linear.scheme).__name__ == "CompressedTensorsW8A8Int8"
        weight = linear.weight
        assert weight is None or weight.dtype == torch.int8  # None: some processors' kernels repack it
        assert linear.quant_method.pairs[1].a.dtype == torch.bfloat16
        found = greedy(llm, prompts, logprobs=5)
    assert found[0].token_ids == plain

    granite_switch.compose(base, [tmp_path / "adapters"], tmp_path / "exact")
    exact = transformers_model(tmp_path / "exact")
    for prompt, output in zip(prompts, found, strict=True):
        substituted = [exact.config.switch_spec.substitutes.get(token, token) for token in prompt]
        with torch.no_grad():
            expected, unchanged = (
                exact(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in (prompt, substituted)
            )
        tokens = list(output.logprobs[0])
        found_there = torch.tensor([record.logprob for record in output.logprobs[0].values()])
        error = (found_there - expected[tokens]).abs().mean()
        effect = (expected - unchanged)[tokens].abs().mean()
        assert error < max(0.15, effect / 3)  # activations have 8 bits


def quantise(base: Path, folder: Path) -> Path:
    """Quantise the base to 8-bit integers for weights and activations, as compressed-tensors does."""
    shutil.copytree(base, folder)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_scale"], tensor = scale, (tensor / scale).round().to(torch.int8)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    weights, inputs = bits | {"strategy": "channel", "dynamic": False}, bits | {"strategy": "token", "dynamic": True}
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        },
    )
    return folder
