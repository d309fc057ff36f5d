"""Training the adapters of a composed model: loss, gradients, checkpointed activations."""

import copy
import re

import pytest
import torch
from peft import PeftModel
from transformers import GraniteForCausalLM

from granite_switch.core.layout import AdapterTensor, parse_key
from granite_switch.core.routing import substitute


@pytest.fixture
def model(reference):
    return copy.deepcopy(reference.model).train()


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss(model, reference):
    """The loss is that of the tokens that the decoder embeds, over the vocabulary without control tokens."""
    ids, mask = reference.batch()
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels)
    seen = torch.tensor([substitute(line, reference.spec.substitutes) for line in labels.tolist()])
    logits = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, seen[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    assert out.loss.isfinite()


def test_gradients_reach_their_adapter_only(model, reference, row):
    """Gradients reach A and B of the active adapter only."""
    for name in reference.spec.names:
        ids = reference.prompts[name]
        _, found = gradients(model, input_ids=ids, labels=ids)
        moved = {parse_key(key).adapter for key, g in found.items() if "_lora." in key and g.any()}
        own = moved & {name}
        assert own
        assert moved == own
    row("Training", "loss, and gradients in the adapter that is on")


@pytest.mark.parametrize("name", ["citations", "answerability", "hallucination_detection", "query_rewrite"])
def test_gradients_are_those_of_peft(model, reference, base, adapters, name):
    ids = reference.prompts[name]
    substituted = model.model.switch.control_to_substitute[ids]
    plain = GraniteForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, adapters / name, is_trainable=True)
    loss, found = gradients(model, input_ids=ids, labels=ids)
    expected_loss, expected = gradients(peft, input_ids=substituted, labels=substituted)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert expected
    for key, gradient in expected.items():
        linear, matrix = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\..*", key).groups()
        own = found[AdapterTensor(name, linear, matrix).key]
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=float(gradient.abs().max()) * 1e-4)


def test_frozen_base(model, reference, row):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "_lora." in name
    ids, mask = reference.batch()
    _, found = gradients(model, input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert found
    assert all("_lora." in name for name in found)
    row("Training", "frozen base: no gradient there")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, reference, row, reentrant):
    """In float64, because the reentrant variant's first pass runs without gradients and sums in another order."""
    model.double()
    ids, mask = reference.batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    loss, expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, found = gradients(model, **inputs)
    assert again == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    row("Training", f"gradient checkpointing, use_reentrant={reentrant}")


def test_learns(model, reference):
    """A few steps on one adapter lower its loss and do not change the base or other adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".citations-" in name
    ids = reference.prompts["citations"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.95
    model.eval()
    with torch.no_grad():
        for name in (None, "answerability", "query_rewrite"):
            assert torch.equal(model(reference.prompts[name]).logits, reference.logits[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, reference, dtype):
    """Adapters in another dtype than the base, as in training, and all in half precision."""
    ids = reference.prompts["answerability"]
    model.to(dtype)
    loss, found = gradients(model, input_ids=ids, labels=ids)
    for name, parameter in model.named_parameters():
        if "_lora." in name:
            parameter.data = parameter.data.float()
    wide, _ = gradients(model, input_ids=ids, labels=ids)
    assert all(g.isfinite().all() for g in found.values())
    assert wide == pytest.approx(loss, rel=0.1)
