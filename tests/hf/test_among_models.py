"""What transformers, its users and its tools expect of any model, with active adapters."""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    GraniteForCausalLM,
    Trainer,
    TrainingArguments,
)

import granite_switch.hf as switch_hf
from granite_switch.core.layout import SUFFIX
from granite_switch.core.routing import substitute
from granite_switch.errors import CheckpointError, RoutingError
from granite_switch.hf import models

NEW = 6


@pytest.fixture(scope="module")
def model(reference):
    return reference.model


@pytest.fixture(scope="module")
def plain(base):
    return GraniteForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def own(reference):
    """A copy that a test may change."""
    return copy.deepcopy(reference.model)


def greedy(model, ids, **options):
    setup = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**setup, **options})


def substituted(reference, ids):
    return torch.tensor([substitute(row, reference.spec.substitutes) for row in ids.tolist()])


class TestArguments:
    def test_the_cache_under_both_names(self, model, reference):
        for ids in reference.prompts.values():
            whole = model(ids).logits
            for name in ("cache", "past_key_values"):
                cache = DynamicCache(config=model.config)
                with torch.no_grad():
                    parts = [model(part, **{name: cache}).logits for part in ids.split(5, dim=1)]
                torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-4)

    def test_outputs_have_the_names_of_the_release(self, model, plain, reference):
        ids = reference.prompts[None]
        assert model(ids).keys() == plain(ids).keys()
        assert model.model(ids).keys() == plain.model(ids).keys()
        assert len(model(ids, return_dict=False)) == len(plain(ids, return_dict=False))

    @pytest.mark.parametrize("part", ["model", "decoder"])
    def test_an_argument_that_nobody_takes(self, model, reference, part):
        target = model if part == "model" else model.model
        with pytest.raises(TypeError, match="'past_key_valuess'"):
            target(reference.prompts[None], past_key_valuess=DynamicCache())

    def test_two_names_for_one_cache(self, model, reference):
        with pytest.raises(TypeError, match="same argument"):
            model(reference.prompts[None], cache=DynamicCache(), past_key_values=DynamicCache())

    def test_positional_arguments(self, model, reference):
        ids, mask = reference.batch()
        with torch.no_grad():
            assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)
        with pytest.raises(TypeError, match="given twice"):
            model(ids, mask, attention_mask=mask)

    @pytest.mark.parametrize("kind", ["SwitchForCausalLM", "SwitchModel"])
    def test_signatures_are_the_bases(self, kind):
        ours = inspect.signature(getattr(switch_hf, f"Granite{kind}").forward)
        base = inspect.signature(getattr(transformers, f"Granite{kind.replace('Switch', '')}").forward)
        added = {name: p for name, p in ours.parameters.items() if name not in base.parameters}
        assert [*added] == ["base_only"]
        assert {name: p.annotation for name, p in ours.parameters.items() if name not in added} == {
            name: p.annotation for name, p in base.parameters.items()
        }

    def test_it_can_generate(self):
        assert GenerationMixin in switch_hf.GraniteSwitchForCausalLM.__bases__
        assert switch_hf.GraniteSwitchForCausalLM.can_generate()
        assert not switch_hf.GraniteSwitchModel.can_generate()


class TestClasses:
    @pytest.mark.parametrize(
        "base", ["GraniteForCausalLM", "Qwen3ForCausalLM", "LlamaModel", "GraniteMoePreTrainedModel"]
    )
    def test_found_by_name_and_pickled(self, base):
        cls = getattr(models, base.replace("For", "SwitchFor") if "For" in base else _switch(base))
        assert issubclass(cls, getattr(transformers, base))
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert cls.__module__ == models.__name__

    def test_public_names(self):
        for name in switch_hf.__all__:
            assert getattr(switch_hf, name).__name__ == name
        assert issubclass(switch_hf.GraniteSwitchForCausalLM, switch_hf.GraniteSwitchPreTrainedModel)
        with pytest.raises(AttributeError):
            switch_hf.NothingSwitchForCausalLM  # noqa: B018

    def test_auto_classes(self, composed):
        config = AutoConfig.from_pretrained(composed)
        assert type(config) is switch_hf.GraniteSwitchConfig
        assert (config.model_type, config.to_dict()["model_type"]) == ("granite", "granite_switch")
        assert type(AutoModel.from_config(config)) is switch_hf.GraniteSwitchModel
        assert type(AutoModelForCausalLM.from_config(config)) is switch_hf.GraniteSwitchForCausalLM

    def test_a_base_that_transformers_does_not_know(self, composed, tmp_path):
        config = AutoConfig.from_pretrained(composed).to_dict()
        config["switch"]["base_model_type"] = "made_up"
        with pytest.raises(CheckpointError, match="made_up"):
            AutoConfig.for_model("granite_switch").from_dict(config)


