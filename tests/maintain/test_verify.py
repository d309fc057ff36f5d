"""`verify` reports whatever is wrong with a model's files; `inspect` reports what is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artefacts import edit_json
from recipes import ALL, ASSISTANT
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.cli import app
from granite_switch.composition.edit import add
from granite_switch.composition.inspect import inspect, plot, strengths
from granite_switch.composition.verify import find_problems, verify
from granite_switch.errors import CheckpointError, SwitchError
from granite_switch.hf.verify import compare

SHARD, EMBEDDINGS = "model-00001-of-00001.safetensors", "embeddings.safetensors"
FILE = "adapter-citations.safetensors"


@pytest.fixture
def model(composed: Path, tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copytree(composed, tmp_path / "model"))


def edit_adapter(model: Path, **changes: object) -> None:
    """Change the record of `citations`; its slot is 2."""
    config = json.loads((model / "config.json").read_text())
    config["switch"]["adapters"][1].update(changes)
    (model / "config.json").write_text(json.dumps(config))


def edit_weights(model: Path, file: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(model / file)
    change(tensors)
    save_file(tensors, model / file, metadata={"format": "pt"})


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def unspecial(model: Path) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        if token["content"] == "<|citations|>":
            token["special"] = False
    (model / "tokenizer.json").write_text(json.dumps(data))


def first(tensors: dict[str, np.ndarray]) -> str:
    return sorted(tensors)[0]


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "a format of the future": (lambda m: edit_text(m / "config.json", '"format_version": 1', '"format_version": 2'),
                               "this release reads format 1"),
    "unknown key": (lambda m: edit_adapter(m, shape="round"), "unknown key adapters[1].shape"),
    "vocab_size": (lambda m: edit_json(m / "config.json", vocab_size=400), "vocab_size 400"),
    "rank": (lambda m: edit_adapter(m, rank=3), "config.json says [3, "),
    "targets": (
        lambda m: edit_adapter(m, targets=["model.layers.[0-1].self_attn.o_proj"]),
        "belongs to no adapter in config.json",
    ),
    "another name": (lambda m: edit_adapter(m, name="quotes"), "adapter-quotes.safetensors: model.layers.0"),
    "token": (lambda m: edit_adapter(m, token="<|quotes|>"), "<|quotes|> is None; config.json says"),
    "two of one token": (lambda m: edit_adapter(m, token_id=413), "switches to two slots"),
    "missing shard": (lambda m: (m / SHARD).unlink(), SHARD),
    "missing adapter": (lambda m: (m / FILE).unlink(), FILE),
    "cut off": (lambda m: (m / FILE).write_bytes((m / FILE).read_bytes()[:-9]), "bytes, but its header says"),
    "no safetensors": (lambda m: (m / FILE).write_bytes(b"weights"), "not a safetensors file"),
    "missing tensor": (lambda m: edit_weights(m, FILE, lambda t: t.pop(first(t))), "which does not contain it"),
    "extra tensor": (lambda m: edit_weights(m, FILE, lambda t: t.update(x=np.ones(1))), "which model.safetensors"),
    "stray file": (lambda m: shutil.copy(m / FILE, m / "adapter-old.safetensors"), "adapter-old.safetensors is not in"),
    "one file beside the index": (lambda m: shutil.copy(m / SHARD, m / "model.safetensors"), "loaders take it"),
    "total size": (lambda m: edit_text(m / "model.safetensors.index.json", '"total_size": ', '"total_size": 1'),
                   "total_size is 1"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "token not special": (unspecial, "<|citations|> is not a special token"),
    "foreign template": (lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"), "not written by compose"),
    "placed elsewhere": (lambda m: edit_text(m / "chat_template.jinja", "rsplit", "split"), "as compose writes it"),
    "old index for clients": (lambda m: edit_text(m / "adapter_index.json", "citations", "quotes"), "adapter_index"),
    "no index for clients": (lambda m: (m / "adapter_index.json").unlink(), "adapter_index.json: no such file"),
}  # fmt: skip

SPOILT_DEEP: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda m: edit_weights(m, FILE, lambda t: t[first(t)].__setitem__((0, 0), np.nan)), "1 NaN"),
    "inf in the base": (lambda m: edit_weights(m, SHARD, lambda t: t["model.norm.weight"].__setitem__(0, np.inf)),
                        "model.norm.weight: 0 NaN, 1 inf"),
    "other weights": (lambda m: edit_weights(m, FILE, lambda t: t[first(t)].__imul__(1.5)), "citations: its weights"),
    "a control token's row": (
        lambda m: edit_weights(m, EMBEDDINGS, lambda t: t["model.embed_tokens.weight"][413].fill(0)), "413 is not a"
    ),
    "a row in reserve": (
        lambda m: edit_weights(m, EMBEDDINGS, lambda t: t["model.embed_tokens.weight"][-1].fill(0)), "is not a copy of"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_every_fault_is_found(name: str, model: Path) -> None:
    spoil, words = SPOILT[name]
    spoil(model)
    problems = find_problems(model)
    assert any(words in problem for problem in problems), problems
    with pytest.raises(CheckpointError):
        verify(model)


@pytest.mark.parametrize("name", SPOILT_DEEP)
def test_every_fault_of_the_weights_is_found(name: str, model: Path) -> None:
    spoil, words = SPOILT_DEEP[name]
    spoil(model)
    assert find_problems(model) == []
    problems = find_problems(model, deep=True)
    assert any(words in problem for problem in problems), problems


def test_all_that_is_wrong_is_said_at_once(model: Path) -> None:
    for name in ("missing adapter", "token not special", "old index for clients", "foreign template"):
        SPOILT[name][0](model)
    result = CliRunner().invoke(app, ["verify", str(model)], catch_exceptions=True)
    problems = result.exception.problems  # type: ignore[union-attr]
    assert len(problems) == 4
    assert isinstance(result.exception, SwitchError)


@pytest.mark.parametrize("name", ["missing shard", "rank", "foreign template", "a format of the future"])
def test_a_spoilt_model_is_not_changed(name: str, model: Path, pool: Path) -> None:
    SPOILT[name][0](model)
    before = sorted(model.parent.iterdir())
    with pytest.raises(SwitchError) as caught:
        add(model, [pool / "one/a"])
    assert "hint: " in str(caught.value)
    assert sorted(model.parent.iterdir()) == before


def test_records_that_compose_would_not_write_are_not_changed(model: Path, pool: Path) -> None:
    edit_adapter(model, substitute_token_id=7)
    with pytest.raises(SwitchError, match="the records of citations"):
        add(model, [pool / "one/a"])


def test_against_peft(composed: Path, base: Path, adapters: Path) -> None:
    folders = {folder.name: folder for folder in adapters.iterdir()}
    results = compare(composed, folders, base)
    assert [one.name for one in results] == ["base", *folders]
    for one in results:
        assert one.within
        assert one.difference <= 1e-5 * one.largest
        assert one.effect > 0.1 or one.name == "base"
    assert all(one.within for one in compare(composed, folders))


def test_against_other_weights_differs(composed: Path, adapters: Path, pool: Path) -> None:
    results = compare(composed, {"citations": pool / "two/c.d"})
    assert [one.within for one in results] == [True, False]
    result = CliRunner().invoke(app, ["verify", str(composed), "--against", str(adapters / "citations")])
    assert result.exit_code == 0
    assert "equal" in result.stdout


def test_inspect(composed: Path) -> None:
    report = inspect(composed)
    assert [adapter.name for adapter in report.adapters] == sorted(adapter.name for adapter in report.adapters)
    one = report.adapters[0]
    assert (one.name, one.technology, one.rank, one.alpha) == ("answerability", "alora", 8, 16)
    assert set(one.target_modules) == set(ALL)
    assert one.invocation_text == ASSISTANT
    assert one.substitute == "<|start_of_role|>"
    assert one.nbytes == sum(t.nbytes for t in load_file(composed / "adapter-answerability.safetensors").values())
    assert one.parameters == one.nbytes // 4
    everything = report.nbytes + sum(adapter.nbytes for adapter in report.adapters)
    assert one.share == pytest.approx(one.nbytes / everything)
    shown = CliRunner().invoke(app, ["inspect", str(composed), "--json"])
    assert json.loads(shown.stdout) == json.loads(json.dumps(report.to_dict()))


def test_strengths_are_norms_of_the_products(composed: Path, tmp_path: Path) -> None:
    base, adapter = load_file(composed / SHARD), load_file(composed / "adapter-query_rewrite.safetensors")
    name = "model.layers.0.self_attn.q_proj_lora.query_rewrite-{}"
    product = 16 / 5 * adapter[name.format("B")] @ adapter[name.format("A")]
    expected = np.linalg.norm(product) / np.linalg.norm(base["model.layers.0.self_attn.q_proj.weight"])
    found = strengths(composed)
    row = found.modules.index("self_attn.q_proj")
    assert found.values["query_rewrite"][row, 0] == pytest.approx(expected, rel=1e-5)
    assert (found.values["citations"] > 0).sum() == 2 * 2
    plot(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SwitchError, match=r"picture\.xyz"):
        plot(found, tmp_path / "picture.xyz")
