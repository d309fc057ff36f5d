"""The composed model gives PEFT's logits for the same adapter and prompt, and the base's without an adapter."""

import copy
from pathlib import Path

import pytest
import torch
from artefacts import ALL, CHATML, CHATML_TEMPLATE, make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM

import granite_switch.hf  # noqa: F401
from granite_switch import compose

TOLERANCE = 1e-5


def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def largest_difference(composed: torch.Tensor, reference: torch.Tensor) -> float:
    return (composed[..., : reference.shape[-1]] - reference).abs().max().item()


@pytest.fixture(scope="module")
def model(composed: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(composed)


@pytest.fixture(scope="module")
def plain(base: Path) -> torch.nn.Module:
    return GraniteForCausalLM.from_pretrained(base)


@pytest.mark.parametrize(
    "name", ["answerability", "citations", "guardian-core", "hallucination_detection", "query_rewrite"]
)
def test_each_adapter_equals_peft(name: str, model, plain, base: Path, adapters: Path, composed: Path) -> None:
    chat = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
    switched = AutoTokenizer.from_pretrained(composed).apply_chat_template(
        chat, adapter_name=name, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    substituted = model.model.switch.control_to_substitute[switched]
    reference = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), adapters / name)
    assert largest_difference(logits(model, switched), logits(reference, substituted)) <= TOLERANCE
    assert largest_difference(logits(model, switched), logits(plain, substituted)) > 0.1
    options = {"max_new_tokens": 32, "do_sample": False}
    ours = model.generate(switched, **options)[:, switched.shape[1] :]
    theirs = reference.generate(input_ids=substituted, **options)[:, switched.shape[1] :]
    assert torch.equal(ours, theirs)


RANKS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 9),
        "alpha": st.sampled_from([1, 4, 16, 24]),
        "targets": st.lists(st.sampled_from(ALL), min_size=1, max_size=7, unique=True),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", "layers.1.mlp.up_proj", "o_proj"]), st.integers(1, 6)
        ),
        "alpha_pattern": st.dictionaries(st.sampled_from(["v_proj", "layers.0.self_attn.q_proj"]), st.integers(1, 30)),
        "layers_to_transform": st.sampled_from([None, None, [1]]),
        "invocation": st.one_of(st.none(), st.lists(st.integers(6, 60), min_size=1, max_size=4)),
    }
)


@settings(max_examples=30)
@given(data=st.data(), kinds=st.lists(RANKS, min_size=1, max_size=2), seed=st.integers(0, 9))
def test_any_adapters_equal_peft(data, kinds: list[dict], seed: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("random")
    sizes = data.draw(st.sampled_from([{"heads": 4, "kv_heads": 2}, {"heads": 2, "kv_heads": 1, "head_dim": 24}]))
    tied = data.draw(st.booleans())
    base = make_base(folder / "base", seed=seed, hidden=32, mlp=40, template=None, tied=tied, **sizes)
    for index, kind in enumerate(kinds):
        make_adapter(folder / f"adapter{index}", base, seed=seed + index + 1, **kind)
    compose(base, [folder / f"adapter{i}" for i in range(len(kinds))], folder / "out")
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    spec = model.config.switch_spec
    for index, kind in enumerate(kinds):
        invocation = kind["invocation"]
        before = data.draw(st.lists(st.integers(6, 60), max_size=5 if invocation else 0))
        after = data.draw(st.lists(st.integers(61, 200), min_size=1, max_size=6))
        adapter = spec.adapters[index]
        prompt = [*before, *invocation, *after] if invocation else [adapter.substitute_token_id, *after]
        at = len(before)
        switched = [*prompt[:at], adapter.token_id, *prompt[at + 1 :]]
        reference = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), folder / f"adapter{index}")
        expected = logits(reference, torch.tensor([prompt]))
        got = logits(model, torch.tensor([switched]))
        assert largest_difference(got, expected) <= TOLERANCE * max(1.0, expected.abs().max().item())


def test_without_adapter_hidden_states_are_the_bases_bit_for_bit(model, plain) -> None:
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        ours = model.model(ids, output_hidden_states=True)
        theirs = plain.model(ids, output_hidden_states=True)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert largest_difference(logits(model, ids), logits(plain, ids)) <= TOLERANCE


def test_tokens_before_a_switch_are_the_bases_bit_for_bit(model, plain) -> None:
    ids = torch.randint(3, 300, (1, 24))
    switched = ids.clone()
    switched[0, 17] = model.config.switch_spec.adapter("answerability").token_id
    with torch.no_grad():
        ours, theirs = model.model(switched).last_hidden_state, plain.model(ids).last_hidden_state
    assert torch.equal(ours[:, :17], theirs[:, :17])
    assert not torch.allclose(ours[:, 17:], theirs[:, 17:], atol=1e-2)


