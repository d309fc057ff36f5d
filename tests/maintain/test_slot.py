"""An empty slot changes nothing until it is trained, and training changes only its own tensors."""

import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from artefacts import ROOT, make_adapter, make_base
from families import make_decoder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM

import granite_switch.hf  # noqa: F401
from granite_switch import compose, extract, verify
from granite_switch.cli import main
from granite_switch.composition.base import read_base
from granite_switch.composition.slot import add_empty, write_empty
from granite_switch.core.layout import adapter_file
from granite_switch.errors import AdapterError

sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A model of one trained adapter."""
    make_adapter(tmp_path / "known", base, seed=3)
    compose(base, [tmp_path / "known"], tmp_path / "model")
    return tmp_path / "model"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def test_an_empty_slot_is_the_base(model: Path, base: Path) -> None:
    plan = add_empty(model, "fresh", rank=4)
    spec = plan.spec.adapter("fresh")
    assert (spec.rank, spec.alpha, spec.modules) == (4, 8, ("k_proj", "o_proj", "q_proj", "v_proj"))
    assert plan.warnings == ("fresh: every B (or A) is zero: the adapter has no effect until it is trained",)
    verify(model, deep=True)
    switched = AutoModelForCausalLM.from_pretrained(model)
    ours = logits(switched, [spec.token_id, 20, 31, 42])
    theirs = logits(GraniteForCausalLM.from_pretrained(base), [spec.substitute_token_id, 20, 31, 42])
    assert (
        torch.equal(ours[..., : theirs.shape[-1]], theirs)
        or (ours[..., : theirs.shape[-1]] - theirs).abs().max() < 1e-6
    )


def test_the_same_inputs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        add_empty(model, "fresh", rank=4, output=tmp_path / out)
    add_empty(model, "other", rank=4, output=tmp_path / "c")
    a, b, c = (
        load_file(tmp_path / out / adapter_file(n)) for out, n in (("a", "fresh"), ("b", "fresh"), ("c", "other"))
    )
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert not torch.equal(next(iter(a.values())), next(iter(c.values())))
    assert a.keys() == b.keys()


def test_a_is_as_peft_initialises_it(model: Path, base: Path) -> None:
    add_empty(model, "fresh", rank=32, targets=["down_proj"])
    ours = load_file(model / adapter_file("fresh"))["model.layers.0.mlp.down_proj_lora.fresh-A"]
    config = LoraConfig(r=32, target_modules=["down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(GraniteForCausalLM.from_pretrained(base), config)
    theirs = theirs.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight
    assert ours.shape == theirs.shape
    bound = theirs.shape[1] ** -0.5
    for values in (ours, theirs):
        assert 0.95 * bound < values.abs().max() <= bound
        assert abs(values.std() / (bound / 3**0.5) - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_prj"]}, "q_prj"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": -1.0}, "alpha -1"),
        ({"name": "known"}, "already has known"),
        ({"name": "a b"}, "spaces"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, words: str, model: Path) -> None:
    before = hashes(model)
    with pytest.raises(AdapterError, match=words):
        add_empty(model, **{"name": "fresh", **options})
    assert hashes(model) == before


def test_the_command(model: Path, monkeypatch, capsys) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["granite-switch", "add", str(model), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert (
        run("--new", "fresh", "--rank", "4", "--alpha", "2", "--targets", "q_proj,v_proj", "--invocation", "<rewrite>")
        == 0
    )
    spec = json.loads((model / "config.json").read_text())["switch"]["adapters"][1]
    assert (spec["rank"], spec["alpha"], spec["technology"], spec["invocation_text"]) == (4, 2, "alora", "<rewrite>")
    assert run() == 2
    assert run("x", "--new", "y") == 2


LINES = [
    {
        "messages": [
            {"role": "user", "content": f"Where does {name} live? <rewrite>"},
            {"role": "assistant", "content": place},
        ]
    }
    for name, place in (("Anna", "Oslo"), ("the river", "the sea"), ("the road", "the mill"))
]


@pytest.mark.parametrize("invocation", ["", "<rewrite>"])
def test_training_a_slot_changes_the_slot_alone(invocation: str, model: Path, base: Path, tmp_path: Path) -> None:
    import train_adapter

    add_empty(model, "fresh", rank=8, targets=["q_proj", "v_proj", "down_proj"], invocation=invocation)
    data, trained = tmp_path / "data.jsonl", tmp_path / "trained"
    data.write_text("\n".join(map(json.dumps, LINES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = train_adapter.train(
            str(model), "fresh", data, trained, max_steps=30, learning_rate=0.01, logging_steps=1,
            per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    shutil.rmtree(trained / "states", ignore_errors=True)
    before, after = ({k: v for p in f.glob("*.safetensors") for k, v in load_file(p).items()} for f in (model, trained))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_lora.fresh-" in name}
    assert hashes(model)[adapter_file("known")] == hashes(trained)[adapter_file("known")]
    spec = verify(trained, deep=True).adapter("fresh")
    assert spec.warnings == ()
    extract(trained, "fresh", tmp_path / "fresh")
    reference = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), tmp_path / "fresh").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer.apply_chat_template(LINES[0]["messages"][:1], adapter_name="fresh", add_generation_prompt=True)[
        "input_ids"
    ]
    substituted = [spec.substitute_token_id if i == spec.token_id else i for i in ids]
    ours = logits(AutoModelForCausalLM.from_pretrained(trained), ids)
    theirs = logits(reference, substituted)
    assert (ours[..., : theirs.shape[-1]] - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    compose(base, [tmp_path / "fresh"], tmp_path / "again")


def test_a_slot_of_another_family(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base", "granitemoehybrid")
    first = write_empty(read_base(base), tmp_path / "first", rank=2, alpha=None, targets=["shared_mlp.input_linear"])
    compose(base, [first], tmp_path / "model")
    with pytest.raises(AdapterError, match="gate_proj"):
        add_empty(tmp_path / "model", "fresh", targets=["gate_proj"])
    add_empty(tmp_path / "model", "fresh")
    verify(tmp_path / "model", deep=True)


def test_targets_can_be_paths(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    compose(base, [make_adapter(tmp_path / "a", base)], tmp_path / "model")
    assert add_empty(tmp_path / "model", "x", targets=["model.layers.1.mlp.up_proj"]).spec.adapter("x").targets == (
        "model.layers.1.mlp.up_proj",
    )
