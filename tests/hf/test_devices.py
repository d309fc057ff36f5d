"""Device maps, offloading, simulated GPUs, and buffers that no loader has to place."""

import copy
import logging
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import compute_module_sizes, get_balanced_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError
from granite_switch.hf import GraniteSwitchConfig, GraniteSwitchForCausalLM, GraniteSwitchModel
from granite_switch.hf.routing import Switch

SECTION = "Devices"
BUFFERS = ("switch.adapter_token_ids", "switch.control_to_slot", "switch.control_to_substitute")
MIXED = {
    "blocks": {"model.layers.0.self_attn": "cpu", "model.layers.0.mlp": "disk", "model.layers.1": "disk"},
    "adapters": {"model.layers.0.self_attn.q_proj_lora": "disk", "model.layers.1.mlp.down_proj_lora": "disk"},
    "layers": {"model.layers": "disk"},
}


def load(folder: Path, **options) -> GraniteSwitchForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("placement", ["auto", "balanced", "balanced_low_0", "sequential", "cpu", 0, {"": "cpu"}])
def test_device_map(composed, check, placement):
    if placement == 0 and not torch.cuda.is_available():
        pytest.skip("no GPU")
    check(
        load(composed, device_map=placement), SECTION, f"`device_map={placement!r}`", 1e-5 if placement != 0 else 1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(composed, reference, row, dtype):
    """In half precision with a device map, adapters keep their full effect."""
    model = AutoModelForCausalLM.from_pretrained(composed, dtype=dtype, device_map="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    seen = reference.seen(model)
    assert all(effect == pytest.approx(1, abs=0.1) for effect in seen.effects.values())
    row(SECTION, f"`dtype={dtype}`, `device_map='auto'`", seen=seen)


@pytest.mark.parametrize("split", MIXED)
def test_explicit_map(composed, check, tmp_path, split):
    placement = _whole(composed, MIXED[split])
    model = load(composed, device_map=placement, offload_folder=tmp_path)
    _on_disk(model)
    check(model, SECTION, f"explicit map, {split} on disk")


@pytest.mark.parametrize("placement", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_spill(composed, reference, check, tmp_path, placement, share):
    size = compute_module_sizes(reference.model)[""]
    memory = {"cpu": int(size * share)} | ({0: int(size * 0.4)} if torch.cuda.is_available() else {})
    model = load(composed, device_map=placement, max_memory=memory, offload_folder=tmp_path)
    _on_disk(model)
    where = "GPU, cpu and disk" if 0 in memory else "cpu and disk"
    check(model, SECTION, f"`device_map={placement!r}`, memory for {share:.0%}: {where}", 1e-3 if 0 in memory else 1e-5)


def test_offloaded_generates(composed, reference, tmp_path):
    model = load(composed, device_map=_whole(composed, MIXED["layers"]), offload_folder=tmp_path)
    for ids in reference.prompts.values():
        got = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert got.tolist() == reference.model.generate(ids, max_new_tokens=6, do_sample=False).tolist()


def _whole(folder: Path, part: dict[str, str]) -> dict[str, str]:
    """A map of every module, with some elsewhere than on the CPU."""
    with init_empty_weights():
        model = GraniteSwitchForCausalLM(GraniteSwitchConfig.from_pretrained(folder))
    names = [name for name, module in model.named_modules() if not any(module.children())]
    rest = [name for name in names if not any(name == key or name.startswith(f"{key}.") for key in part)]
    return part | dict.fromkeys(rest, "cpu")


def _on_disk(model: torch.nn.Module) -> None:
    assert "disk" in model.hf_device_map.values()
    assert any(p.device.type == "meta" for name, p in model.named_parameters() if "_lora" in name)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_made_up_gpus(composed, gpus):
    """accelerate's plan for several GPUs places everything, and each layer together with its adapters."""
    config = GraniteSwitchConfig.from_pretrained(composed)
    config.num_hidden_layers = 32
    for record in config.switch["adapters"]:
        record.pop("rank_pattern", None)
        record.pop("alpha_pattern", None)
        record["targets"] = [path.replace("[0-1]", "[0-31]") for path in record["targets"]]
    with init_empty_weights(include_buffers=True):
        model = GraniteSwitchForCausalLM(config)
    model.tie_weights()
    sizes = compute_module_sizes(model)
    assert set(sizes) >= {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    generous = dict.fromkeys(range(gpus), sizes[""])
    memory = get_balanced_memory(model, generous, no_split_module_classes=model._no_split_modules)
    placement = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
    assert set(range(gpus - 1)) <= set(placement.values()) <= set(range(gpus))

    tensors = [*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())]
    device = {}
    for tensor in tensors:
        owners = [key for key in placement if key == "" or tensor == key or tensor.startswith(f"{key}.")]
        assert len(owners) == 1, f"{tensor} is placed by {owners}"
        device[tensor] = placement[owners[0]]
    assert all("_lora" in "".join(names) for names in _by_layer(device).values())
    split = [layer for layer, names in _by_layer(device).items() if len({device[name] for name in names}) > 1]
    assert not split


def _by_layer(tensors) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in tensors:
        if ".layers." in name:
            layers.setdefault(name.split(".")[2], []).append(name)
    return layers


class TestBuffers:
    """Token tables follow from the config, so they are never saved and never missing."""

    @pytest.fixture
    def saved(self, reference, tmp_path):
        reference.model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_after_loading(self, composed):
        for folder_model in (load(composed), load(composed, device_map="auto")):
            _filled(folder_model)
        assert load(composed).model.switch.adapter_token_ids.dtype == torch.int64

    def test_after_making(self, composed):
        _filled(AutoModelForCausalLM.from_config(GraniteSwitchConfig.from_pretrained(composed)))
        _filled(GraniteSwitchForCausalLM(GraniteSwitchConfig.from_pretrained(composed)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_after_to(self, composed, dtype):
        model = load(composed).to(dtype).to("cpu")
        assert next(model.parameters()).dtype == dtype
        _filled(model)

    def test_after_copying(self, reference):
        _filled(copy.deepcopy(reference.model))
        _filled(pickle.loads(pickle.dumps(reference.model)))

    def test_after_saving(self, saved):
        _filled(load(saved))

    def test_bare_model(self, composed):
        model = GraniteSwitchModel.from_pretrained(composed)
        _filled_model(model, model.config.switch_spec)

    def test_not_saved(self, reference, saved):
        assert not [key for key in reference.model.state_dict() if key.endswith(BUFFERS)]
        for file in saved.glob("*.safetensors"):
            assert not [key for key in load_file(file) if key.endswith(BUFFERS)]

    def test_all_are_known(self, reference):
        """This list contains all buffers of this package."""
        ours = {name.removeprefix("model.") for name, _ in reference.model.named_buffers()}
        assert ours == {*BUFFERS, "rotary_emb.inv_freq", "rotary_emb.original_inv_freq"}

    def test_older_checkpoint(self, composed, tmp_path, caplog, check):
        """Tensors of these names in a checkpoint are ignored without a warning."""
        folder = _with_tensors(
            composed,
            tmp_path / "older",
            {
                "model.adapter_token_ids": torch.tensor([7, 7, 7]),
                "model.token_to_group_mask": torch.ones(4, 2, dtype=torch.bool),
                "model.adapter_hiding_matrix": torch.ones(4, 2, dtype=torch.bool),
            },
        )
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            model, info = GraniteSwitchForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map="auto", output_loading_info=True
            )
        finally:
            logger.removeHandler(caplog.handler)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        _filled(model)
        check(model, SECTION, "checkpoint that holds the buffers of a legacy format")


def _filled(model: GraniteSwitchForCausalLM) -> None:
    _filled_model(model.model, model.config.switch_spec)


def _filled_model(model: GraniteSwitchModel, spec: SwitchSpec) -> None:
    assert model.switch.adapter_token_ids.tolist() == [adapter.token_id for adapter in spec.adapters]
    slots = model.switch.control_to_slot.tolist()
    assert {token: slot for token, slot in enumerate(slots) if slot >= 0} == spec.control_slots
    assert Counter(slots)[-1] == len(slots) - len(spec.control_slots)
    for token, substitute in enumerate(model.switch.control_to_substitute.tolist()):
        assert substitute == spec.substitutes.get(token, token)


def _with_tensors(source: Path, target: Path, extra: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint in one file, with additional tensors."""
    target.mkdir()
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.is_file() and "index" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors | extra, target / "model.safetensors", {"format": "pt"})
    return target


def _places_all(folder: Path, offload: Path) -> None:
    """Load with a device map that splits the model, and check the contents of every table."""
    memory = {"cpu": 400_000}
    model, info = GraniteSwitchForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=offload, output_loading_info=True
    )
    _on_disk(model)
    assert not info["missing_keys"]
    assert not [key for key in model.state_dict() if key.endswith(BUFFERS)]
    _filled(model)


def test_every_table_is_placed(composed, tmp_path):
    _places_all(composed, tmp_path)


@pytest.mark.parametrize("name", BUFFERS)
def test_persistent_table_is_noticed(composed, tmp_path, monkeypatch, name):
    """The test above fails if a table is part of the checkpoint."""
    made = Switch.register_buffer

    def persistent(self, buffer, tensor, persistent=True):
        made(self, buffer, tensor, persistent=persistent or name.endswith(buffer))

    monkeypatch.setattr(Switch, "register_buffer", persistent)
    with pytest.raises((AssertionError, CheckpointError)):
        _places_all(composed, tmp_path)


def test_original_error(composed, tmp_path, monkeypatch):
    """A persistent table directly in the model, which accelerate splits, cannot be placed at all."""
    made = GraniteSwitchModel._install

    def with_table(self, prefix):
        made(self, prefix)
        self.register_buffer("adapter_token_ids", torch.zeros(5, dtype=torch.int64), persistent=True)

    monkeypatch.setattr(GraniteSwitchModel, "_install", with_table)
    with pytest.raises((ValueError, CheckpointError), match="adapter_token_ids"):
        _places_all(composed, tmp_path)
