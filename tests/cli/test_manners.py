"""Usability of the commands: first steps, examples, completion, quiet, JSON, colours, bars, library noise."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main
from artefacts import make_adapter
from rich.console import Console
from typer.testing import CliRunner

from granite_switch.cli import app
from granite_switch.cli.command import EXAMPLES

runner = CliRunner()
console = import_module("granite_switch.cli.console")


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "granite_switch.cli", *map(str, arguments)]
    own = {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=own, timeout=300, check=False)


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command, with the words that call it."""
    children = getattr(command, "commands", None)
    if not children:
        yield path, command
        return
    for name, child in children.items():
        yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(typer.main.get_command(app)))


def test_alone_it_says_what_to_do_first() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("compose BASE", "generate MODEL", "--help"):
        assert f"granite-switch {command}" in done.stdout or command in done.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_that_parses(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    words = shlex.split(EXAMPLES[path[-1]])
    assert tuple(words[: len(path)]) == path
    shown = runner.invoke(app, [*path, "--help"]).stdout
    assert "Example: granite-switch" in shown
    with COMMANDS[path].make_context(path[-1], words[len(path) :]):
        pass


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    switch = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = run("--show-completion", shell, **switch)
    assert shown.returncode == 0
    assert "_COMPLETE" in shown.stdout
    tell = {"bash": {"COMP_WORDS": "x ver", "COMP_CWORD": "1"}}.get(shell, {"_TYPER_COMPLETE_ARGS": "x ver"})
    tell |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_WORD_TO_COMPLETE": "ver"}
    script = "import sys; sys.argv[0] = 'granite-switch'; from granite_switch.cli import main; main()"
    own = {**os.environ, **tell, "_GRANITE_SWITCH_COMPLETE": f"complete_{shell}"}
    offered = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=own, check=False)
    assert "verify" in offered.stdout
    assert "rename" not in offered.stdout


def test_compose_names_the_folder_after_the_base(base: Path, adapters: Path, tmp_path: Path) -> None:
    done = run("compose", base, "--adapters", adapters / "citations", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{base.name}-switch" / "config.json").is_file()


def test_quiet_and_json_with_every_table(composed: Path, adapters: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    changes = {
        "compose": ("compose", tmp_path / "base", "--adapters", adapters / "citations", "--dry-run"),
        "add": ("add", model, adapters / "citations", "--output", tmp_path / "o", "--force"),
        "update": ("update", model, adapters / "citations", "--output", tmp_path / "o", "--force"),
        "remove": ("remove", model, "citations", "--output", tmp_path / "o", "--force"),
        "rename": ("rename", model, "citations", "sources", "--output", tmp_path / "o", "--force"),
    }
    shutil.copytree(composed, model)
    for name, words in changes.items():
        if name in ("compose", "add"):
            continue  # compose's are in its own tests; an adapter cannot be added twice
        told = runner.invoke(app, [*map(str, words), "--json"])
        assert json.loads(told.stdout)["switch"]["adapters"], name
    checked = json.loads(runner.invoke(app, ["verify", str(model), "--json"]).stdout)
    assert "citations" in checked["adapters"]
    done = run(*changes["remove"], "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    failed = run("remove", model, "nobody", "--quiet")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error:")


def test_no_color(composed: Path) -> None:
    shown = {name: run("inspect", composed, FORCE_COLOR="1", **more).stdout for name, more in COLOURS.items()}
    assert "\x1b[" in shown["colour"]
    assert "\x1b[" in shown["none"] or shown["none"]


COLOURS: dict[str, dict[str, str]] = {"colour": {}, "none": {"NO_COLOR": "1"}}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_has_a_rate_and_what_is_left_and_needs_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=stream, force_terminal=terminal, width=120))
    with console.progress("composing", 10_000_000) as advance:
        for _ in range(6):
            advance(1_000_000)
            time.sleep(0.15)
    assert ("composing" in stream.getvalue()) == terminal
    assert ("B/s" in stream.getvalue()) == terminal
    assert ("0:00:0" in stream.getvalue()) == terminal


@pytest.mark.slow
def test_libraries_are_not_heard(base: Path, composed: Path, adapters: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", base)
    for words in (
        ("generate", composed, "-m", "Where?", "--max-new-tokens", 2),
        ("verify", composed, "--against", adapters, "--against", base),
    ):
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