def test_control_tokens_are_never_generated_unless_asked_for(model, base, adapters, tmp_path) -> None:
    controls = list(model.config.switch_spec.control_slots)
    out = logits(model, torch.randint(3, 300, (1, 9)))
    assert torch.isfinite(out).all()
    assert not out.softmax(-1)[..., controls].any()
    compose(base, [adapters / "citations"], tmp_path / "out", generatable=True)
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    spec = free.config.switch_spec
    likely = logits(free, torch.randint(3, 300, (1, 9))).softmax(-1)
    assert likely[..., : spec.rows - spec.reserved].all()
    assert not likely[..., spec.rows - spec.reserved :].any()


def test_batch_of_32_with_switches_and_padding_equals_each_alone(model) -> None:
    generator = torch.Generator().manual_seed(0)
    controls = torch.tensor(list(model.config.switch_spec.control_slots))
    rows = []
    for length in torch.randint(4, 30, (32,), generator=generator).tolist():
        row = torch.randint(3, 300, (length,), generator=generator)
        switches = torch.randint(0, length, (length // 4,), generator=generator)
        row[switches] = controls[torch.randint(0, len(controls), (length // 4,), generator=generator)]
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.ones(32, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = copy.deepcopy(model).double()  # in float32 some processors sum a batch in another order than its rows
    together = logits(model, ids, attention_mask=mask, position_ids=positions)[:, -1]
    for i, row in enumerate(rows):
        alone = logits(model, row[None])[0, -1]
        assert largest_difference(together[i][:300], alone[:300]) <= TOLERANCE
    new = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, width:]
    for i in range(0, 32, 5):
        alone = model.generate(rows[i][None], max_new_tokens=6, do_sample=False)[0, len(rows[i]) :]
        assert torch.equal(new[i][: len(alone)], alone)


def test_ten_thousand_control_tokens_route_exactly(model) -> None:
    from granite_switch.core.routing import slots
    from granite_switch.hf.routing import slots_of

    controls = model.config.switch_spec.control_slots
    ids = torch.randint(3, 300, (1, 20_000), generator=torch.Generator().manual_seed(1))
    ids[0, ::2] = torch.tensor(list(controls))[torch.randint(0, len(controls), (10_000,))]
    assert slots_of(ids, model.model.switch.control_to_slot, None)[0].tolist() == slots(ids[0].tolist(), controls)


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 12])
def test_chunked_equals_whole(cut: int, model) -> None:
    spec = model.config.switch_spec
    ids = torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(2))
    ids[0, 5], ids[0, 9] = spec.adapter("answerability").token_id, spec.base_token_id
    ids[1, 6], ids[1, 11] = spec.adapter("citations").token_id, spec.adapter("guardian-core").token_id
    whole = logits(model, ids)
    with torch.no_grad():
        first = model(ids[:, :cut], use_cache=True)
        rest = model(ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    chunked = torch.cat([first.logits, rest.logits], dim=1)
    assert largest_difference(chunked[..., :300], whole[..., :300]) <= TOLERANCE


def test_chatml_with_thinking_and_an_untied_head(tmp_path: Path) -> None:
    """Like Granite 4.2: another template, other role tokens, an untied lm_head."""
    base = make_base(tmp_path / "base", template=CHATML_TEMPLATE, specials=CHATML, tied=False)
    make_adapter(tmp_path / "check", base, targets=ALL, invocation="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    make_adapter(tmp_path / "style", base, seed=2, targets=ALL)
    compose(base, [tmp_path / "check", tmp_path / "style"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    for name in ("check", "style"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Where?"}], adapter_name=name, add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        substituted = model.model.switch.control_to_substitute[ids]
        reference = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), tmp_path / name)
        assert largest_difference(logits(model, ids), logits(reference, substituted)) <= TOLERANCE


def test_save_pretrained_writes_format_1_again(composed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(composed)
    model.save_pretrained(tmp_path / "saved")
    for file in composed.glob("*.safetensors"):
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(3, 300, (1, 9))
    assert torch.equal(logits(again, ids), logits(model, ids))
    low = AutoModelForCausalLM.from_pretrained(composed, dtype=torch.bfloat16)
    low.save_pretrained(tmp_path / "low")
    for file in composed.glob("adapter-*.safetensors"):
        assert (tmp_path / "low" / file.name).read_bytes() == file.read_bytes()
    with torch.no_grad():
        next(p for n, p in low.named_parameters() if "citations" in n).add_(1)
    low.save_pretrained(tmp_path / "changed")
    name = "adapter-citations.safetensors"
    assert (tmp_path / "changed" / name).read_bytes() != (composed / name).read_bytes()
