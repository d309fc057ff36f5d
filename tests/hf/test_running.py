"""Attention implementations, caches and decoding methods equal the model without a cache, token for token."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GraniteForCausalLM,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.utils import is_flash_attn_2_available

from granite_switch.core.routing import slots
from granite_switch.errors import RoutingError
from granite_switch.hf.updates import Updates

NEW = 7


@pytest.fixture(scope="module")
def model(reference):
    return reference.model


@pytest.fixture(scope="module")
def mixed(reference):
    """Sequences of one length that switch several times, and back to the base."""
    controls = [*reference.spec.control_slots]
    torch.manual_seed(3)
    ids = torch.randint(10, 300, (4, 24))
    for row, places in enumerate([(0, 5, 20), (3, 4, 5), (23,), ()]):
        for place in places:
            ids[row, place] = controls[(row + place) % len(controls)]
    return ids


def greedy(model, ids, mask=None, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **options},
    )


def test_int32_ids_are_read_as_int64(model, mixed):
    with torch.no_grad():
        assert torch.equal(model(mixed.int()).logits, model(mixed).logits)


class TestAttention:
    @pytest.mark.parametrize(
        "name", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow), "flash_attention_2"]
    )
    def test_implementation(self, composed, check, row, name):
        if name == "flash_attention_2" and not (torch.cuda.is_available() and is_flash_attn_2_available()):
            row("Running", f"`attn_implementation={name!r}`", "not run: no CUDA or no flash-attn here")
            pytest.skip("no flash-attn")
        flash = name == "flash_attention_2"
        options = {"dtype": torch.bfloat16, "device_map": 0} if flash else {"dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(composed, attn_implementation=name, **options).eval()
        assert model.config._attn_implementation == name
        check(model, "Running", f"`attn_implementation={name!r}`", 5e-2 if flash else 1e-5)

    @pytest.mark.parametrize("name", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
    def test_padding(self, reference, model, name):
        """Each row of a padded batch gives what it gives alone."""
        ids, mask = reference.batch()
        padded = copy.deepcopy(model)
        padded.set_attn_implementation(name)
        with torch.no_grad():
            together = padded(ids, attention_mask=mask).logits
            for row, (tokens, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
                alone = model(tokens[keep][None]).logits[0]
                torch.testing.assert_close(together[row, keep], alone, rtol=1e-4, atol=1e-4)
        if name != "flex_attention":  # torch does not compile plain Granite's decoding with it on a CPU
            generated = greedy(padded, ids, mask)[:, ids.shape[1] :]
            for row, (tokens, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
                assert generated[row].tolist() == greedy(model, tokens[keep][None])[0, keep.sum() :].tolist()


CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "prefill in chunks of 5": {"prefill_chunk_size": 5},
}


class TestCaches:
    @pytest.mark.parametrize("name", CACHES)
    def test_generate(self, model, mixed, row, name):
        if "offloaded" in name and not torch.accelerator.is_available():
            row("Running", f"cache: {name}", "not run: needs an accelerator, as for Granite")
            pytest.skip("transformers offloads from an accelerator")
        assert greedy(model, mixed, **CACHES[name]).tolist() == greedy(model, mixed, use_cache=False).tolist()
        row("Running", f"cache: {name}")

    @pytest.mark.parametrize("step", [1, 3, 5])
    @pytest.mark.parametrize("kind", ["lazy", "dynamic", "static"])
    def test_chunks(self, model, mixed, kind, step):
        """However the input is split, logits equal those of the whole, and the cache has every slot."""
        cache = {
            "lazy": DynamicCache(),
            "dynamic": DynamicCache(config=model.config),
            "static": StaticCache(config=model.config, max_cache_len=40),
        }[kind]
        with torch.no_grad():
            whole = model(mixed).logits
            parts = [model(part, past_key_values=cache).logits for part in mixed.split(step, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-4)
        kept = cache.layers[-1].keys[:, 0, : mixed.shape[1], 0]
        controls = model.config.switch_spec.control_slots
        assert kept.tolist() == [slots(tokens, controls) for tokens in mixed.tolist()]

    def test_quantised(self, reference, row):
        """Equals the base with the adapter merged, on the same cache."""
        settings = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
        own = reference.model
        for name in ("citations", "hallucination_detection"):
            ids, merged = reference.prompts[name], _merged(reference, name)
            substituted = own.model.switch.control_to_substitute[ids]
            caches = [QuantizedCache(config=own.config, **settings) for _ in range(2)]
            for part, same in zip(ids.split(6, dim=1), substituted.split(6, dim=1), strict=True):
                with torch.no_grad():
                    logits = own(part, past_key_values=caches[0]).logits
                    expected = merged(same, past_key_values=caches[1]).logits
                known = min(reference.spec.suppressed)
                torch.testing.assert_close(logits[..., :known], expected[..., :known], rtol=1e-4, atol=1e-4)
            options = {"cache_implementation": "quantized", "cache_config": dict(settings)}
            forbidden = {"suppress_tokens": [*reference.spec.suppressed]}
            expected = greedy(merged, substituted, **options, **forbidden)[:, ids.shape[1] :]
            assert greedy(own, ids, **options)[:, ids.shape[1] :].tolist() == expected.tolist()
        row("Running", "cache: quantised (quanto, 4 bits)")

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_sliding(self, reference, row, kind):
        """A sliding-window cache, for which Granite has no mask: equals the merged base with the same cache."""
        config = copy.deepcopy(reference.model.config)
        config.sliding_window = 8
        for name in ("citations", "hallucination_detection"):
            ids, merged = reference.prompts[name], _merged(reference, name)
            substituted = reference.model.model.switch.control_to_substitute[ids]
            logits = []
            for model, tokens in ((reference.model, ids), (merged, substituted)):
                cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=32)
                assert all(cache.is_sliding)
                with torch.no_grad():
                    parts = (tokens[:, :12], *tokens[:, 12:].split(1, dim=1))
                    logits.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1))
            known = min(reference.spec.suppressed)
            torch.testing.assert_close(logits[0][..., :known], logits[1][..., :known], rtol=1e-4, atol=5e-4)
        row("Running", f"cache: {kind}, sliding window")

    def test_reuse(self, model, reference, mixed, row):
        """The cache of one call can be used by the next, which may switch again."""
        first = greedy(model, mixed, return_dict_in_generate=True)
        more = torch.cat([first.sequences, mixed[:, :6]], dim=1)
        continued = greedy(model, more, past_key_values=first.past_key_values)
        assert continued.tolist() == greedy(model, more, use_cache=False).tolist()
        row("Running", "`past_key_values` of one `generate` in the next")

    @pytest.mark.parametrize("cut", [1, 9, 20])
    def test_crop(self, model, mixed, cut):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(mixed, past_key_values=cache)
            cache.crop(-cut)
            again = torch.flip(mixed[:, -cut:], [1])
            cached = model(again, past_key_values=cache).logits
            whole = model(torch.cat([mixed[:, :-cut], again], dim=1)).logits[:, -cut:]
        torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-4)

    def test_reset_and_select(self, model, mixed):
        cache = StaticCache(config=model.config, max_cache_len=40)
        for _ in range(2):
            with torch.no_grad():
                logits = model(mixed, past_key_values=cache).logits
            torch.testing.assert_close(logits, model(mixed).logits, rtol=1e-5, atol=1e-4)
            cache.reset()
        cache = DynamicCache(config=model.config)
        model(mixed[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([6, 1]))
        chosen = mixed[[3, 0]]
        with torch.no_grad():
            logits = model(chosen[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(logits, model(chosen).logits[:, -1:], rtol=1e-5, atol=1e-4)

    def test_cache_of_the_base(self, model, reference, mixed):
        """Entries that another model of the same base put into a cache count as the base's."""
        base = _merged(reference, None)
        cache = DynamicCache(config=base.config)
        prefix = mixed[3:, :10]
        with torch.no_grad():
            base(prefix, past_key_values=cache)
            cached = model(mixed[2:3, 10:], past_key_values=cache).logits
            whole = model(torch.cat([prefix, mixed[2:3, 10:]], dim=1)).logits[:, 10:]
        torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-4)


