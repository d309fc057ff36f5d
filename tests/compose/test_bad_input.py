"""Every bad input gives one error that names the problem and a remedy, and leaves no output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import ASSISTANT, edit_json, make_adapter, make_base
from safetensors.torch import load_file, save_file

from granite_switch import compose
from granite_switch.composition.compose import prepare
from granite_switch.errors import SwitchError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def adapter(adapters: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be damaged."""
    return Path(shutil.copytree(adapters / "citations", tmp_path / "citations"))


def refused(base: Path, sources: list[Path], folder: Path, *words: str, **options: object) -> SwitchError:
    """Compose, and expect an error with all these words and no output."""
    output = folder / "made" / "out"
    output.parent.mkdir(exist_ok=True)
    with pytest.raises(SwitchError) as caught:
        compose(base, sources, output, **options)
    for word in words:
        assert word in str(caught.value)
    assert list(output.parent.iterdir()) == []
    return caught.value


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def test_an_adapter_for_another_base_lists_every_shape(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden=32, mlp=40, layers=3)
    make_adapter(tmp_path / "a", other, targets=["q_proj", "down_proj"])
    error = refused(base, [tmp_path / "a"], tmp_path, "made for another base model", "the base has 2 layers", "[r, 64]")
    assert len(error.problems) == 12


@pytest.mark.parametrize("setting", [
    {"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]},
    {"fan_in_fan_out": True}, {"peft_type": "LOHA"}, {"peft_type": None}, {"target_parameters": ["x"]},
    {"trainable_token_indices": [1]}, {"layer_replication": [[0, 1]]}, {"use_qalora": True},
    {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
])  # fmt: skip
def test_peft_features_are_refused_by_name(setting: dict, base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / CONFIG, **setting)
    refused(base, [adapter], tmp_path, next(iter(setting)), "hint:")


def test_every_refused_feature_is_named_at_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / CONFIG, use_dora=True, bias="all")
    assert len(refused(base, [adapter], tmp_path).problems) == 2


def test_unknown_tensors_are_all_listed(base: Path, adapter: Path, tmp_path: Path) -> None:
    names = [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
    ]
    change_weights(adapter, lambda t: t.update({name: torch.ones(2, 64) for name in names}))
    refused(base, [adapter], tmp_path, WEIGHTS, *names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(bad: float, dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def spoil(tensors: dict) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[name][3, 1] = bad

    change_weights(adapter, spoil)
    refused(base, [adapter], tmp_path, name, "not finite")


def test_weights_missing_truncated_pickled_or_half_a_pair(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-5])
    refused(base, [adapter], tmp_path, WEIGHTS, "its header says", "again")
    (adapter / WEIGHTS).unlink()
    refused(base, [adapter], tmp_path, WEIGHTS, "no such file")
    (adapter / "adapter_model.bin").write_bytes(b"x")
    refused(base, [adapter], tmp_path, "adapter_model.bin", "pickled", "PEFT")
    (adapter / WEIGHTS).write_bytes(whole)
    change_weights(adapter, lambda t: t.pop("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"))
    refused(base, [adapter], tmp_path, "layers.1.mlp.down_proj", "lora_B is missing")


def test_rank_that_contradicts_the_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / CONFIG, r=7)
    refused(base, [adapter], tmp_path, "layers.0.self_attn.o_proj", "rank 2", "says 7")


def test_unreadable_adapter_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / CONFIG).write_text("{")
    refused(base, [adapter], tmp_path, CONFIG, "JSON")


