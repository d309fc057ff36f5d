"""`granite-switch upgrade` writes the same model in format 1."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.cli import app
from granite_switch.composition.upgrade import upgrade
from granite_switch.composition.verify import verify
from granite_switch.core import legacy
from granite_switch.core.checkpoint import Checkpoint
from granite_switch.errors import CheckpointError, SwitchError

MESSAGES = [{"role": "user", "content": "Where does Anna live?"}]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_is_what_compose_makes(version: int, old: Callable[..., Path], composed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    calls: list[tuple[int, int]] = []
    plan = upgrade(old(version), new, progress=lambda *call: calls.append(call))
    assert sum(count for count, _ in calls) == plan.nbytes
    assert {total for _, total in calls} == {plan.nbytes}
    verify(new, deep=True)
    made, fresh = Checkpoint(new), Checkpoint(composed)
    assert made.tensors.keys() == fresh.tensors.keys()
    spec = AutoModelForCausalLM.from_pretrained(composed).config.switch_spec
    for now, want in zip(plan.spec.adapters, spec.adapters, strict=True):
        for field in ("name", "technology", "token", "token_id", "substitute_token_id", "rank", "targets"):
            assert getattr(now, field) == getattr(want, field), field
        assert now.invocation_tokens == want.invocation_tokens
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (new, composed)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (new, composed)]
    for name in (None, *spec.names):
        ids = [
            t.apply_chat_template(MESSAGES, adapter_name=name, add_generation_prompt=True, return_tensors="pt")
            for t in tokenizers
        ]
        assert ids[0]["input_ids"].tolist() == ids[1]["input_ids"].tolist()
        with torch.no_grad():
            logits = [model(ids[0]["input_ids"]).logits for model in models]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_shards_stay_and_nothing_changes_from_run_to_run(old: Callable[..., Path], tmp_path: Path) -> None:
    source = old(3, shards=3, dtype=torch.bfloat16, reset=True)
    for name in ("one", "two"):
        upgrade(source, tmp_path / name)
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert {path.name for path in source.glob("*.safetensors")} < {path.name for path in files}
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert {tensor.dtype for tensor in Checkpoint(tmp_path / "one").tensors.values()} == {"BF16"}
    assert "base_reset" not in (tmp_path / "one" / "tokenizer_config.json").read_text()


def test_command(old: Callable[..., Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    dry = CliRunner().invoke(app, ["upgrade", str(old(2)), str(new), "--dry-run"])
    assert dry.exit_code == 0
    assert "would be written" in dry.output
    assert not new.exists()
    assert CliRunner().invoke(app, ["upgrade", str(old(2)), str(new)]).exit_code == 0
    again = CliRunner().invoke(app, ["upgrade", str(old(2)), str(new)])
    assert isinstance(again.exception, SwitchError)
    shown = CliRunner().invoke(app, ["inspect", str(old(2))])
    assert "legacy format 2" in shown.output
    assert legacy.UPGRADE in shown.output


def test_nothing_is_left_behind(old: Callable[..., Path], tmp_path: Path) -> None:
    broken = _copy(old(2), tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match="does not say what turns on answerability, citations, guardian-core"):
        upgrade(broken, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_template_and_config_must_agree(old: Callable[..., Path], tmp_path: Path) -> None:
    broken = _copy(old(2), tmp_path / "broken")
    edit_json(broken / "config.json", adapter_substitute_token_ids=[2, 7, 2])
    with pytest.raises(CheckpointError, match="citations: token 7 in the old checkpoint, 2 by its template"):
        upgrade(broken, tmp_path / "new")


def test_format_1_is_not_a_legacy_format(composed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint in a legacy format"):
        upgrade(composed, tmp_path / "new")


WRONG = {
    "a key of the future": ({"adapter_moods": ["calm"], "hiding_decay": 3}, "adapter_moods[\\s\\S]*hiding_decay"),
    "experts": ({"num_local_experts": 8}, "8 experts"),
    "another kind of adapter": ({"dual_stream": True, "cross_stream_rank": 4}, "dual_stream"),
    "no positions": ({"position_embedding_type": "nope"}, "'nope'"),
    "other layers": ({"layer_types": ["mamba", "attention"]}, "mamba"),
    "an unknown target": ({"lora_target_modules": ["router"]}, "'router'"),
    "more substitutes than tokens": (
        {"switch_type": "multi", "adapter_substitute_token_ids": [0, 0, 0, 0]},
        "has 4 entries",
    ),
    "too few ranks": ({"adapter_ranks": [8]}, "adapter_ranks must have 3 entries"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_says_why(what: str, old: Callable[..., Path], tmp_path: Path) -> None:
    changes, message = WRONG[what]
    broken = _copy(old(2), tmp_path / "broken")
    edit_json(broken / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(broken)
    assert "pip install --upgrade granite-switch" in str(caught.value)


def test_unknown_tensors_are_listed(old: Callable[..., Path], tmp_path: Path) -> None:
    broken = _copy(old(2), tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data.replace(b"model.norm.weight", b"model.gnom.weight"))
    for read in (legacy.read, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model\.gnom\.weight"):
            read(broken)


def test_a_format_of_the_future_names_what_it_needs(composed: Path, tmp_path: Path) -> None:
    newer = _copy(composed, tmp_path / "newer")
    switch = json.loads((newer / "config.json").read_text())["switch"]
    edit_json(newer / "config.json", switch={**switch, "format_version": 2})
    with pytest.raises(CheckpointError, match="format 2; this release reads format 1") as caught:
        AutoModelForCausalLM.from_pretrained(newer)
    assert "pip install --upgrade granite-switch" in str(caught.value)


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
