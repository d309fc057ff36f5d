"""The commands, one after the other, and a model that transformers saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import contents
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import granite_switch
import granite_switch.hf
from granite_switch.cli import app
from granite_switch.core.checkpoint import Checkpoint


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_the_commands(base: Path, pool: Path, tmp_path: Path) -> None:
    model, new = tmp_path / "model", tmp_path / "new"
    run("compose", base, "--adapters", pool / "one/a", "--output", model)
    assert "<|b|> = " in run("add", model, pool / "one/b", "--create-io-yaml")
    run("update", model, pool / "two", "--include", "b", "--output", new)
    run("rename", new, "b", "better")
    assert "removed" in run("remove", new, "a")
    run("extract", new, "better", "--output", tmp_path / "out/better")
    assert run("verify", new, "--deep", "--against", tmp_path / "out/better").count("equal") == 2
    report = json.loads(run("inspect", new, "--json"))
    assert [one["name"] for one in report["adapters"]] == ["better"]
    assert report["retired"] == ["a"]
    assert "removed adapters, whose slots are not reused: a" in run("inspect", new, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
    assert granite_switch.verify(model).names == ("a", "b")


def test_legacy_formats_and_gguf_are_told_apart(composed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run("export", "gguf", composed, "--output", tmp_path / "model.gguf", "--pre", "gpt-2")
    shown = json.loads(run("inspect", tmp_path / "model.gguf", "--json"))
    assert [one["name"] for one in shown["adapters"]] == list(granite_switch.verify(composed).names)
    assert "citations" in run("inspect", tmp_path / "model.gguf")
    old = Path(__file__).parents[3] / "shared/data/legacy/g2"
    if old.is_dir():
        assert "legacy format 2" in run("inspect", old)


@pytest.fixture
def saved(composed: Path, tmp_path: Path) -> tuple[Any, Path]:
    model = AutoModelForCausalLM.from_pretrained(composed)
    AutoTokenizer.from_pretrained(composed).save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_what_transformers_saved_is_maintained_alike(saved: tuple[Any, Path], composed: Path, pool: Path) -> None:
    model, folder = saved
    model.save_pretrained(folder)
    assert granite_switch.verify(folder, deep=True).names == granite_switch.verify(composed).names
    granite_switch.add(folder, [pool / "one/a"])
    granite_switch.remove(folder, ["citations"])
    assert granite_switch.verify(folder, deep=True).names[-1] == "a"
    granite_switch.extract(folder, "answerability", folder.parent / "answerability")
    for name in ("adapter-answerability.safetensors", "adapter-query_rewrite.safetensors"):
        assert contents(folder)[name] == contents(composed)[name]


def test_an_adapter_that_was_trained_further_has_a_record_of_its_own(saved: tuple[Any, Path], composed: Path) -> None:
    model, folder = saved
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "citations" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    before, after = granite_switch.verify(composed), granite_switch.verify(folder, deep=True)
    for name in before.names:
        changed = name == "citations"
        assert (before.adapter(name).digest != after.adapter(name).digest) == changed
        assert (after.adapter(name).sha256 == "") == changed
    assert Checkpoint(folder).nbytes == Checkpoint(composed).nbytes
