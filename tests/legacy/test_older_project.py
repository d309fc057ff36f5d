"""Users of releases up to 0.1.1: their command, manifests, imports and checkpoints, on tiny stand-ins."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from artefacts import edit_json, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_switch.hf  # noqa: F401
from granite_switch.composer.compose_granite_switch import main
from granite_switch.core import legacy
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError

MODULE = "granite_switch.composer.compose_granite_switch"


def spec_of(folder: Path) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads((folder / "config.json").read_text())["switch"])


@pytest.fixture
def library(base: Path, tmp_path: Path) -> Path:
    """A library in the layout of the old guide: <name>/<base>/<technology>, with its minimal io.yaml."""
    library = tmp_path / "lib"
    for name, technology in (("uncertainty", "alora"), ("uncertainty", "lora"), ("query_rewrite", "lora")):
        leaf = library / name / "base" / technology
        make_adapter(leaf, base, invocation="<rewrite>" if technology == "alora" else None)
        (leaf / "io.yaml").write_text(f"name: {name}\n")
    return library


def test_the_quick_start_from_end_to_end(base: Path, library: Path, tmp_path: Path) -> None:
    """The old readme's command, then its Python lines."""
    command = [
        sys.executable,
        "-m",
        MODULE,
        "--base-model",
        base,
        "--adapters",
        library,
        "--output",
        tmp_path / "my-model",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this command is now: granite-switch compose") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    messages = [{"role": "user", "content": "Where does Anna live? <rewrite>"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, adapter_name="uncertainty", tokenize=False
    )
    assert "<|uncertainty|>" in prompt
    outputs = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=4)
    assert tokenizer.decode(outputs[0], skip_special_tokens=True)
    index = json.loads((tmp_path / "my-model" / "adapter_index.json").read_text())
    assert [record["technology"] for record in index["adapters"]] == ["lora", "alora"]


def test_every_option(base: Path, library: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--base-model", str(base), "--adapters", str(library), "--output", str(tmp_path / "o")]
    arguments += [
        "--include-adapters",
        "un*",
        "query_rewrite",
        "--exclude-adapters",
        "query*",
        "--target-model",
        "x/base",
    ]
    arguments += ["--technology-filter", "lora", "--create-ioyaml", "--base-reset-token", "--debug-fields"]
    arguments += ["--technology", "alora", "--switch-head-dim", "32", "--ms-code-m", "6", "--ms-memory-gain", "28"]
    arguments += ["--control-dims", "32", "--built-in-adapters", "mine", "--lora-rank", "4", "--lora-alpha", "6"]
    assert main(arguments) == 0
    err = capsys.readouterr().err
    spec = spec_of(tmp_path / "o")
    assert [(a.name, a.technology, a.rank, a.alpha) for a in spec.adapters] == [
        ("uncertainty", "lora", 4, 16), ("mine", "lora", 4, 6),
    ]  # fmt: skip
    for name in ("switch-head-dim", "control-dims", "ms-code-m", "ms-memory-gain", "base-reset-token", "technology"):
        assert f"--{name} is ignored" in err
    assert "granite-switch add" in err


def test_the_command_that_it_names_gives_the_same(base: Path, library: Path, tmp_path: Path, capsys) -> None:
    assert main(["--base-model", str(base), "--adapters", str(library), "--output", str(tmp_path / "a")]) == 0
    line = next(x for x in capsys.readouterr().err.splitlines() if "is now: " in x).partition("is now: ")[2]
    command = line.replace(str(tmp_path / "a"), str(tmp_path / "b")).split()[1:]
    subprocess.run([sys.executable, "-m", "granite_switch.cli", *command], check=True, capture_output=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.*")} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.*")
    }


