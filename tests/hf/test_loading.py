"""Our loader of adapter files equals transformers', and leaves special cases to it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from granite_switch.errors import CheckpointError
from granite_switch.hf import loading, models


def _load(folder: Path, auto=AutoModelForCausalLM, **options) -> tuple[torch.nn.Module, dict]:
    return auto.from_pretrained(folder, output_loading_info=True, **options)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each call of `load_adapters` loaded."""
    calls: list[set[str]] = []

    def watched(*args):
        left, loaded = loading.load_adapters(*args)
        calls.append(loaded)
        return left, loaded

    monkeypatch.setattr(models, "load_adapters", watched)
    return calls


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"device_map": "auto"}, {"device_map": {"": "meta"}}, {"low_cpu_mem_usage": True}],
    ids=str,
)
def test_as_transformers_loads_them(composed, read, monkeypatch, auto, options):
    model, info = _load(composed, auto, **options)
    own = {name for name, _ in model.named_parameters() if "_lora." in name}
    assert own
    assert read == [own]
    monkeypatch.setattr(models, "load_adapters", lambda model, files, config: (files, set()))
    expected, expected_info = _load(composed, auto, **options)
    assert info == expected_info
    expected_parameters = dict(expected.named_parameters())
    assert [*expected_parameters] == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        other = expected_parameters[name]
        assert (parameter.dtype, parameter.device, parameter.requires_grad) == (
            other.dtype,
            other.device,
            other.requires_grad,
        )
        assert parameter.is_meta or torch.equal(parameter, other)


@pytest.mark.parametrize("fault", ["shape", "missing", "unexpected"])
def test_what_is_amiss_is_left_to_transformers(composed, read, tmp_path, fault):
    folder = tmp_path / "model"
    shutil.copytree(composed, folder)
    path = min(folder.glob("adapter-*.safetensors"))
    tensors = load_file(path)
    names = [*tensors]
    changed = names[0]
    if fault == "shape":
        tensors[changed] = torch.zeros(3, 5)
    elif fault == "missing":
        del tensors[changed]
    else:
        changed = names[0].replace("layers.0", "layers.99")
        tensors[changed] = tensors[names[0]].clone()
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    if fault == "missing":
        with pytest.raises(CheckpointError, match=changed):
            _load(folder)
        return
    model, info = _load(folder, ignore_mismatched_sizes=True)
    assert not read[0] & {*names}, "the file with the fault"
    assert read[0], "the other adapters' files"
    assert changed in (
        info["unexpected_keys"] if fault == "unexpected" else {name for name, *_ in info["mismatched_keys"]}
    )
    whole = dict(model.named_parameters())
    assert torch.equal(whole[names[1]], tensors[names[1]])


def test_quantised_or_on_disk_is_left_to_transformers(composed, read, tmp_path):
    placement = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.switch": "cpu"}
    _load(composed, device_map={**placement, "lm_head": "cpu", "model.layers": "disk"}, offload_folder=tmp_path)
    assert read == [set()]
