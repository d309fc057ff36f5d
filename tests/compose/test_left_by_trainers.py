"""Adapters as trainers and hubs leave them: each is read correctly, or refused with a remedy."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import ASSISTANT, edit_json, make_adapter, make_base
from families import FAMILIES, load_decoder, make_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteForCausalLM, Trainer, TrainingArguments

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.composition.adapters import other_base
from granite_switch.composition.compose import Plan, prepare
from granite_switch.composition.names import Linears, parse
from granite_switch.errors import SwitchError, shortened

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT = "base_model.model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def adapter(adapters: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter (o_proj and down_proj, rank 2), to be changed."""
    return Path(shutil.copytree(adapters / "citations", tmp_path / "citations"))


@pytest.fixture(scope="module")
def plain(base: Path, adapters: Path) -> Plan:
    """The result of composing the good adapter."""
    return prepare(base, [adapters / "citations"])


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def change(folder: Path, spoil: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def error(base: Path, source: Path | str, **options: object) -> SwitchError:
    with pytest.raises(SwitchError) as caught:
        prepare(base, [source], **options)
    return caught.value


def same_tensors(one: Plan, other: Plan) -> bool:
    ours, theirs = (next(iter(plan.adapters.values())) for plan in (one, other))
    return ours.spec.digest == theirs.spec.digest and ours.spec.targets == theirs.spec.targets


# --- names -------------------------------------------------------------------------------------------------------


NAMES: dict[str, Callable[[str], str]] = {
    "twice": lambda n: PEFT + n,
    "none": lambda n: n.removeprefix(PEFT),
    "compiled": lambda n: "_orig_mod." + n,
    "compiled inside": lambda n: n.replace(PEFT, PEFT + "_orig_mod."),
    "ddp": lambda n: "module." + n,
    "fsdp": lambda n: n.replace(".layers.", "._fsdp_wrapped_module.layers."),
    "checkpointed": lambda n: n.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "multimodal": lambda n: n.replace("model.layers", "model.language_model.layers"),
    "language_model": lambda n: n.replace(PEFT, PEFT + "language_model."),
    "inner model": lambda n: n.replace(PEFT + "model.", PEFT),
    "default": lambda n: n.replace(".weight", ".default.weight"),
    "named": lambda n: n.replace(".weight", ".my-task.weight"),
    "no block": lambda n: n.replace(".self_attn.", ".").replace(".mlp.", "."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_are_clear_are_taken_and_said(kind: str, base: Path, adapter: Path, plain: Plan) -> None:
    rename(adapter, NAMES[kind])
    plan = prepare(base, [adapter])
    assert same_tensors(plan, plain)
    assert plan.notes or kind == "default"


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["base_model.model", "_orig_mod", "module"]), max_size=4), st.sampled_from("AB"))
def test_wrappers_in_any_order_come_off(wrappers: list[str], matrix: str) -> None:
    name = parse(".".join([*wrappers, "model.layers.0.self_attn.q_proj", f"lora_{matrix}", "weight"]))
    assert name
    assert (name.path, name.matrix) == ("model.layers.0.self_attn.q_proj", matrix)


@pytest.mark.parametrize("tower", ["vision_tower", "audio_encoder", "visual.blocks"])
def test_another_towers_modules_are_not_the_decoders(tower: str, base: Path, adapter: Path) -> None:
    rename(adapter, lambda n: n.replace("model.layers", f"{tower}.layers"))
    found = error(base, adapter)
    assert tower in found.message
    assert "'model.layers.'" in found.message
    assert not found.problems


def test_a_name_that_can_mean_two_linears_is_not_taken() -> None:
    linears = Linears(["model.layers.0.mamba.out_proj", "model.layers.0.attn.out_proj"])
    assert linears.find("layers.0.out_proj") is None
    assert linears.find("layers.0.attn.out_proj") == "model.layers.0.attn.out_proj"


def test_several_adapters_in_one_file(base: Path, adapter: Path) -> None:
    change(adapter, lambda t: t.update({n.replace(".weight", ".second.weight"): v.clone() for n, v in t.items()}))
    assert "second" in error(base, adapter).message


