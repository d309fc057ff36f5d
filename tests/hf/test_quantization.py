"""Quantised loading: the base's projections are quantised, the adapters are not, and they act as in full precision.

Uses the trained sample if present, else a small random model.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ALL, ASSISTANT, ROOT, make_adapter, make_base
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from ways import Conversation, Reference

from granite_switch import compose
from granite_switch.errors import BaseModelError

SAMPLE = ROOT / "sample"
TRAINED = len([*SAMPLE.glob("library/*/*/*/adapter_model.safetensors")]) == 4
ADAPTERS = ["answerability(alora)", "citations(lora)", "hallucination_detection(lora)", "query_rewrite(alora)"]


def bnb(kind: str, double: bool = False) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def ao(name: str, **options: Any) -> Callable[[], TorchAoConfig]:
    def make() -> TorchAoConfig:
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, name)(**options))

    return make


WAYS: dict[str, Callable[[], Any]] = {
    "bitsandbytes nf4": lambda: bnb("nf4"),
    "bitsandbytes nf4, double": lambda: bnb("nf4", double=True),
    "bitsandbytes fp4": lambda: bnb("fp4"),
    "bitsandbytes fp4, double": lambda: bnb("fp4", double=True),
    "bitsandbytes int8": lambda: bnb("int8"),
    "torchao int8 weights": ao("Int8WeightOnlyConfig"),
    "torchao int8 weights and activations": ao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weights": ao("Float8WeightOnlyConfig"),
    "torchao float8 weights and activations": ao("Float8DynamicActivationFloat8WeightConfig"),
    "torchao int4 weights": ao("Int4WeightOnlyConfig", group_size=32),
    "torchao intx weights": ao("IntxWeightOnlyConfig"),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "quanto int4": lambda: QuantoConfig(weights="int4"),
    "quanto int2": lambda: QuantoConfig(weights="int2"),
    "quanto float8": lambda: QuantoConfig(weights="float8"),
}


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if TRAINED:
        return SAMPLE / "base"
    folder = tmp_path_factory.mktemp("wide") / "base"
    return make_base(folder, hidden=128, mlp=256, pad_vocab=3, initializer_range=0.08)


@pytest.fixture(scope="module")
def library(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if TRAINED:
        return SAMPLE / "library"
    folder = tmp_path_factory.mktemp("library")
    make_adapter(folder / "answerability", plain_base, seed=1, targets=ALL, invocation=ASSISTANT, strength=0.15)
    make_adapter(folder / "citations", plain_base, seed=2, targets=("o_proj", "down_proj"), strength=0.15)
    make_adapter(folder / "hallucination_detection", plain_base, seed=3, targets=ALL, strength=0.15)
    make_adapter(folder / "query_rewrite", plain_base, seed=4, invocation="<rewrite>", strength=0.25)
    return folder


@pytest.fixture(scope="module")
def full(plain_base: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The composed model in full precision."""
    folder = tmp_path_factory.mktemp("full") / "model"
    compose(plain_base, [library], folder, base_name="granite-switch-sample" if TRAINED else "")
    if not TRAINED:
        return Reference(folder, Conversation([{"role": "user", "content": "Where does Anna live? <rewrite>"}]))
    sys.path.insert(0, str(SAMPLE))
    import world

    names = [name.partition("(")[0] for name in ADAPTERS]
    examples = {name: world.examples(name, 12, seed=3) for name in names}
    return Reference(folder, {name: [Conversation(e.messages, e.documents) for e in examples[name]] for name in names})


