"""A changed model is byte for byte what composing from scratch gives; other files are not touched."""

import json
import shutil
from pathlib import Path

import pytest
from artefacts import GRANITE_TEMPLATE, make_adapter, make_base
from recipes import ASSISTANT, Recipe, assert_same, contents
from tokenizers import Tokenizer

from granite_switch import compose
from granite_switch.composition.edit import add, remove, rename, update
from granite_switch.composition.extract import extract
from granite_switch.composition.verify import verify
from granite_switch.errors import SwitchError

SHARDS = ("model-00001-of-00001.safetensors", "embeddings.safetensors")


@pytest.fixture
def recipe(base: Path, pool: Path, tmp_path: Path) -> Recipe:
    entries = [{"name": name, "path": str(pool / "one" / name)} for name in ("a", "b")]
    return Recipe(base, tmp_path, entries)


@pytest.fixture
def model(recipe: Recipe) -> Path:
    return recipe.compose("model")


def inodes(model: Path) -> list[int]:
    """Inodes of the base's weight files, which change if they are rewritten."""
    return [(model / shard).stat().st_ino for shard in SHARDS]


def switch(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())["switch"]


def test_add(recipe: Recipe, model: Path, pool: Path) -> None:
    before, weights = switch(model)["adapters"], inodes(model)
    add(model, [pool / "two/c.d"])
    recipe.entries.append({"name": "c.d", "path": str(pool / "two/c.d")})
    assert_same(model, recipe.compose())
    assert switch(model)["adapters"][:2] == before
    assert inodes(model) == weights  # its token takes a spare row, which already has the right values


def test_add_when_no_row_is_left_in_reserve(recipe: Recipe, pool: Path) -> None:
    rows = switch(recipe.compose())["reserved"]
    recipe.entries += [{"name": f"old-{i}", "retired": True} for i in range(rows)]
    model = recipe.compose("model")
    assert switch(model)["reserved"] == 0
    shard, embeddings = inodes(model)
    add(model, [pool / "one/c.d"])
    recipe.entries.append({"name": "c.d", "path": str(pool / "one/c.d")})
    assert_same(model, recipe.compose())
    assert switch(model)["reserved"] == 63
    assert inodes(model)[0] == shard
    assert inodes(model)[1] != embeddings
    verify(model, deep=True)


def test_add_with_plain_sources_is_composing_with_plain_sources(base: Path, pool: Path, tmp_path: Path) -> None:
    compose(base, [pool / "one/a"], tmp_path / "model")
    add(tmp_path / "model", [pool / "one/b", pool / "one/c.d"])
    compose(base, [pool / "one/a", pool / "one/b", pool / "one/c.d"], tmp_path / "anew")
    assert_same(tmp_path / "model", tmp_path / "anew")


@pytest.mark.parametrize("name", ["a", "b"])  # a LoRA that becomes an aLoRA, and an aLoRA with another invocation
def test_update(name: str, recipe: Recipe, model: Path, pool: Path) -> None:
    update(model, [pool / "two" / name])
    recipe.entry(name)["path"] = str(pool / "two" / name)
    assert_same(model, recipe.compose())


def test_rename(recipe: Recipe, model: Path) -> None:
    weights = inodes(model)
    rename(model, "a", "x.y")
    recipe.entry("a")["name"] = "x.y"
    assert_same(model, recipe.compose())
    assert inodes(model) == weights
    assert (model / "io_configs/x.y/io.yaml").is_file()
    assert not (model / "io_configs/a").exists()


def test_remove_retires_the_slot_and_the_token(recipe: Recipe, model: Path, base: Path) -> None:
    before, weights = switch(model)["adapters"], inodes(model)
    remove(model, ["b"])
    opening = Tokenizer.from_file(str(base / "tokenizer.json")).encode(ASSISTANT, add_special_tokens=False).ids[0]
    recipe.entries[1] = {"name": "b", "retired": True, "substitute_token_id": opening}
    assert_same(model, recipe.compose())
    assert inodes(model) == weights
    after = switch(model)["adapters"]
    assert after[0] == before[0]
    assert [after[1][key] for key in ("token", "token_id", "retired")] == ["<|b|>", before[1]["token_id"], True]