def test_two_tensors_for_one_linear(base: Path, adapter: Path) -> None:
    change(adapter, lambda t: t.update({n.removeprefix(PEFT): v.clone() for n, v in t.items()}))
    assert "two tensors for one matrix" in error(base, adapter).message


# --- other tensors in the file -----------------------------------------------------------------------------------


def test_copies_of_the_bases_weights_are_dropped(base: Path, adapter: Path, plain: Plan) -> None:
    of_base = load_file(base / "model.safetensors")
    linear = "model.layers.0.self_attn.o_proj"
    copies = {
        f"{PEFT}model.embed_tokens.weight": of_base["model.embed_tokens.weight"],
        f"{PEFT}lm_head.weight": of_base["model.embed_tokens.weight"].bfloat16(),  # tied, in a narrower dtype
        f"{PEFT}{linear}.base_layer.weight": of_base[f"{linear}.weight"],
    }
    change(adapter, lambda t: t.update({n: v.clone() for n, v in copies.items()}))
    plan = prepare(base, [adapter])
    assert same_tensors(plan, plain)
    assert "embed_tokens" in plan.notes[0]
    assert f"{linear}.base_layer" in plan.notes[0]


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.layers.1.mlp.down_proj.base_layer"])
def test_copies_that_were_trained_are_refused(name: str, base: Path, adapter: Path) -> None:
    source = "model.layers.1.mlp.down_proj" if "layers" in name else "model.embed_tokens"
    weight = load_file(base / "model.safetensors")[f"{source}.weight"]
    weight[7:9] += 0.01
    change(adapter, lambda t: t.update({f"{PEFT}{name}.weight": weight}))
    found = error(base, adapter)
    assert "2 rows differ from the base's, from row 7 on" in found.problems[0]
    assert "tokens added in training" in found.hint


def test_tokens_added_in_training_are_named(base: Path, adapter: Path) -> None:
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    change(adapter, lambda t: t.update({f"{PEFT}model.embed_tokens.weight": torch.cat([weight, weight[:2]])}))
    assert "tokens were added in training" in error(base, adapter).problems[0]


def test_empty_tensors_of_zero_3_are_one_line(base: Path, adapter: Path) -> None:
    change(adapter, lambda t: t.update({n: torch.empty(0) for n in t}))
    found = error(base, adapter)
    assert "ZeRO-3" in found.message
    assert not found.problems


FOREIGN = {
    "model.layers.0.self_attn.o_proj.lora_magnitude_vector": "docs/train.md",
    "model.embed_tokens.lora_embedding_A": "LoRA on the vocabulary",
    "lm_head.lora_A.weight": "LoRA on the vocabulary",
    "model.layers.0.mlp.experts.base_layer.lora_A.weight": "stacked experts",
    "model.layers.0.mamba.conv1d.lora_A.weight": "convolution",
    "model.layers.0.self_attn.o_proj.lora_B.bias": "bias",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": "retrained embeddings",
    "lm_head.modules_to_save.weight": "a whole module",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_linear_takes_says_how_to_train_or_convert(name: str, base: Path, adapter: Path) -> None:
    change(adapter, lambda t: t.update({PEFT + name: torch.ones(2, 64)}))
    (problem,) = error(base, adapter).problems
    assert name in problem
    assert FOREIGN[name] in problem


def test_lists_are_cut_at_ten_and_keep_everything() -> None:
    lines = [str(i) for i in range(30)]
    shown = SwitchError("x", problems=lines)
    assert len(shown.problems) == 30
    assert str(shown).count("\n") == 11
    assert "and 20 more" in str(shown)
    nested = ["a", *(f"  {i}" for i in range(12)), "b", "  0"]
    assert shortened(nested) == ["a", *(f"  {i}" for i in range(10)), "  and 2 more (--json shows all)", "b", "  0"]


# --- folders of other kinds --------------------------------------------------------------------------------------


def mlx(folder: Path) -> None:
    """As mlx_lm.lora writes it."""
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "x/y"}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(64, 8)}, folder / "adapters.safetensors")


def whole_model(folder: Path) -> None:
    make_base(folder)


def full_checkpoint(folder: Path) -> None:
    make_base(folder)
    (folder / "trainer_state.json").write_text("{}")


def states(folder: Path) -> None:
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth"):
        (folder / name).write_bytes(b"{}")


