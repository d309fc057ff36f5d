"""torch.compile: decoding with a static cache is one graph, compiled once, whichever adapters are used."""

import copy

import pytest
import torch
from transformers import CompileConfig, StaticCache

from granite_switch.core.routing import substitute


@pytest.fixture
def model(reference):
    torch.compiler.reset()
    yield copy.deepcopy(reference.model)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def tokens(reference):
    """Four sequences, each of which switches several times in the last eight steps."""
    controls = [*reference.spec.control_slots]
    torch.manual_seed(3)
    ids = torch.randint(10, 300, (4, 20))
    ids[0, 0], ids[1, 5] = controls[:2]
    for step in (13, 15, 16, 18):
        for row in range(4):
            ids[row, step] = controls[(row + step) % len(controls)]
    return ids


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decode(model, tokens, row, backend):
    with torch.no_grad():
        whole = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(tokens[:, :12], past_key_values=cache)
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        steps = [compiled(tokens[:, 12:13], past_key_values=cache).logits]
        with torch.compiler.set_stance("fail_on_recompile"):
            steps += [compiled(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(13, 20)]
    got, expected = torch.cat(steps, dim=1), whole[:, 12:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    finite = expected.isfinite()
    difference = (got - expected)[finite].abs().max() / expected[finite].abs().max()
    row("Running", f"`torch.compile`, static cache, backend {backend}: one graph", difference=float(difference))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_prefill(model, tokens, reference, backend):
    """Prefill of one shape without a cache; base tokens equal the base's."""
    substitutes = reference.spec.substitutes
    substituted = torch.tensor([substitute(line, substitutes) for line in tokens.tolist()])
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        for ids in (tokens, tokens.flip(0), substituted):
            got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
    if backend == "eager":
        assert torch.equal(got, model(substituted).logits)


@pytest.mark.parametrize("part", ["layers.1", "layers.1.mlp", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("how", ["in place", "wrapped"])
@torch.no_grad()
def test_parts(model, reference, part, how):
    """Also where a part is compiled alone, as by accelerate's `compile_regions`, it gets the tokens' slots."""
    if how == "in place":
        model.model.get_submodule(part).compile(backend="eager")
    else:
        model.model.set_submodule(part, torch.compile(model.model.get_submodule(part), backend="eager"))
    for name, ids in reference.prompts.items():
        torch.testing.assert_close(model(ids).logits, reference.logits[name])


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=1)
def test_more_shapes_than_graphs(model, reference):
    """Beyond torch's limit on recompiling, some parts run as graphs and others do not."""
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for length in range(8, 0, -1):
        ids = reference.prompts["answerability"][:, -length:]
        torch.testing.assert_close(compiled(ids).logits, reference.model(ids).logits)


def test_training_with_gradient_checkpointing(model, reference):
    """The graph breaks at each layer."""
    ids, expected = reference.prompts["citations"], copy.deepcopy(model)
    expected(ids, labels=ids).loss.backward()
    model.train().gradient_checkpointing_enable()
    torch.compile(model, backend="aot_eager")(ids, labels=ids).loss.backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@torch.no_grad()
def test_traced(model, tokens):
    """A trace does not keep the slots of its example."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    traced = torch.jit.trace(Logits(), tokens, check_trace=False)
    for ids in (tokens, tokens.flip(0)):
        torch.testing.assert_close(traced(ids), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_generate(model, reference, row):
    """`generate` itself compiles decoding with a static cache."""
    ids, mask = reference.batch()
    setup = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, "attention_mask": mask}
    how = CompileConfig(backend="eager", fullgraph=True)
    how._compile_all_devices = True
    compiled = model.generate(ids, cache_implementation="static", compile_config=how, **setup)
    assert compiled.tolist() == reference.model.generate(ids, **setup).tolist()
    row("Running", "`generate` that compiles (static cache)")