def test_a_name_that_comes_back_gets_a_token_of_its_own(recipe: Recipe, model: Path, pool: Path) -> None:
    remove(model, ["a"])
    add(model, [pool / "one/a"])
    remove(model, ["a"])
    add(model, [pool / "two/a"])
    tokens = [(record["token"], record.get("retired", False)) for record in switch(model)["adapters"]]
    assert tokens == [("<|a|>", True), ("<|b|>", False), ("<|a:2|>", True), ("<|a:3|>", False)]
    recipe.entries[0] = {"name": "a", "retired": True}
    recipe.entries += [{"name": "a", "retired": True}, {"name": "a", "path": str(pool / "two/a")}]
    assert_same(model, recipe.compose())
    verify(model, deep=True)


def test_extract_gives_pefts_files_and_composes_to_the_same_bytes(recipe: Recipe, model: Path, pool: Path) -> None:
    add(model, [pool / "two/c.d"])
    recipe.entries.append({"name": "c.d", "path": str(pool / "two/c.d")})
    for entry in recipe.entries:
        folder = extract(model, entry["name"], recipe.folder / "out" / entry["name"])
        weights = "adapter_model.safetensors"
        assert (folder / weights).read_bytes() == (Path(entry["path"]) / weights).read_bytes()
        entry["path"] = str(folder)
    assert_same(model, recipe.compose())


def test_an_extracted_adapter_that_was_changed_is_a_source_of_its_own(model: Path, pool: Path, tmp_path: Path) -> None:
    folder = extract(model, "a", tmp_path / "a")
    shutil.copy(pool / "two/a/adapter_model.safetensors", folder)
    shutil.copy(pool / "two/a/adapter_config.json", folder)
    before = switch(model)["adapters"][0]
    update(model, [folder])
    after = switch(model)["adapters"][0]
    assert after["sha256"] != before["sha256"]
    assert after["digest"] != before["digest"]


def test_output_leaves_the_model_alone(model: Path, pool: Path, tmp_path: Path) -> None:
    before = contents(model)
    add(model, [pool / "one/c.d"], output=tmp_path / "new")
    assert contents(model) == before
    add(model, [pool / "one/c.d"])
    assert_same(model, tmp_path / "new")
    with pytest.raises(SwitchError, match="already exists"):
        remove(model, ["a"], output=tmp_path / "new")
    remove(model, ["a"], output=tmp_path / "new", force=True)
    assert "a" not in verify(tmp_path / "new").names


def test_untied_heads_and_several_shards(pool: Path, tmp_path: Path) -> None:
    from artefacts import make_adapter, make_base

    base = make_base(tmp_path / "base", tied=False, max_shard_size="100KB")
    for seed, name in enumerate(("a", "b")):
        make_adapter(tmp_path / name, base, seed=seed)
    compose(base, [tmp_path / "a"], tmp_path / "model")
    nodes = {path.name: path.stat().st_ino for path in (tmp_path / "model").glob("*.safetensors")}
    add(tmp_path / "model", [tmp_path / "b"])
    compose(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "anew")
    assert_same(tmp_path / "model", tmp_path / "anew")
    written = {p.name for p in (tmp_path / "model").glob("*.safetensors") if p.stat().st_ino != nodes.get(p.name)}
    assert written == {"adapter-b.safetensors"}
    assert len(nodes) > 4