def kohya(folder: Path) -> None:
    tensors = {"lora_unet_mid_block.lora_down.weight": torch.ones(4, 8)}
    save_file(tensors, folder / "style.safetensors", {"ss_network_module": "networks.lora"})


def kohya_as_peft(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"lycoris_q_proj.hada_w1_a": torch.ones(4, 8)}, folder / WEIGHTS)


def gguf(folder: Path) -> None:
    (folder / "lora.gguf").write_bytes(b"GGUF")


def deepspeed(folder: Path) -> None:
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "global_step10").mkdir()


def weights_alone(folder: Path) -> None:
    save_file({f"{PEFT}model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}, folder / WEIGHTS)


def config_alone(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    states(folder)


def adapters_library(folder: Path) -> None:
    (folder / "pytorch_adapter.bin").write_bytes(b"x")
    (folder / CONFIG).write_text(json.dumps({"config": {"architecture": "lora"}, "name": "x"}))


KINDS: dict[Callable[[Path], None], tuple[str, str]] = {
    mlx: ("MLX", "transposed"),
    whole_model: ("a whole model", "base model"),
    full_checkpoint: ("full fine-tune", "base model"),
    states: ("no adapter", "save_pretrained"),
    kohya: ("kohya or LyCORIS", "PEFT"),
    kohya_as_peft: ("kohya or LyCORIS", "PEFT"),
    gguf: ("GGUF", "converted from"),
    deepspeed: ("DeepSpeed", "save_pretrained"),
    weights_alone: ("without its adapter_config.json", "rank"),
    config_alone: ("no such file", "save_pretrained"),
    adapters_library: ("peft_type", ""),
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_no_adapter_is_named_with_the_way_out(make: Callable, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "left"
    folder.mkdir()
    make(folder)
    found = error(base, folder)
    what, way = KINDS[make]
    assert what in found.message
    assert way in found.hint
    assert "\n" not in found.message


def test_a_composed_model_as_a_source(base: Path, composed: Path) -> None:
    assert "extract" in error(base, composed).hint


@pytest.mark.parametrize("name", ["lora.gguf", "style.safetensors", "adapter.bin", "notes.txt"])
def test_single_files_are_named(name: str, base: Path, tmp_path: Path) -> None:
    kohya(tmp_path) if name.startswith("style") else (tmp_path / name).write_bytes(b"GGUF")
    words = {".gguf": "GGUF", ".safetensors": "LyCORIS", ".bin": "pickled", ".txt": "neither"}
    assert words[Path(name).suffix] in error(base, tmp_path / name).message


# --- warnings ----------------------------------------------------------------------------------------------------


def warned(base: Path, adapter: Path) -> str:
    plan = prepare(base, [adapter])
    recorded = plan.spec.adapters[0].warnings
    assert all(any(line.endswith(warning) for line in plan.warnings) for warning in recorded)
    return "\n".join(recorded)


def test_a_good_adapter_warns_of_nothing(plain: Plan) -> None:
    assert plain.warnings == ()
    assert plain.notes == ()
    assert "warnings" not in json.dumps(plain.spec.to_dict())


def test_another_base_is_warned_of(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, base_model_name_or_path="org/another-model")
    assert "org/another-model" in warned(base, adapter)
    for same in ("org/base", "unsloth/base-bnb-4bit", "org/BASE-unsloth-bnb-4bit", "/home/me/any", "./x", ""):
        edit_json(adapter / CONFIG, base_model_name_or_path=same)
        assert warned(base, adapter) == ""
    assert other_base("ibm/granite-4.1-3b", "ibm/granite-4.1-8b")
    assert not other_base("ibm/granite-4.1-3b", "me/granite-4.1-3b-FP8")


def test_zero_b_is_warned_of(base: Path, adapter: Path) -> None:
    change(adapter, lambda t: [v.zero_() for n, v in t.items() if "down_proj" in n and "lora_B" in n])
    assert "zero in model.layers.[0-1].mlp.down_proj" in warned(base, adapter)
    change(adapter, lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n])
    assert "has no effect until it is trained" in warned(base, adapter)


def test_an_insane_scale_is_warned_of(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, lora_alpha=4000)
    assert "times as large as the weight" in warned(base, adapter)


def test_patterns_and_targets_that_mean_nothing(base: Path, adapter: Path) -> None:
    edit_json(adapter / CONFIG, rank_pattern={"q_proj": 4}, target_modules=["o_proj", "down_proj", "v_proj"])
    text = warned(base, adapter)
    assert "rank_pattern: 'q_proj' matches none" in text
    assert "target_modules has v_proj" in text
    edit_json(adapter / CONFIG, rank_pattern={}, target_modules=["o_proj"])
    assert "down_proj, which target_modules does not name" in warned(base, adapter)
    edit_json(adapter / CONFIG, target_modules=r".*\.(o_proj|down_proj)")
    assert warned(base, adapter) == ""


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", "null"), ("rank_pattern", '{"*.q_proj": 4}'), ("alora_invocation_tokens", "5")]
)
def test_keys_of_the_wrong_kind_are_named(key: str, value: str, base: Path, adapter: Path) -> None:
    data = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**data, key: json.loads(value)}))
    assert key in error(base, adapter).message


