"""The table's ways of loading and running for another base: Qwen3, which normalises queries and keys."""

import copy

import pytest
import torch
from artefacts import ASSISTANT, make_adapter
from families import FAMILIES, make_decoder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StaticCache
from ways import Conversation, Reference

from granite_switch import compose

SECTION = "Another family: Qwen3"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    base, targets = make_decoder(folder / "base", "qwen3", intermediate_size=128), FAMILIES["qwen3"].targets
    make_adapter(folder / "library" / "first", base, seed=1, rank=8, targets=targets, invocation=ASSISTANT)
    make_adapter(folder / "library" / "second", base, seed=2, rank=3, targets=targets)
    compose(base, [folder / "library"], folder / "model")
    return Reference(folder / "model", Conversation([{"role": "user", "content": "Where does Anna live?"}]))


@pytest.fixture
def seen(qwen, row):
    """A function that compares a model with the plain load, and adds a row to the table."""

    def judge(model, way, tolerance=1e-5):
        found = qwen.seen(model)
        assert found.difference <= tolerance
        row(SECTION, way, seen=found)

    return judge


def test_device_map(qwen, seen):
    seen(AutoModelForCausalLM.from_pretrained(qwen.folder, dtype=torch.float32, device_map="auto"), "device_map='auto'")


def test_disk(qwen, seen, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.switch": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        qwen.folder,
        dtype=torch.float32,
        device_map={**places, "lm_head": "cpu", "model.layers": "disk"},
        offload_folder=tmp_path,
    )
    seen(model, "layers on disk")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised(qwen, row, kind):
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        qwen.folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).eval()
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    found = qwen.seen(model)
    assert all(effect == pytest.approx(1, abs=0.2) for effect in found.effects.values())
    row(SECTION, f"bitsandbytes {kind}", seen=found)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}]
)
def test_generation(qwen, row, options):
    for ids in qwen.prompts.values():
        setup = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        setup |= {"attention_mask": torch.ones_like(ids), **({"num_beams": 3} if "num_beams" in options else {})}
        compiled = {"disable_compile": True} if "cache_implementation" in options else {}
        expected = qwen.model.generate(ids, use_cache=False, **setup)
        assert qwen.model.generate(ids, **{**setup, **options, **compiled}).tolist() == expected.tolist()
    row(SECTION, ", ".join(f"{key}={value!r}" for key, value in options.items()))


def test_compiled(qwen, row):
    torch.compiler.reset()
    model, cache = copy.deepcopy(qwen.model), StaticCache(config=qwen.model.config, max_cache_len=64)
    ids = qwen.prompts["first"]
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :4], past_key_values=cache)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        steps = [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 4:], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    row(SECTION, "`torch.compile`, static cache: one graph")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(qwen, row, reentrant):
    ids, gradients = qwen.prompts["second"], []
    for checkpointed in (False, True):
        model = copy.deepcopy(qwen.model).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "_lora" in name})
    assert any(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    row(SECTION, f"gradient checkpointing, use_reentrant={reentrant}")