def _merged(reference, adapter: str | None) -> GraniteForCausalLM:
    """The base model with one adapter in its weights."""
    config = {**reference.model.config.to_dict(), "model_type": "granite", "architectures": None}
    config.pop("switch")
    config.pop("model_type")
    model = GraniteForCausalLM(GraniteForCausalLM.config_class(**config)).eval()
    state = reference.model.state_dict()
    model.load_state_dict({key: tensor for key, tensor in state.items() if "_lora" not in key})
    if adapter:
        for path, module in reference.model.named_modules():
            if isinstance(module, Updates) and reference.spec.slot(adapter) in module.adapters:
                a, b, scale = module.adapters[reference.spec.slot(adapter)]
                linear = model.get_submodule(path.removesuffix("_lora"))
                linear.weight.data += (scale * getattr(module, b) @ getattr(module, a)).data
    return model


MODES = {
    "beam search": {"num_beams": 3},
    "beam search, three returns": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, three returns": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated 2-grams": {"no_repeat_ngram_size": 2},
    "min_p, typical": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
}


class TestGenerating:
    @pytest.mark.parametrize("name", MODES)
    def test_mode(self, model, mixed, row, name):
        torch.manual_seed(5)
        cached = greedy(model, mixed, **MODES[name])
        torch.manual_seed(5)
        assert cached.tolist() == greedy(model, mixed, use_cache=False, **MODES[name]).tolist()
        row("Running", f"generation: {name}")

    def test_prompt_lookup(self, model, reference, row):
        for ids in reference.prompts.values():
            looped = torch.cat([ids, ids], dim=1)
            assert greedy(model, looped, prompt_lookup_num_tokens=3).tolist() == greedy(model, looped).tolist()
        row("Running", "assisted decoding: prompt lookup")

    @pytest.mark.parametrize("right", [True, False])
    def test_draft_model(self, model, reference, row, right):
        """A draft model that is always right, and one that is mostly wrong."""
        draft = copy.deepcopy(model)
        if not right:
            for parameter in draft.model.layers.parameters():
                parameter.data *= 0.7
        for ids in reference.prompts.values():
            assert greedy(model, ids, assistant_model=draft).tolist() == greedy(model, ids).tolist()
        row("Running", "assisted decoding: a draft model with the same tokens")

    def test_base_as_draft(self, model, base, reference, row):
        """The base drafts for the switch model, translating through the tokenizers because it has no control tokens."""
        draft = GraniteForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = type(reference.tokenizer).from_pretrained(base)
        for ids in reference.prompts.values():
            assisted = greedy(
                model, ids, assistant_model=draft, tokenizer=reference.tokenizer, assistant_tokenizer=tokenizer
            )
            assert assisted.tolist() == greedy(model, ids).tolist()
        row("Running", "assisted decoding: the base as draft model")

    def test_stopping(self, model, reference, row):
        class Third(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((len(input_ids),), input_ids.shape[1] >= width + 3)

        for ids in reference.prompts.values():
            width = ids.shape[1]
            assert (
                greedy(model, ids, stopping_criteria=[Third()]).tolist() == greedy(model, ids)[:, : width + 3].tolist()
            )
        row("Running", "`StoppingCriteria`")

    def test_streaming(self, model, reference, row):
        for ids in reference.prompts.values():
            streamer = TextIteratorStreamer(reference.tokenizer, skip_prompt=True)
            text = greedy(model, ids, streamer=streamer)
            assert "".join(streamer) == reference.tokenizer.decode(text[0, ids.shape[1] :])
        row("Running", "streaming")

    def test_scores(self, model, reference):
        """Control tokens have no probability, so none is generated."""
        out = greedy(model, reference.batch()[0], output_scores=True, return_dict_in_generate=True)
        for scores in out.scores:
            assert scores[:, [*reference.spec.control_slots]].eq(float("-inf")).all()
            assert not scores.isnan().any()

    def test_embeddings_alone(self, model, reference, row):
        embedded = model.get_input_embeddings()(reference.prompts[None])
        with pytest.raises(RoutingError, match="input_ids"):
            model(inputs_embeds=embedded)
        with pytest.raises(RoutingError, match="base_only"):
            model.generate(inputs_embeds=embedded, max_new_tokens=2)
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=embedded, base_only=True).logits, reference.logits[None])
        row("Running", "`inputs_embeds` alone", "refused: control tokens are read from `input_ids`, and there are none")
        row("Running", "`inputs_embeds` with `base_only=True`", difference=0)

    def test_generate_batch(self, model, reference, row):
        """transformers' continuous batching has its own paged cache, which cannot store slots."""
        with pytest.raises(RoutingError, match="generate_batch"):
            model.generate_batch([ids[0].tolist() for ids in reference.prompts.values()], GenerationConfig())
        row("Running", "`generate_batch`", "refused; the error names `generate` and vLLM")