def _switch(name: str) -> str:
    for end in ("PreTrainedModel", "Model"):
        if name.endswith(end):
            return f"{name.removesuffix(end)}Switch{end}"
    return name


class TestCaches:
    def test_generate_leaves_no_cache_behind(self, model, reference):
        """Checked without the garbage collector: a reference cycle would keep every call's cache alive."""
        made = []
        original = DynamicCache.__init__

        def watched(self, *args, **kwargs):
            original(self, *args, **kwargs)
            made.append(weakref.ref(self))

        DynamicCache.__init__ = watched
        gc.disable()
        try:
            for ids in reference.prompts.values():
                greedy(model, ids)
                model(ids)
            alive = [ref for ref in made if ref() is not None]
        finally:
            gc.enable()
            DynamicCache.__init__ = original
        assert made
        assert not alive

    def test_copies_go_their_own_way(self, model, reference):
        ids = reference.prompts["answerability"]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-2], past_key_values=cache)
            copied = copy.deepcopy(cache)
            first = model(ids[:, -2:], past_key_values=copied).logits
            second = model(ids[:, -2:], past_key_values=cache).logits
        assert torch.equal(first, second)
        assert copied.layers[-1].cache() is copied
        assert cache.layers[-1].cache() is cache

    def test_one_layer_more_than_the_model(self, model, reference):
        """docs/transformers.md says so."""
        cache = DynamicCache(config=model.config)
        model(reference.prompts[None], past_key_values=cache)
        assert len(cache.layers) == model.config.num_hidden_layers + 1


