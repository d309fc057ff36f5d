"""Sources of adapters: hub ids with paths and commits, caches, libraries in either layout, links, manifests."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from artefacts import edit_json

from granite_switch import compose
from granite_switch.cli import main
from granite_switch.composition.compose import prepare
from granite_switch.composition.hub import HubRef, parse_ref, snapshot_of
from granite_switch.composition.sources import Selection, discover, scan
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import AdapterError, SwitchError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A stand-in for the hub and its cache: repositories are folders, and fetches are recorded."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.fetched, self.down = cache, [], False

    def add(self, repo: str, **folders: Path) -> Path:
        """Add a repository with folders under paths (`__` for `/`, `root` for the whole repository)."""
        place = self.cache / f"models--{repo.replace('/', '--')}"
        for path, folder in folders.items():
            target = place / "snapshots" / COMMIT / ("" if path == "root" else path.replace("__", "/"))
            shutil.copytree(folder, target, dirs_exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(COMMIT)
        return place / "snapshots" / COMMIT

    def files(self, repo: str) -> list[str]:
        folder = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub

    stand_in = Hub(tmp_path / "hub")
    original = huggingface_hub.snapshot_download

    def model_info(_: object, repo: str, revision: str | None = None) -> object:
        if stand_in.down:
            raise ConnectionError("no route to the hub")
        files = [type("F", (), {"rfilename": name}) for name in stand_in.files(repo)]
        return type("Info", (), {"siblings": files})

    def download(repo: str, **options: object) -> str:
        stand_in.fetched.append((repo, options["revision"], options["allow_patterns"]))
        options["local_files_only"] = True
        return original(repo, cache_dir=str(stand_in.cache), **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return stand_in


def names(base: Path, *sources: object, **options: object) -> tuple[str, ...]:
    return prepare(base, list(sources), **options).spec.names


def test_references() -> None:
    assert parse_ref("me/lora") == HubRef("me/lora")
    assert parse_ref("me/lib/a/b@v1") == HubRef("me/lib", "a/b", "v1")
    assert parse_ref("me/lora@refs/pr/1", "v0") == HubRef("me/lora", "", "refs/pr/1")
    assert parse_ref("me/lora", "v0") == HubRef("me/lora", "", "v0")
    for text in ("me/lora", "me/lib/a/b", "me/lib/a/b@v1", "me/lora@refs/pr/1"):
        assert str(parse_ref(text)) == text


def test_a_subfolder_of_a_repository(base: Path, adapters: Path, hub: Hub) -> None:
    hub.add("me/things", loras__mine=adapters / "citations", other=adapters / "guardian-core")
    plan = prepare(base, ["me/things/loras/mine"])
    assert plan.spec.names == ("mine",)
    assert plan.spec.adapters[0].source == f"me/things/loras/mine@{COMMIT}"
    ((repo, _, patterns),) = hub.fetched
    assert repo == "me/things"
    assert all(pattern.startswith("loras/mine/") for pattern in patterns)


def test_a_subfolder_in_a_manifest(base: Path, adapters: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add("me/things", a__b=adapters / "citations")
    shutil.copytree(adapters, tmp_path / "local")
    manifest = tmp_path / "m.yaml"
    manifest.write_text(
        f"- {{path: me/things, subfolder: a/b, name: one, revision: {COMMIT}}}\n"
        f"- {{path: me/things@{COMMIT}, subfolder: a/b, name: two}}\n"
        "- {path: local, subfolder: guardian-core}\n"
    )
    assert names(base, manifest) == ("one", "two", "guardian-core")
    assert {revision for _, revision, _ in hub.fetched} == {COMMIT}


def test_revisions_of_adapters_are_their_own(base: Path, adapters: Path, hub: Hub) -> None:
    hub.add("org/base", root=base)
    hub.add("me/lora", root=adapters / "citations")
    plan = prepare("org/base", [f"me/lora@{COMMIT}"], adapter_revision="unused")
    assert plan.spec.base_commit == COMMIT
    assert plan.spec.base_model == "org/base"
    assert [revision for _, revision, _ in hub.fetched] == [None, COMMIT]


def test_a_flat_library_on_the_hub_fetches_what_is_wanted(base: Path, adapters: Path, hub: Hub) -> None:
    hub.add("me/lib", citations=adapters / "citations", rewrite=adapters / "query_rewrite")
    assert names(base, "me/lib") == ("citations", "rewrite")
    hub.fetched.clear()
    assert names(base, "me/lib", include=["cit*"]) == ("citations",)
    assert all(pattern.startswith("citations/") for pattern in hub.fetched[0][2])
    hub.fetched.clear()
    assert [found.name for found in scan(["me/lib"])] == ["citations", "rewrite"]
    assert not hub.fetched


@pytest.mark.parametrize("layout", ["{name}/{base}/{kind}", "{name}/{kind}/{base}"])
def test_libraries_of_both_layouts(layout: str, base: Path, adapters: Path, tmp_path: Path) -> None:
    library = tmp_path / "lib"
    for name, target, kind, source in [
        ("qr", "base", "alora", "query_rewrite"), ("qr", "base", "lora", "citations"),
        ("cit", "base", "lora", "citations"), ("far", "big", "lora", "citations"),
    ]:  # fmt: skip
        shutil.copytree(adapters / source, library / layout.format(name=name, base=target, kind=kind))
    plan = prepare(base, [library])
    assert [(a.name, a.technology) for a in plan.spec.adapters] == [("cit", "lora"), ("qr", "alora")]
    left = dict(note.split(": left out: ") for note in plan.notes)
    assert "big" in left["lib/" + layout.format(name="far", base="big", kind="lora")]
    assert "aLoRA is preferred" in left["lib/" + layout.format(name="qr", base="base", kind="lora")]
    assert names(base, library, technology="lora") == ("cit", "qr")
    assert names(base, library / layout.format(name="cit", base="base", kind="lora")) == ("cit",)
    assert names(base, library / "qr") == ("qr",)


def test_snapshots_are_named_after_their_repository(base: Path, adapters: Path, hub: Hub, tmp_path: Path) -> None:
    snapshot = hub.add("me/my-lora", root=adapters / "citations", deeper__inside=adapters / "guardian-core")
    based = hub.add("org/granite-tiny", root=base)
    plan = prepare(based, [snapshot])
    assert plan.spec.names == ("my-lora",)
    assert plan.spec.adapters[0].source == f"me/my-lora@{COMMIT}"
    assert (plan.spec.base_model, plan.spec.base_commit) == ("org/granite-tiny", COMMIT)
    inside = prepare(base, [snapshot / "deeper" / "inside"]).spec.adapters[0]
    assert (inside.name, inside.source) == ("inside", f"me/my-lora/deeper/inside@{COMMIT}")
    assert snapshot_of(tmp_path) is None
    composed = compose(based, [snapshot], tmp_path / "out")
    assert SwitchSpec.from_dict(json.loads((tmp_path / "out/config.json").read_text())["switch"]) == composed.spec


def test_a_source_that_is_neither_file_nor_folder_is_an_error(base: Path) -> None:
    with pytest.raises(SwitchError, match="/dev/null: contains no adapter"):
        prepare(base, ["/dev/null"])


def test_links_are_named_after_themselves(base: Path, adapters: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").symlink_to(adapters / "citations")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(adapters / "citations")
    assert names(base, tmp_path / "mine") == ("mine",)
    assert names(base, tmp_path / "all") == ("linked",)
    monkeypatch.chdir(tmp_path / "mine")
    assert names(base, ".") == (Path.cwd().name,)


def test_the_cache_stands_in_and_says_so(base: Path, adapters: Path, hub: Hub, caplog) -> None:
    hub.add("me/lora", root=adapters / "citations")
    hub.down = True
    with caplog.at_level(logging.WARNING, "granite_switch"):
        assert names(base, "me/lora") == ("lora",)
    assert f"commit {COMMIT}" in caplog.text
    assert "no route to the hub" in caplog.text
    with pytest.raises(AdapterError, match="me/other: is not a local folder, and the hub says: no route"):
        prepare(base, ["me/other"])


def test_the_older_projects_manifest(base: Path, adapters: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text(
        f"mine: {{path: {adapters / 'citations'}, type: lora}}\n"
        f"also: {{path: {adapters / 'query_rewrite'}, type: lora}}\n"
    )
    plan = prepare(base, [manifest])
    assert plan.spec.names == ("mine", "also")
    assert plan.warnings == ("also: m.yaml calls it lora; its adapter_config.json makes it alora",)
    assert names(base, manifest, include=["al*"]) == ("also",)


def test_what_is_left_out_is_listed(base: Path, adapters: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    library = tmp_path / "lib"
    shutil.copytree(adapters / "citations", library / "cit" / "other" / "lora")
    shutil.copytree(adapters / "citations", library / "plain")
    shutil.copytree(adapters / "citations", library / "a" / "b")
    monkeypatch.setattr("sys.argv", ["granite-switch", "compose", str(base), "-a", str(library), "--list", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = {row["source"]: row["left out"] for row in json.loads(capsys.readouterr().out)}
    assert "'other'" in rows["lib/cit/other/lora"]
    assert "deeper" in rows["lib/a/b"]
    assert rows["lib/plain"] == ""


def test_json_holds_every_problem(base: Path, adapters: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from safetensors.torch import load_file, save_file

    bad = Path(shutil.copytree(adapters / "hallucination_detection", tmp_path / "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    save_file({n: t[..., :-1].contiguous() for n, t in tensors.items()}, bad / "adapter_model.safetensors")
    command = ["granite-switch", "compose", str(base), "-a", str(bad), "-o", str(tmp_path / "o"), "--json"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["problems"]) == len(tensors) // 2  # every A
    assert "more (--json shows all)" in err
    assert err.count("\n") < 16


def test_a_minimal_io_yaml_is_completed(base: Path, adapters: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapters / "citations", tmp_path / "citations"))
    (folder / "io.yaml").write_text("name: citations")
    plan = compose(base, [folder], tmp_path / "out")
    text = (tmp_path / "out/io_configs/citations/io.yaml").read_text()
    assert text == "name: citations\nmodel: null\nresponse_format: null\ntransformations: null\n"
    assert "io.yaml lacks model" in plan.notes[0]
    (folder / "io.yaml").write_text("[1, 2]")
    with pytest.raises(SwitchError, match=r"io\.yaml"):
        prepare(base, [folder])


def test_an_invocation_string_makes_an_alora(adapters: Path) -> None:
    edit = adapters / "citations" / "adapter_config.json"
    before = edit.read_text()
    edit_json(edit, invocation_string="<rewrite>")
    try:
        technologies = discover([str(adapters)], Selection("base", technology="alora")).found
        assert "citations" in [found.name for found in technologies]
    finally:
        edit.write_text(before)