def test_an_adapter_config_of_a_merged_base_is_not_carried_over(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    shutil.copy(adapter / CONFIG, merged / CONFIG)
    compose(merged, [adapter], tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- equality ----------------------------------------------------------------------------------------------------


def compared(base: Path, folder: Path, reference: torch.nn.Module, ids: list[int], at: int) -> float:
    """The largest difference of logits, with the control token at a given position of the prompt."""
    plan = compose(base, [folder], folder.parent / "out", force=True)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "out")
    spec = plan.spec.adapters[0]
    assert spec.substitute_token_id == ids[at] or not spec.invocation_tokens
    switched = [*ids[:at], spec.token_id, *ids[at + 1 :]]
    with torch.no_grad():
        ours = model(torch.tensor([switched])).logits
        theirs = reference(torch.tensor([ids])).logits
    return (ours[..., : theirs.shape[-1]] - theirs).abs().max().item() / max(1, theirs.abs().max().item())


def acting_from(base: Path, folder: Path, start: int) -> torch.nn.Module:
    """The base with an adapter's update added by hand to tokens from `start` on."""
    model = GraniteForCausalLM.from_pretrained(base)
    tensors = {n.removeprefix(PEFT): t for n, t in load_file(folder / WEIGHTS).items()}
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            a, b = (tensors[f"{name}.lora_{matrix}.weight"] for matrix in "AB")

            def add(_: object, inputs: tuple, output: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b):
                update = scale * inputs[0] @ a.T @ b.T
                update[:, :start] = 0
                return output + update

            module.register_forward_hook(add)
    return model


def test_an_older_alora_acts_after_its_first_token(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "old", base, targets=("q_proj", "v_proj", "down_proj"))
    edit_json(folder / CONFIG, invocation_string=ASSISTANT)
    plan = prepare(base, [folder])
    library = plan.base.tokenizer.library
    tokens = library.encode(ASSISTANT, add_special_tokens=False).ids
    assert plan.spec.adapters[0].invocation_tokens == tuple(tokens[1:])
    assert "after its first token" in plan.notes[0]
    prompt = [20, 31, 42, *tokens, 50, 61, 72]
    assert compared(base, folder, acting_from(base, folder, start=4), prompt, at=4) <= 1e-5
    for wrong in (0, 3, 5):
        assert compared(base, folder, acting_from(base, folder, start=wrong), prompt, at=4) > 1e-3


def test_an_older_alora_of_one_token_is_refused(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "old", base)
    edit_json(folder / CONFIG, invocation_string="<|start_of_role|>")
    found = error(base, folder)
    assert "invocation_string" in found.message
    assert "alora_invocation_tokens" in found.hint


OTHERS = [
    ("llama", "none"),
    ("qwen3", "language_model"),
    ("gemma3", "compiled"),
    ("granitemoehybrid", "no block"),
]


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_other_families_with_other_names_equal_peft(family: str, kind: str, tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base", family)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(FAMILIES[family].targets), task_type="CAUSAL_LM")
    trained = get_peft_model(load_decoder(base, family), config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trained.save_pretrained(tmp_path / "a")
    reference = PeftModel.from_pretrained(load_decoder(base, family), tmp_path / "a").eval()
    rename(
        tmp_path / "a", lambda n: NAMES[kind](n).replace(".shared_mlp.", ".") if kind == "no block" else NAMES[kind](n)
    )
    opening = prepare(base, [tmp_path / "a"]).spec.base_substitute_token_id
    assert compared(base, tmp_path / "a", reference, [opening, 20, 31, 42, 53], at=0) <= 1e-5


def run_snippet(mark: str, **folders: Path) -> None:
    """Run a marked snippet of docs/train.md with other folders."""
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    snippet = page.partition(f"<!-- {mark} -->\n```python\n")[2].partition("```")[0]
    assert snippet
    for name, folder in folders.items():
        snippet = snippet.replace(f'"{name.replace("_", "-")}"', repr(str(folder)))
    exec(snippet, {})


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_other_adapters_convert_as_the_page_says(kind: str, base: Path, tmp_path: Path) -> None:
    source, target = tmp_path / kind, tmp_path / "lora"
    if kind == "dora":
        make_adapter(source, base, targets=["v_proj"], use_dora=True)
    else:
        config = LoHaConfig(r=4, alpha=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_weights=False)
        get_peft_model(GraniteForCausalLM.from_pretrained(base), config).save_pretrained(source)
    assert "docs/train.md" in str(error(base, source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_snippet(kind, base=base, my_lora=target, **{f"my_{kind}": source})
    reference = PeftModel.from_pretrained(GraniteForCausalLM.from_pretrained(base), source).eval()
    assert compared(base, target, reference, [2, 20, 31, 42], at=0) <= 1e-4


def test_mlx_converts_as_the_page_says(base: Path, adapters: Path, tmp_path: Path, plain: Plan) -> None:
    source = tmp_path / "mlx"
    source.mkdir()
    tensors = {n.removeprefix(PEFT): t for n, t in load_file(adapters / "citations" / WEIGHTS).items()}
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    theirs = {n.replace(end, names[end]): t.T.contiguous() for n, t in tensors.items() for end in names if end in n}
    save_file(theirs, source / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    (source / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters}))
    run_snippet("mlx", mlx_adapter=source, my_adapter=tmp_path / "citations")
    converted = prepare(base, [tmp_path / "citations"])
    assert same_tensors(converted, plain)
    assert converted.spec.adapters[0].alpha == 4


# --- what Trainer writes -----------------------------------------------------------------------------------------


class Lines(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(10, 18) + index
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def training(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Trainer and PEFT wrote: two checkpoints, no finished adapter."""
    folder = tmp_path_factory.mktemp("training") / "my-run"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(GraniteForCausalLM.from_pretrained(base), config)
    arguments = TrainingArguments(
        str(folder), max_steps=12, save_steps=6, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        learning_rate=0.01, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model, arguments, train_dataset=Lines()).train()
    return folder


def test_a_training_asks_which_checkpoint(base: Path, training: Path) -> None:
    found = error(base, training)
    assert "which one" in found.message
    assert found.problems == ("checkpoint-6", "checkpoint-12")
    assert "--include checkpoint-12" in found.hint
    plan = prepare(base, [training], include=["checkpoint-6"])
    assert plan.spec.names == ("checkpoint-6",)
    assert any("checkpoint-12: left out" in note for note in plan.notes)
    assert not plan.warnings
    assert prepare(base, [training / "checkpoint-12"]).spec.adapters[0].source == "checkpoint-12"


def test_a_finished_training_is_its_adapter(base: Path, training: Path, tmp_path: Path) -> None:
    done = Path(shutil.copytree(training, tmp_path / "done"))
    shutil.copytree(training / "checkpoint-12", done, dirs_exist_ok=True)
    shutil.copytree(training / "checkpoint-6", done / "reference")
    plan = prepare(base, [done])
    assert plan.spec.names == ("done",)
    left = "\n".join(plan.notes)
    assert "done/checkpoint-6: left out: an earlier state" in left
    assert "done/reference: left out: it is inside" in left
    assert prepare(base, [done], include=["reference"]).spec.names == ("reference",)


def test_states_without_an_adapter_are_named(base: Path, training: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(training / "checkpoint-6", tmp_path / "broken"))
    (broken / WEIGHTS).unlink()
    assert "Trainer folder" in error(base, broken).message
    (broken / CONFIG).unlink()
    assert "Trainer folder" in error(base, broken).message
