"""Legacy checkpoints load as they are and compute what PEFT computes, however they are loaded."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GraniteForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.composition.composed import read_composed
from granite_switch.core import legacy
from granite_switch.core.routing import substitute
from granite_switch.errors import CheckpointError

ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
LORA, ALORA = ("citations",), ("answerability", "guardian-core")
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def prompt(base: Path) -> list[int]:
    """A chat that ends in the aLoRA adapters' invocation sequence."""
    text = f"<|start_of_role|>user<|end_of_role|>Where does Anna live?<|end_of_text|>\n{ASSISTANT}"
    return Tokenizer.from_file(str(base / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def expected(base: Path, adapters: Path, prompt: list[int]) -> dict[str, Tensor]:
    """Logits of the last token by PEFT and by the base."""
    model = GraniteForCausalLM.from_pretrained(base)
    result = {"base": _logits(model, prompt)}
    for name in LORA + ALORA:
        peft = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), adapters / name)
        result[name] = _logits(peft, prompt)
    return result


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0, -1].float()


def _old_prompt(folder: Path, name: str, prompt: list[int]) -> list[int]:
    """The prompt for a legacy format: the control token is inserted (1) or replaces its substitute (2, 3)."""
    spec = legacy.read(folder).spec
    if name == "base":
        return prompt
    opening = prompt[0]  # opens a turn and the invocation sequence
    at = 0 if name in LORA else len(prompt) - 1 - prompt[::-1].index(opening)
    control = spec.adapter(name).token_id
    tokens = [*prompt[:at], control, *prompt[at + (0 if spec.hiding else 1) :]]
    assert spec.hiding or substitute(tokens, spec.substitutes) == prompt
    return tokens


def _check(model: torch.nn.Module, folder: Path, prompt: list[int], expected: dict[str, Tensor]) -> None:
    for name, logits in expected.items():
        got = _logits(model, _old_prompt(folder, name, prompt))
        vocabulary = min(model.config.switch_spec.control_slots)
        torch.testing.assert_close(got[:vocabulary], logits[:vocabulary], atol=TOLERANCE, rtol=TOLERANCE, msg=name)


PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "eager": {"attn_implementation": "eager"},
    "auto": {"device_map": "auto"},
    "disk": {"device_map": {"": "disk"}},
    "spilled": {"device_map": {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_equals_peft(
    version: int,
    way: str,
    old: Callable[..., Path],
    prompt: list[int],
    expected: dict[str, Tensor],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    folder = old(version)
    options = dict(WAYS[way], offload_folder=tmp_path) if "device_map" in WAYS[way] else WAYS[way]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert not [w for w in recwarn if "granite_switch" in str(w.filename) or "key" in str(w.message)]
    _check(model, folder, prompt, expected)


def test_latest_wins_and_returns_to_base(old: Callable[..., Path], prompt: list[int], composed: Path) -> None:
    folder = old(3, reset=True)
    before, now = legacy.read(folder).spec, AutoModelForCausalLM.from_pretrained(composed)
    spec = now.config.switch_spec
    same = {before.base_token_id: spec.base_token_id}
    same |= {a.token_id: spec.adapter(a.name).token_id for a in before.adapters}
    tokens = [before.base_token_id, *prompt[1:]]
    for name in ("citations", "guardian-core", "answerability", "citations"):
        tokens += [before.adapter(name).token_id, *prompt[1:4]]
    tokens += [before.base_token_id, *prompt[1:4]]
    for length in (len(tokens) - 4, len(tokens)):
        got = _logits(AutoModelForCausalLM.from_pretrained(folder), tokens[:length])
        want = _logits(now, [same.get(token, token) for token in tokens[:length]])
        first = before.base_token_id
        torch.testing.assert_close(got[:first], want[:first], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("version", [1, 3])
def test_sharded_in_bfloat16(
    version: int, old: Callable[..., Path], prompt: list[int], expected: dict[str, Tensor]
) -> None:
    folder = old(version, shards=3, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, logits in expected.items():
        got = _logits(model, _old_prompt(folder, name, prompt))[:300]
        assert (got - logits[:300]).norm() < 0.05 * logits[:300].norm(), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_adapters_act_when_quantised(
    version: int, kind: str, old: Callable[..., Path], prompt: list[int], expected: dict[str, Tensor]
) -> None:
    from transformers import BitsAndBytesConfig, QuantoConfig

    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        pytest.importorskip("optimum.quanto")
        how = QuantoConfig(weights="int8")
    folder = old(version)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    assert type(model.model.layers[0].self_attn.k_proj) is not torch.nn.Linear
    plain = _logits(model, prompt)[:300]
    for name in LORA + ALORA:
        change = _logits(model, _old_prompt(folder, name, prompt))[:300] - plain
        wanted = expected[name][:300] - expected["base"][:300]
        # 4 bits are coarse at a width of 64; a missing or wrong adapter would differ far more
        assert change.norm() > 0.5 * wanted.norm(), name
        assert torch.nn.functional.cosine_similarity(change, wanted, dim=0) > 0.8, name


@pytest.mark.parametrize("version", [1, 2, 3])
def test_saved_and_loaded_again(version: int, old: Callable[..., Path], prompt: list[int], tmp_path: Path) -> None:
    folder = old(version)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name in ("base", *LORA, *ALORA):
        tokens = _old_prompt(folder, name, prompt)
        assert torch.equal(_logits(again, tokens), _logits(model, tokens)), name
    with pytest.raises(CheckpointError, match=r"saved by transformers[\s\S]*granite-switch upgrade"):
        read_composed(tmp_path / "saved")


def test_decoder_alone(old: Callable[..., Path], prompt: list[int]) -> None:
    whole, decoder = AutoModelForCausalLM.from_pretrained(old(1)), AutoModel.from_pretrained(old(1))
    ids = torch.tensor([_old_prompt(old(1), "answerability", prompt)])
    with torch.no_grad():
        assert torch.equal(decoder(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_tables_are_no_part_of_the_checkpoint(old: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(old(1))
    spec = model.config.switch_spec
    for one in (model, copy.deepcopy(model), type(model)(model.config)):
        hiding = one.model.hiding
        controls = [adapter.token_id for adapter in spec.adapters]
        assert hiding.token_to_group_mask.nonzero()[:, 0].tolist() == controls
        assert hiding.adapter_hiding_matrix.all()
        assert hiding.adapter_hiding_matrix.shape == (len(controls) + 1, 1)
        tables = {name for name, _ in one.named_buffers() if "hiding" in name or "switch" in name}
        assert len(tables) == 5
        assert not tables & one.state_dict().keys()
