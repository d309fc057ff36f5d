"""Models from third parties: names are not paths, links stay inside, readers see one state."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from artefacts import edit_json, make_adapter
from recipes import SOAK, Recipe, contents
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch import compose
from granite_switch.cli.serve import _check as check_serving
from granite_switch.composition.card import model_card
from granite_switch.composition.composed import read_composed
from granite_switch.composition.edit import remove, rename, update
from granite_switch.composition.extract import extract
from granite_switch.composition.inspect import inspect
from granite_switch.composition.verify import verify
from granite_switch.conversation import Conversation
from granite_switch.errors import SwitchError
from granite_switch.gguf import prepare
from granite_switch.play.engine import Model

COMMANDS: list[Callable[[Path, Path], Any]] = [
    lambda model, out: inspect(model),
    lambda model, out: verify(model),
    lambda model, out: extract(model, "b", out),
    lambda model, out: rename(model, "b", "c"),
    lambda model, out: remove(model, ["b"], output=out),
]


@pytest.fixture
def model(base: Path, pool: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    Recipe(base, tmp_path, [{"name": n, "path": str(pool / "one" / n)} for n in "ab"]).compose("place/model")
    return folder / "model"


def refused(model: Path, *words: str) -> None:
    """Every command ends in an error and leaves everything as it was."""
    before = contents(model.parent)
    for command in COMMANDS:
        with pytest.raises(SwitchError) as caught:
            command(model, model.parent / "out")
        assert [word for word in words if word not in str(caught.value)] == []
        assert contents(model.parent) == before


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "", "a b", 7, None])
def test_an_adapters_name_is_no_path(name: object, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["switch"]["adapters"][0]["name"] = name
    (model / "config.json").write_text(json.dumps(config))
    refused(model, "adapters[0].name")


@pytest.mark.parametrize(("key", "value"), [
    ("token_id", -1), ("token_id", "5"), ("token_id", 10**9), ("substitute_token_id", 10**6), ("rank", 0),
    ("rank", 2.0), ("alpha", None), ("alpha", float("nan")), ("targets", "q_proj"), ("targets", [3]),
    ("targets", ["model.layers.[0-99999999].x"]), ("targets", ["model.layers.99999999.x"]), ("technology", "dora"),
    ("rank_pattern", {"model.layers.0.self_attn.q_proj": 0}), ("retired", 1), ("colour", "red"),
])  # fmt: skip
def test_an_adapters_record_is_checked(key: str, value: object, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["switch"]["adapters"][0][key] = value
    (model / "config.json").write_text(json.dumps(config))
    refused(model)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "x/other.safetensors", "other.bin"])
def test_an_index_names_files_of_the_folder(name: str, model: Path) -> None:
    shutil.copy(model / "embeddings.safetensors", model.parent / "other.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: name if v == "embeddings.safetensors" else v for k, v in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "weight_map")


@pytest.mark.parametrize("name", ["embeddings.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_stay_inside(name: str, model: Path) -> None:
    (model / name).rename(model.parent / "elsewhere")
    (model / name).symlink_to(model.parent / "elsewhere")
    refused(model, "links outside its folder")


def test_a_base_that_links_elsewhere(base: Path, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"token": "x"}')
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    (bad / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SwitchError, match="links outside its folder"):
        compose(bad, [pool / "one/a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_cannot_write_into_the_model_cards_head(base: Path, pool: Path, tmp_path: Path) -> None:
    plan = compose(base, [pool / "one/a"], tmp_path / "out", base_name="x\nlicense: mit\n---\n")
    head = yaml.safe_load(model_card(plan.spec, plan.adapters).split("\n---\n")[0][4:])
    assert head.keys() == {"base_model", "library_name", "tags"}
    edit_json(tmp_path / "out/config.json")
    for name in ("a: b", "[x]", "'", '"', "x # y", "| a | b |", "*x", "&a", "!!python/name:os.system"):
        card = model_card(type(plan.spec)(**{**plan.spec.__dict__, "base_model": name}), plan.adapters)
        assert yaml.safe_load(card.split("\n---\n")[0][4:])["base_model"] == name.replace("|", "\\|")


@pytest.mark.slow
def test_readers_see_one_state_of_a_model_that_is_changed(model: Path) -> None:
    states = {"a", "renamed"}
    done, seen, problems = threading.Event(), [], []

    def read() -> None:
        while not done.is_set():
            try:
                report = inspect(model)
                names = {one.name for one in report.adapters}
                if len(seen) % 5 == 0:
                    verify(model, prove=False)
            except SwitchError as error:
                problems.append(str(error))
                continue
            seen.append(names)
            if len(names & states) != 1:
                problems.append(str(names))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(200):
            old, new = ("a", "renamed") if number % 2 == 0 else ("renamed", "a")
            rename(model, old, new)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert problems == []
    assert len(seen) >= 20
    assert len({frozenset(names) for names in seen}) == 2
    read_composed(model)


@pytest.mark.parametrize(("file", "key", "value"), [
    ("config.json", "vocab_size", "5"), ("config.json", "max_position_embeddings", 0),
    ("config.json", "num_attention_heads", None), ("config.json", "rms_norm_eps", "x"),
    ("config.json", "rope_parameters", {"rope_type": 7}), ("config.json", "model_type", []),
    ("generation_config.json", "eos_token_id", "</s>"), ("tokenizer_config.json", "bos_token", 4),
])  # fmt: skip
def test_what_runs_a_model_names_the_file_and_the_key(file: str, key: str, value: object, model: Path) -> None:
    (model / "generation_config.json").touch()
    data = json.loads((model / file).read_text() or "{}")
    (model / file).write_text(json.dumps({**data, key: value}))
    readers: list[Callable[[Path], Any]] = [prepare, Conversation, Model.read, lambda m: check_serving(str(m), [])]
    errors = []
    for reader in readers:
        try:
            reader(model)
        except SwitchError as error:
            errors.append(str(error))
    assert errors
    assert [error for error in errors if file not in error or key not in error] == []


def test_serving_needs_no_options(model: Path) -> None:
    check_serving(str(model), [])
    with pytest.raises(SwitchError, match="--chat-template"):
        check_serving(str(model), ["--port", "1", "--chat-template=x"])


def state_loaded(model: Path) -> tuple[Any, ...]:
    """What tells two states of a model apart: alpha and a weight of each adapter."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    weights = dict(loaded.named_parameters())
    spec = loaded.config.switch_spec
    return tuple(
        (a.name, a.alpha, float(weights[f"{a.targets[0]}_lora.{a.name}-A"].detach().sum())) for a in spec.adapters
    )


def test_transformers_loads_one_state_of_a_model_that_is_changed(model: Path, base: Path, tmp_path: Path) -> None:
    for number, version in enumerate(("v1", "v2"), 1):
        for name in "ab":
            make_adapter(tmp_path / version / name, base, rank=2, seed=number, alpha=4 * number)
    changes = [
        *(lambda version=version: update(model, [tmp_path / version]) for version in ("v1", "v2")),
        lambda: rename(model, "a", "c"), lambda: rename(model, "c", "a"),
    ]  # fmt: skip
    states = set()
    for change in changes:
        change()
        states.add(state_loaded(model))
    assert len(states) == 3
    done, problems = threading.Event(), []

    def work() -> None:
        while not done.is_set():
            for change in changes:
                change()

    worker = threading.Thread(target=work)
    worker.start()
    seen: list[tuple[Any, ...]] = []
    try:
        while len(seen) < (200 if SOAK else 12):
            seen.append(state_loaded(model))
    except Exception as error:
        problems.append(error)
    finally:
        done.set()
        worker.join()
    assert problems == []
    assert [state for state in seen if state not in states] == []