def test_two_adapters_of_one_name(base: Path, adapter: Path, adapters: Path, tmp_path: Path) -> None:
    refused(base, [adapter, adapters], tmp_path, "two adapters have the same name", str(adapter), "manifest")


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "a\x07b", "a b", " a", "a\\b", "<|a|>", ".a", "base", "a" * 101])
def test_names_that_cannot_be(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(json.dumps([{"name": name, "path": str(adapter)}]))
    refused(base, [manifest], tmp_path, repr(name)[1:-1], "manifest")


def test_a_token_that_is_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapter.rename(tmp_path / "start_of_role")
    refused(base, [tmp_path / "start_of_role"], tmp_path, "<|start_of_role|> is token", "another name")


def test_an_invocation_that_does_not_survive_tokenisation(base: Path, tmp_path: Path) -> None:
    # 'r' 'iver', which the tokenizer merges to ' river': after a control token the rest merges differently
    from tokenizers import Tokenizer

    ids = [Tokenizer.from_file(str(base / "tokenizer.json")).token_to_id(c) for c in "xriver"]
    make_adapter(tmp_path / "a", base, invocation=ids)
    error = refused(base, [tmp_path / "a"], tmp_path, "does not survive tokenisation", str(ids))
    assert "the prompt gives [" in error.problems[0]


def test_several_bad_adapters_are_named_at_once(base: Path, adapters: Path, tmp_path: Path) -> None:
    for name in ("citations", "guardian-core"):
        copy = Path(shutil.copytree(adapters / name, tmp_path / "all" / name))
        edit_json(copy / CONFIG, use_dora=True)
    error = refused(base, [tmp_path / "all"], tmp_path, "2 adapters cannot be composed")
    assert sum("use_dora" in line for line in error.problems) == 2


def test_sources_that_hold_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(base, [tmp_path / "empty"], tmp_path, "contains no adapter")
    refused(base, [tmp_path / "nowhere"], tmp_path, "nowhere", "neither a local folder nor a hub id")
    refused(base, ["no/such-repository"], tmp_path, "no/such-repository", "hub")
    refused(base, [adapter], tmp_path, "no adapter is left", exclude=["cit*"])
    (tmp_path / "m.yaml").write_text("- path: [1")
    refused(base, [tmp_path / "m.yaml"], tmp_path, "cannot be read as YAML")
    (tmp_path / "m.yaml").write_text("- name: x")
    refused(base, [tmp_path / "m.yaml"], tmp_path, "entry 1: path is missing")


def test_bases_that_cannot_carry_adapters(base: Path, adapter: Path, composed: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    edit_json(bad / "config.json", model_type=None)
    refused(bad, [adapter], tmp_path, "model_type")
    edit_json(bad / "config.json", model_type="t5", is_encoder_decoder=True)
    refused(bad, [adapter], tmp_path, "is_encoder_decoder: only decoders")
    edit_json(bad / "config.json", is_encoder_decoder=None, architectures=["BertForMaskedLM"])
    refused(bad, [adapter], tmp_path, "BertForMaskedLM", "ForCausalLM")
    edit_json(bad / "config.json", architectures=["GraniteForCausalLM"], tie_word_embeddings=False)
    refused(bad, [adapter], tmp_path, "lm_head.weight", "tie_word_embeddings")
    edit_json(bad / "config.json", tie_word_embeddings=True)
    refused(composed, [adapter], tmp_path, "already composed", "add")
    refused(tmp_path / "nowhere", [adapter], tmp_path, "nowhere")
    edit_json(bad / "config.json", model_type="granite")
    (bad / "tokenizer.json").unlink()
    refused(bad, [adapter], tmp_path, "tokenizer.json", "save_pretrained")
    (bad / "config.json").unlink()
    refused(bad, [adapter], tmp_path, "config.json")


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.",
        "layernorm",
        "model.norm",
        "embed_tokens",
    ],
)
def test_a_base_that_lacks_what_its_config_implies(lost: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if lost not in k}, bad / "model.safetensors", {"format": "pt"})
    words = {"embed_tokens": "embedding", "layernorm": "norms of its layers", "model.norm": "the last layer"}
    refused(bad, [adapter], tmp_path, "bad", words.get(lost, lost.strip(".")))


def test_a_base_without_norms_is_a_warning(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Some bases' norms have no weights. If they were lost, loading names them."""
    assert not any("norms" in warning for warning in prepare(base, [adapter]).warnings)
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "norm" not in k}, bad / "model.safetensors", {"format": "pt"})
    assert any("has no weights of norms" in warning for warning in prepare(bad, [adapter]).warnings)


def test_a_base_with_damaged_or_missing_shards(adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    error = refused(base, [adapter], tmp_path, shards[0].name, shards[1].name)
    assert len(error.problems) == 2


def test_a_base_without_a_chat_template_composes_with_a_warning(adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", template=None)
    plan = compose(base, [adapter], tmp_path / "out")
    assert "no chat template" in plan.warnings[0]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_tokens_without_a_row_in_the_embedding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", pad_vocab=-3)
    plan = compose(base, [make_adapter(tmp_path / "a", base)], tmp_path / "out")
    assert "the last 3 tokens of its tokenizer have no row" in plan.warnings[0]


def test_a_template_that_opens_prompts_in_two_ways(adapter: Path, tmp_path: Path) -> None:
    template = "{{ '<|end_of_text|>' if documents else '<|start_of_role|>' }}{{ messages[0].content }}"
    base = make_base(tmp_path / "base", template=template)
    refused(base, [adapter], tmp_path, "different tokens")


def test_an_invocation_that_the_template_changes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", template="{{ '<|start_of_role|>' + messages[-1].content | upper }}")
    make_adapter(tmp_path / "a", base, invocation="<rewrite>")
    refused(base, [tmp_path / "a"], tmp_path, "changes '<rewrite>' in a message")


def test_existing_output_is_not_touched(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(SwitchError, match="already exists"):
        compose(base, [adapter], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    compose(base, [adapter], tmp_path / "out", force=True)
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "mine").exists()


def test_assistant_marker_alone_is_a_fine_invocation(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", base, invocation=ASSISTANT)
    assert compose(base, [tmp_path / "a"], tmp_path / "out").spec.names == ("a",)