def test_slots_alone_listing_and_errors(base: Path, library: Path, tmp_path: Path, capsys) -> None:
    assert main(["--base-model", str(base), "--built-in-adapters", "one", "two", "--output", str(tmp_path / "o")]) == 0
    assert spec_of(tmp_path / "o").names == ("one", "two")
    assert main(["--base-model", str(base), "--adapters", str(library), "--list-adapters"]) == 0
    assert "uncertainty" in capsys.readouterr().out
    assert main(["--base-model", str(base), "--adapters", str(library), "--enable-audio", "--asr-model", "x"]) == 1
    assert "audio cannot be composed" in capsys.readouterr().err
    assert main(["--base-model", str(base), "--adapters", str(library), "--no-such"]) == 1
    assert main(["--base-model", str(base), "--adapters", str(tmp_path / "none"), "--output", str(tmp_path / "n")]) == 1
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("granite_switch", "KVHistoryPolicy", "keep=True"),
        ("granite_switch.conversation", "KVHistoryPolicy", "keep=True"),
        ("granite_switch.composer", "GraniteSwitchComposer", "granite_switch.compose"),
        ("granite_switch.composer", "granite_dense_arch", "granite_switch.compose"),
        ("granite_switch.hf", "load_model", "AutoModelForCausalLM"),
        ("granite_switch.hf", "MultiSwitch", "routes by itself"),
        ("granite_switch.hf.switch", "create_switch", "routes by itself"),
        ("granite_switch.hf.core.lora", "SwitchedLoRALinear", "the base's own linears"),
    ],
)
def test_imports_that_are_gone_say_what_to_use(module: str, name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=instead):
        getattr(import_module(module), name)


def test_imports_that_stay() -> None:
    from granite_switch import Conversation, GraniteSwitchConfig
    from granite_switch.config import GraniteSwitchConfig as FromConfig
    from granite_switch.hf import GraniteSwitchForCausalLM

    assert GraniteSwitchConfig is FromConfig is GraniteSwitchForCausalLM.config_class
    assert Conversation
    with pytest.raises(AttributeError):
        _ = import_module("granite_switch.composer").nothing


# --- its newest checkpoints --------------------------------------------------------------------------------------


def newest(config: dict) -> dict:
    count = config["num_adapters"]
    audio = {"asr_enabled": False, "asr_model_id": None, "asr_dtype": None, "asr_self_chunks": None}
    return {**config, **audio, "adapter_kinds": ["lora"] * count}


def test_kinds_that_are_all_lora_are_the_third_format(samples_of_3: dict) -> None:
    config = newest(samples_of_3)
    assert legacy.legacy_format(config) == 3
    assert legacy.format_1_config(config) == legacy.format_1_config(samples_of_3)


def test_a_classifier_is_refused_by_name(samples_of_3: dict) -> None:
    config = newest(samples_of_3)
    config["adapter_kinds"][-1] = "classifier"
    with pytest.raises(CheckpointError) as caught:
        legacy.format_1_config(config)
    assert f"{config['adapter_names'][-1]} is 'classifier': a label head" in caught.value.problems[0]
    config["adapter_kinds"] = ["lora"]
    with pytest.raises(CheckpointError, match="adapter_kinds must have"):
        legacy.format_1_config(config)


@pytest.mark.parametrize("written", [{"granite_switch_version": "0.3.1"}, {"transformers_version": "5.17.0"}])
def test_unknown_keys_are_named_with_the_release(written: dict, samples_of_3: dict) -> None:
    config = {**samples_of_3, **written, "adapter_gates": [1], "shadow_rank": 2}
    with pytest.raises(CheckpointError) as caught:
        legacy.format_1_config(config)
    assert set(caught.value.problems) == {"unknown key 'adapter_gates'", "unknown key 'shadow_rank'"}
    assert next(iter(written.values())) in caught.value.message


@pytest.fixture
def samples_of_3() -> dict:
    """config.json of the third format."""
    return {
        "model_type": "granite_switch", "num_hidden_layers": 4, "vocab_size": 320, "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_adapters": 2,
        "adapter_names": ["a", "b"], "adapter_ranks": [4, 2], "adapter_token_ids": [310, 311, 312],
        "adapter_substitute_token_ids": [5, 5, 6], "ms_code_m": 6, "switch_type": "multi", "max_lora_rank": 4,
    }  # fmt: skip


def test_a_checkpoint_with_kinds_loads(old: Callable[..., Path], tmp_path: Path) -> None:
    third = old(3)
    copy = Path(shutil.copytree(third, tmp_path / "newest"))
    config = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", adapter_kinds=["lora"] * config["num_adapters"])
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (copy, third))
    assert torch.equal(ours, theirs)