class TestLogits:
    def test_guidance(self, model, plain, reference):
        """Classifier-free guidance, which uses all logits, gives the base's values and no control token."""
        ids, negative = torch.randint(10, 300, (1, 9)), torch.randint(10, 300, (1, 5))
        options = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
        assert greedy(model, ids, **options).tolist() == greedy(plain, ids, **options).tolist()
        for ids in reference.prompts.values():
            new = greedy(model, ids, **options, output_scores=True, return_dict_in_generate=True)
            assert not any(scores.isnan().any() for scores in new.scores)
            assert not set(new.sequences[0, ids.shape[1] :].tolist()) & set(reference.spec.suppressed)

    @pytest.mark.parametrize("temperature", [1.0, 100.0])
    def test_no_control_token_is_ever_sampled(self, model, reference, temperature):
        torch.manual_seed(0)
        out = greedy(
            model, reference.prompts[None].repeat(50, 1), do_sample=True, temperature=temperature, top_k=0, top_p=1.0
        )
        new = out[:, reference.prompts[None].shape[1] :]
        assert not set(new.flatten().tolist()) & set(reference.spec.suppressed)

    def test_losses_that_compute_with_all_logits(self, model, plain, reference):
        """Distillation, entropy and label smoothing are finite; the first two equal the base's."""
        ids = torch.randint(10, 300, (2, 12))
        size = min(reference.spec.suppressed)
        with torch.no_grad():
            ours, theirs = model(ids).logits.log_softmax(-1), plain(ids).logits.log_softmax(-1)
        assert torch.equal(ours[..., :size], theirs)
        entropy = -(ours.exp() * ours).sum(-1)
        assert torch.allclose(entropy, -(theirs.exp() * theirs).sum(-1))
        assert torch.nn.functional.kl_div(ours, ours, log_target=True).isfinite()
        smoothed = torch.nn.functional.cross_entropy(ours.flatten(0, 1), ids.flatten(), label_smoothing=0.1)
        assert smoothed.isfinite()

    def test_trainer_with_label_smoothing(self, own, reference, tmp_path):
        ids = reference.prompts["citations"][0]
        data = [{"input_ids": ids, "labels": substituted(reference, ids[None])[0]}] * 4
        arguments = TrainingArguments(
            tmp_path, label_smoothing_factor=0.1, max_steps=2, report_to=[], use_cpu=True, logging_steps=1
        )
        trainer = Trainer(own, arguments, train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses
        assert all(0 < loss < 100 for loss in losses)

    def test_the_loss_comes_first(self, model, reference):
        ids = reference.prompts["citations"]
        out = model(ids, labels=ids)
        assert out[0] is out.loss
        assert out.loss.ndim == 0
        assert model(ids, labels=ids, return_dict=False)[0].item() == out.loss.item()


class TestPacked:
    def test_cu_seq_lens_and_positions(self, model, reference):
        rows = [reference.prompts[name] for name in ("citations", None, "answerability")]
        ids = torch.cat(rows, 1)
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        edges = torch.tensor([0, *torch.tensor([row.shape[1] for row in rows]).cumsum(0)], dtype=torch.int32)
        with torch.no_grad():
            alone = torch.cat([model(row).logits for row in rows], 1)
            packed = model(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=edges, cu_seq_lens_k=edges)
        torch.testing.assert_close(packed.logits, alone, rtol=1e-4, atol=1e-4)

    def test_gradients(self, own, reference):
        rows = [reference.prompts[name] for name in ("citations", None)]
        ids = torch.cat(rows, 1)
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
        labels = ids.clone()
        labels[0, [0, rows[0].shape[1]]] = -100  # a sequence's first token is not predicted
        own(ids, position_ids=positions, labels=labels, use_cache=False).loss.backward()
        packed = {name: p.grad.clone() for name, p in own.named_parameters() if "citations" in name}
        own.zero_grad()
        count = sum(row.shape[1] - 1 for row in rows)
        sum(own(row, labels=row).loss * (row.shape[1] - 1) / count for row in rows).backward()
        for name, gradient in packed.items():
            torch.testing.assert_close(gradient, own.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


class TestEmbeddings:
    def test_ids_beside_embeddings_in_generate(self, model, reference):
        ids = reference.prompts["citations"]
        embedded = model.get_input_embeddings()(ids)
        with pytest.raises(RoutingError, match="passes no ids"):
            model.generate(input_ids=ids, inputs_embeds=embedded, max_new_tokens=2)

    def test_soft_prompts(self, own, reference):
        tuned = get_peft_model(own, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        ids = reference.prompts[None]
        with pytest.raises(RoutingError, match="base_only"):
            tuned(input_ids=ids)
        assert tuned(input_ids=ids, base_only=True).logits.shape[1] == ids.shape[1] + 3

    @pytest.mark.parametrize("extra", [1, 70])
    def test_resize(self, own, composed, reference, tmp_path, extra):
        tokenizer = AutoTokenizer.from_pretrained(composed)
        new = [f"<new{i}>" for i in range(extra)]
        assert tokenizer.add_tokens(new) == extra
        expected = reference.logits
        own.resize_token_embeddings(len(tokenizer))
        own.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        ids = tokenizer("".join(new), add_special_tokens=False)["input_ids"]
        assert len(ids) == extra
        assert min(ids) >= reference.spec.rows
        for loaded in (own, again):
            assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == len(tokenizer)
            with torch.no_grad():
                loaded(torch.tensor([ids]))
                for name, prompt in reference.prompts.items():
                    got = loaded(prompt).logits[..., : min(reference.spec.suppressed)]
                    assert torch.equal(got, expected[name][..., : min(reference.spec.suppressed)])

    def test_rows_of_control_tokens_stay(self, own, reference):
        with pytest.raises(CheckpointError, match="control tokens need"):
            own.resize_token_embeddings(reference.spec.rows - 1)


def test_eight_threads(model, reference):
    """Threads that use different adapters of one model get what each gets alone."""
    names = (list(reference.prompts) * 8)[:8]
    expected = {name: greedy(model, reference.prompts[name]).tolist() for name in set(names)}
    found, errors = [None] * 8, []

    def run(i):
        try:
            for _ in range(3):
                found[i] = greedy(model, reference.prompts[names[i]]).tolist()
                assert found[i] == expected[names[i]]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [expected[name] for name in names]


def like(old):
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    return new


def with_hooks_of(old):
    """As torch.ao.quantization replaces a linear."""
    new = like(old)
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
    return new


def with_attributes_of(old):
    new = like(old)
    new.__dict__.update(old.__dict__)
    return new


def nothing(*_):
    """A forward hook."""


class Wrapper(torch.nn.Module):
    """As PEFT wraps a linear."""

    def __init__(self, old):
        super().__init__()
        self.base_layer = old

    def forward(self, x):
        return self.base_layer(x)


class TestLinears:
    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize(
        "replacement",
        [like, with_hooks_of, with_attributes_of, Wrapper, copy.deepcopy, lambda old: Wrapper(copy.deepcopy(old))],
    )
    @torch.no_grad()
    def test_a_replaced_linear_has_its_adapters_once(self, own, reference, replacement, hooked):
        ids, expected = reference.prompts["answerability"], reference.logits["answerability"]
        attention = own.model.layers[0].self_attn
        old = attention.q_proj
        if hooked:
            old.register_forward_hook(nothing)
            assert torch.equal(own(ids).logits, expected)
        attention.q_proj = replacement(old)
        assert torch.equal(own(ids).logits, expected)
        attention.q_proj = old
        assert torch.equal(own(ids).logits, expected)
        own = copy.deepcopy(own)
        own.model.layers[0].self_attn.q_proj.weight.data.zero_()
        assert not torch.equal(own(ids).logits, expected)
        assert torch.equal(own(ids).logits, pickle.loads(pickle.dumps(own))(ids).logits)

    @torch.no_grad()
    def test_hooks_see_the_update_and_may_change_the_input(self, own, reference):
        ids = reference.prompts["answerability"]
        mlp, slot = own.model.layers[0].mlp, 1 + own.config.switch_spec.names.index("answerability")
        linear, pair = mlp.down_proj, mlp._modules["down_proj" + SUFFIX].pair(slot)
        own(ids)
        seen = []
        handles = [
            linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
            linear.register_forward_hook(lambda module, args, output: seen.append((args[0], output.clone()))),
        ]
        own(ids)
        x, y = seen[0]
        plain = torch.nn.functional.linear(x, linear.weight)
        update = torch.nn.functional.linear(x @ pair.a.T, pair.b) * pair.scale
        assert update[0, -1].abs().max() > 1e-3
        torch.testing.assert_close(y[0, -1], (plain + update)[0, -1])
        for handle in handles:
            handle.remove()
        assert torch.equal(own(ids).logits, reference.logits["answerability"])

    @pytest.mark.parametrize("when", ["on all modules", "inside a forward"])
    @torch.no_grad()
    def test_hooks_at_other_times(self, own, reference, when):
        ids, target = reference.prompts["answerability"], own.model.layers[1].mlp.down_proj

        def double(module, args):
            return (2 * args[0],) if module is target else None

        other = copy.deepcopy(own)
        other.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        expected = other(ids).logits
        if when == "on all modules":
            handles = [torch.nn.modules.module.register_module_forward_pre_hook(double)]
        else:
            first = own.model.layers[0].mlp
            handles = [first.register_forward_hook(lambda *_: handles.append(target.register_forward_pre_hook(double)))]
        try:
            assert torch.equal(own(ids).logits, expected)
        finally:
            for handle in handles:
                handle.remove()
        assert torch.equal(own(ids).logits, reference.logits["answerability"])
        target._forward_hooks.clear()
        assert torch.equal(own(ids).logits, reference.logits["answerability"])

    @torch.no_grad()
    def test_an_identity(self, own, reference):
        """Its output is its input, which other linears read too."""
        own.model.layers[0].self_attn.q_proj = torch.nn.Identity()
        other = copy.deepcopy(own)
        other.model.layers[0].self_attn.q_proj.forward = torch.clone
        for ids in reference.prompts.values():
            assert torch.equal(own(ids).logits, other(ids).logits)

    @torch.no_grad()
    def test_a_linear_in_two_models(self, own, reference):
        ids, other = reference.prompts["answerability"], copy.deepcopy(own)
        for name, parameter in other.named_parameters():
            if name.endswith("-B"):
                parameter.mul_(2)
        expected = other(ids).logits
        other.model.layers[0].mlp.down_proj = own.model.layers[0].mlp.down_proj
        for _ in range(2):
            assert torch.equal(own(ids).logits, reference.logits["answerability"])
            assert torch.equal(other(ids).logits, expected)

    def test_replicas_are_refused(self, own, reference):
        """Those of nn.DataParallel, whose linears would be the original's."""
        with pytest.raises(RoutingError, match="DataParallel"):
            own.model._replicate_for_data_parallel()(reference.prompts[None])

    @pytest.mark.filterwarnings("ignore:torch.ao.quantization")
    @torch.no_grad()
    def test_linears_quantised_after_loading(self, own, reference):
        from torch.ao.quantization import quantize_dynamic

        ids, expected = reference.prompts["answerability"], reference.logits["answerability"]
        own(ids)
        quantised = quantize_dynamic(own, {torch.nn.Linear}, dtype=torch.qint8)
        assert type(quantised.model.layers[0].mlp.down_proj) is not torch.nn.Linear
        error = (quantised(ids).logits - expected).abs().max()
        for name, parameter in own.named_parameters():
            if name.endswith("-B"):
                parameter.zero_()
        assert error < (own(ids).logits - expected).abs().max() / 4

    def test_a_linear_that_is_gone(self, own, reference):
        own.model.layers[0].self_attn.q_proj = None
        with pytest.raises(RoutingError, match=r"layers\.0\.self_attn\.q_proj"):
            own(reference.prompts["answerability"])

    def test_a_block_that_does_not_call_its_linears(self, own, reference):
        """A block that bypasses its linears, like a fused kernel, would lose its adapters without an error."""
        mlp = own.model.layers[1].mlp
        mlp.forward = lambda x: torch.nn.functional.linear(
            mlp.act_fn(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T), mlp.down_proj.weight
        )
        with pytest.raises(RoutingError, match="without calling") as caught:
            own(reference.prompts[None])
        assert "layers.1.mlp.down_proj" in caught.value.problems

    def test_a_layer_by_itself(self, own):
        with pytest.raises(RoutingError, match="outside the model's forward"):
            own.model.layers[0].mlp(torch.randn(1, 2, own.config.hidden_size))

    def test_targets_that_the_base_does_not_have(self, composed):
        config = AutoConfig.from_pretrained(composed)
        config.switch["adapters"][0]["targets"].append("model.layers.7.self_attn.q_proj")
        with pytest.raises(CheckpointError, match=r"layers\.7") as caught:
            AutoModelForCausalLM.from_config(config)
        assert len(caught.value.problems) == 1


def test_push_to_hub(own, tmp_path, monkeypatch):
    """`private` and `create_pr` reach the hub; an existing public repository is refused for `private`."""
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id)

        def repo_info(self, repo_id):
            return SimpleNamespace(private=calls["create"][0] != "me/public")

        def upload_folder(self, **options):
            calls["upload"] = options

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    own.save_pretrained(
        tmp_path / "a", push_to_hub=True, repo_id="me/x", private=True, create_pr=True, commit_message="m", token="t"
    )
    assert calls["create"] == ("me/x", {"private": True, "exist_ok": True})
    assert {key: calls["upload"][key] for key in ("create_pr", "commit_message", "repo_id")} == {
        "create_pr": True,
        "commit_message": "m",
        "repo_id": "me/x",
    }
    del calls["upload"]
    with pytest.raises(Exception, match="public"):
        own.save_pretrained(tmp_path / "b", push_to_hub=True, repo_id="me/public", private=True)
    assert "upload" not in calls