@pytest.fixture(scope="module")
def load(plain_base: Path, full: Reference) -> Callable[..., torch.nn.Module]:
    """Load the composed model quantised; skips methods that cannot load plain Granite here."""
    loaded: dict[str, torch.nn.Module] = {}

    def quantised(way: str) -> torch.nn.Module:
        if way not in loaded:
            loaded.clear()
            try:
                model = _load(plain_base, WAYS[way]())
                with torch.no_grad():
                    model(torch.arange(10, 20)[None])
            except Exception as error:
                pytest.skip(f"plain Granite: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            loaded[way] = _load(full.folder, WAYS[way]())
        return loaded[way]

    return quantised


def _load(folder: Path, config: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).eval()


class TestBnBAdapterActivation:
    """In 4 bits, each adapter keeps its effect."""

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_adapter_activates(self, load, full, adapter):
        name, technology = adapter.rstrip(")").split("(")
        assert full.spec.adapter(name).technology == technology
        seen = full.seen(load("bitsandbytes nf4, double"))
        print(f"{adapter}: changes the logits by {seen.effects[name]:.1%} of what it does in full precision")
        assert seen.effects[name] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("way", WAYS)
class TestWays:
    def test_base_is_quantised(self, load, way):
        """Every projection of the base is quantised, and no tensor of an adapter."""
        model, quantised = load(way), 0
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ALL:
                weight = module.weight
                plain = type(module) is torch.nn.Linear and type(weight.data) in (torch.Tensor, torch.nn.Parameter)
                assert not plain, f"{name} is not quantised"
                quantised += 1
        assert quantised == model.config.num_hidden_layers * len(ALL)
        adapters = {name: parameter for name, parameter in model.named_parameters() if "_lora." in name}
        spec = model.config.switch_spec
        assert len(adapters) == sum(2 * len(adapter.targets) for adapter in spec.active)
        for name, parameter in adapters.items():
            assert type(parameter) is torch.nn.Parameter, name
            assert parameter.dtype == torch.bfloat16, name

    def test_adapters_act(self, load, full, row, way):
        try:
            seen = full.seen(load(way))
        except pytest.skip.Exception as skipped:
            row("Quantisation", way, f"not run: {skipped.msg}")
            raise
        row("Quantisation", way, seen=seen)
        # two bits ruin the base itself and distort the adapter's effect; equality with PEFT is tested below
        tolerance = 0.5 if way == "quanto int2" else 0.1
        for adapter, effect in seen.effects.items():
            assert effect == pytest.approx(1, abs=tolerance), adapter

    def test_equals_peft_on_the_base_quantised_alike(self, load, full, plain_base, library, row, way):
        """PEFT gives the same logits with the same adapter, prompt and quantised base."""
        model = load(way)
        differences = []
        for name in full.spec.names:
            (config,) = library.glob(f"{name}/**/adapter_config.json")
            prompt = full.prompts[full.asked[name][0][0]]
            try:
                peft = PeftModel.from_pretrained(
                    _load(plain_base, WAYS[way]()), config.parent, autocast_adapter_dtype=False
                ).eval()
            except Exception as error:
                pytest.skip(f"PEFT: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            substituted = torch.tensor([[full.spec.substitutes.get(i, i) for i in prompt[0].tolist()]])
            expected = Reference.of(peft, substituted)
            found = Reference.of(model, prompt)[..., : expected.shape[-1]]
            kept = found.isfinite()
            differences.append(float((found - expected)[kept].abs().max() / expected.abs().max()))
        row("Quantisation", f"{way}: beside PEFT", difference=max(differences))
        assert max(differences) < 0.03  # bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not TRAINED, reason="the sample is not trained yet")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("way", ["bitsandbytes nf4, double", "bitsandbytes int8", "quanto int8"])
def test_accuracy(load, full, way, adapter):
    """The adapters' accuracy is that in full precision."""
    import world
    from evaluate import accuracy

    name = adapter.partition("(")[0]
    examples = world.examples(name, 20, seed=11)
    right = [accuracy(model, full.tokenizer, examples, adapter_name=name) for model in (full.model, load(way))]
    assert right[1] >= right[0] - 0.1


@pytest.mark.parametrize("way", ["bitsandbytes nf4, double", "bitsandbytes int8", "torchao int8 weights"])
def test_saved_quantised(load, full, tmp_path, row, way):
    """`save_pretrained` of a quantised model gives a checkpoint that loads with the same outputs."""
    model = load(way)
    model.save_pretrained(tmp_path)
    assert len([*tmp_path.glob("adapter-*.safetensors")]) == len(full.spec.names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for ids in full.prompts.values():
        assert torch.equal(Reference.of(again, ids), Reference.of(model, ids))
    row("Quantisation", f"{way}: saved and loaded", seen=full.seen(again))


@pytest.fixture(scope="module", params=["bitsandbytes nf4", "bitsandbytes int8"])
def serialised(plain_base, library, request, tmp_path_factory):
    """A base that was quantised and saved, and the model composed from it."""
    folder = tmp_path_factory.mktemp(request.param)
    _load(plain_base, WAYS[request.param]()).save_pretrained(folder / "base")
    for file in plain_base.iterdir():
        if "token" in file.name or "template" in file.name:
            (folder / "base" / file.name).write_bytes(file.read_bytes())
    compose(folder / "base", [library], folder / "model", base_name="granite-switch-sample" if TRAINED else "")
    return folder


class TestQuantisedOnDisk:
    """A base that was saved quantised composes, keeps its bytes and runs."""

    def test_keeps_its_bytes(self, serialised):
        before, after = _tensors(serialised / "base"), _tensors(serialised / "model")
        for name, tensor in before.items():
            if "embed_tokens" not in name and "lm_head" not in name:
                assert torch.equal(after[name], tensor), name

    def test_runs(self, serialised, full, row):
        model = AutoModelForCausalLM.from_pretrained(serialised / "model", dtype=torch.bfloat16).eval()
        assert model.config.quantization_config is not None
        seen = full.seen(model)
        row("Quantisation", f"base quantised on disk: {serialised.name[:-1]}", seen=seen)
        assert all(effect == pytest.approx(1, abs=0.1) for effect in seen.effects.values())


def test_torchao_on_disk(plain_base, library, row, tmp_path):
    """torchao writes each weight as several tensors under other names, which composing refuses by name."""
    _load(plain_base, WAYS["torchao int8 weights"]()).save_pretrained(tmp_path / "base")
    for file in plain_base.iterdir():
        if "token" in file.name or "template" in file.name:
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BaseModelError, match="quant_method 'torchao'"):
        compose(tmp_path / "base", [library], tmp_path / "model", base_name="granite-switch-sample" if TRAINED else "")
    refused = "composing refuses: quant_method 'torchao'"
    row("Quantisation", "base quantised on disk: torchao", refused)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