def test_files_of_ones_own_stay(model: Path, pool: Path) -> None:
    (model / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (model / "eval").mkdir()
    (model / "eval/results.csv").write_text("1,2\n")
    (model / "io_configs/a/notes.txt").write_text("mine")
    (model / "README.md").write_text("# My own card\n")
    plan = add(model, [pool / "one/c.d"])
    assert (model / ".gitattributes").is_file()
    assert (model / "eval/results.csv").read_text() == "1,2\n"
    assert (model / "io_configs/a/notes.txt").read_text() == "mine"
    assert (model / "README.md").read_text() == "# My own card\n"
    assert any("README.md" in warning for warning in plan.warnings)
    remove(model, ["a"])
    assert not (model / "io_configs/a").exists()


def test_a_model_behind_a_symlink_is_changed_where_it_stands(model: Path, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    add(tmp_path / "link", [pool / "one/c.d"])
    assert (tmp_path / "link").is_symlink()
    assert "c.d" in verify(model).names


def test_io_yaml_on_demand(recipe: Recipe, model: Path, pool: Path, base: Path) -> None:
    add(model, [pool / "one/c.d"], create_io_yaml=True)
    assert (model / "io_configs/c.d/io.yaml").read_text().split() == [
        "model:", "null", "response_format:", "null", "transformations:", "null",
    ]  # fmt: skip
    recipe.entries.append({"name": "c.d", "path": str(pool / "one/c.d")})
    recipe.compose()
    compose(base, [recipe.folder / "manifest.yaml"], recipe.folder / "anew", force=True, create_io_yaml=True)
    assert_same(model, recipe.folder / "anew")


@pytest.mark.parametrize(("change", "words"), [
    (lambda m, p: add(m, [p / "two"]), ["already has a, b", "update"]),
    (lambda m, p: update(m, [p / "two"]), ["has no adapter c.d", "--include"]),
    (lambda m, p: remove(m, ["a", "x", "y"]), ["no adapter x, y", "adapters: a, b"]),
    (lambda m, p: rename(m, "a", "b"), ["b is the name of an adapter"]),
    (lambda m, p: rename(m, "a", "u/v"), ["u/v"]),
    (lambda m, p: rename(m, "x", "y"), ["no adapter x"]),
    (lambda m, p: extract(m, "x", p / "never"), ["no adapter 'x'"]),
    (lambda m, p: add(p / "one", [p / "two"]), ["config.json"]),
    (lambda m, p: add(p / "nowhere", [p / "two"]), ["is not a local folder", "--output"]),
    (lambda m, p: add("some/model", [p / "two"]), ["is not a local folder", "--output"]),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(change, words: list[str], model: Path, pool: Path) -> None:  # type: ignore[no-untyped-def]
    before = contents(model.parent)
    with pytest.raises(SwitchError) as caught:
        change(model, pool)
    assert [word for word in words if word not in str(caught.value)] == []
    assert contents(model.parent) == before


def test_a_removed_adapters_name_is_not_given_to_another(model: Path) -> None:
    remove(model, ["a"])
    with pytest.raises(SwitchError, match="a removed adapter"):
        rename(model, "b", "a")


def test_the_hubs_cache_is_not_changed_in_place(
    model: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/models--me--m/snapshots/0123"
    shutil.copytree(model, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = contents(snapshot)
    changes = [
        lambda **out: add(snapshot, [pool / "one/c.d"], **out), lambda **out: rename(snapshot, "a", "x", **out),
        lambda **out: remove(snapshot, ["a"], **out), lambda **out: update(snapshot, [pool / "two/a"], **out),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        with pytest.raises(SwitchError, match="hub's cache") as caught:
            change()
        assert "--output" in caught.value.hint
        change(output=tmp_path / f"new-{number}")
    assert contents(snapshot) == before


def test_after_an_alora_whose_invocation_opens_a_turn(tmp_path: Path) -> None:
    """Prompts open with another token than turns; the removed adapter keeps its own substitute."""
    base = make_base(tmp_path / "base", template="{{- '<tool_call>' }}" + GRANITE_TEMPLATE)
    make_adapter(tmp_path / "adapters/a", base, invocation=ASSISTANT)
    make_adapter(tmp_path / "adapters/b", base)
    compose(base, [tmp_path / "adapters"], tmp_path / "model")
    remove(tmp_path / "model", ["a"])
    gone = switch(tmp_path / "model")["adapters"][0]
    rename(tmp_path / "model", "b", "c")
    assert switch(tmp_path / "model")["adapters"][0] == gone
    verify(tmp_path / "model", deep=True)
