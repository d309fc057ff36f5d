"""Usability of the commands: first steps, examples, completion, quiet, JSON, colours, bars, library noise."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from artefacts import ROOT
from typer.testing import CliRunner

from granite_switch.cli import app
from granite_switch.cli.command import EXAMPLES

sys.path.insert(0, str(ROOT / "tests" / "maintain"))

from hub import Hub, hub as running_hub  # isort: skip

runner = CliRunner()


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
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def on_terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit code, and what a terminal of 150 columns shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    calm = ("NO_COLOR", "FORCE_COLOR", "HF_HUB_DISABLE_PROGRESS_BARS", "COLUMNS", "TERM")
    own = {key: value for key, value in os.environ.items() if key not in calm} | {"TERM": "xterm-256color"}
    line = [sys.executable, "-m", "granite_switch.cli", *map(str, arguments)]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=own | environment)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # what the last read of a terminal gives that nobody writes to any more
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return process.wait(300), shown.decode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def hub_of(server: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


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


@pytest.mark.parametrize(
    ("shell", "file", "tell"),
    [
        ("bash", ".bash_completions/granite-switch.sh", {"COMP_WORDS": "x ver", "COMP_CWORD": "1"}),
        ("zsh", ".zfunc/_granite-switch", {"_TYPER_COMPLETE_ARGS": "x ver"}),
        (
            "fish",
            ".config/fish/completions/granite-switch.fish",
            {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": "x ver"},
        ),
    ],
)
def test_completion(shell: str, file: str, tell: dict[str, str], tmp_path: Path) -> None:
    """What is installed into the shell's own files, and what the program answers when it calls it."""

    def ours(*words: str, **more: str) -> str:
        script = "import sys; sys.argv[0] = 'granite-switch'; from granite_switch.cli import main; main()"
        own = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", **more}
        return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=own).stdout

    assert "completion installed" in ours("--install-completion", shell)
    installed = (tmp_path / file).read_text()
    assert f"_GRANITE_SWITCH_COMPLETE=complete_{shell}" in installed
    assert installed.strip() == ours("--show-completion", shell).strip()
    offered = ours(**tell, _GRANITE_SWITCH_COMPLETE=f"complete_{shell}")
    assert "verify" in offered
    assert "rename" not in offered


def test_completion_in_bash(tmp_path: Path) -> None:
    """bash's own call of the function that is installed, with the command on the path."""
    command = tmp_path / "granite-switch"
    script = "import sys; sys.argv[0] = 'granite-switch'; from granite_switch.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}" "$@"\n')
    command.chmod(0o755)
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    own["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    lines = 'eval "$(granite-switch --show-completion bash)"; COMP_WORDS=(granite-switch ver); COMP_CWORD=1'
    lines += "; _granite_switch_completion granite-switch ver granite-switch"
    lines += '; echo "${COMPREPLY[@]}"; complete -p granite-switch'
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, env=own)
    offered, registered = done.stdout.splitlines()
    assert offered == "verify"
    assert registered.endswith("-F _granite_switch_completion granite-switch")


def test_compose_names_the_folder_after_the_base(base: Path, adapters: Path, tmp_path: Path) -> None:
    done = run("compose", base, "--adapters", adapters / "citations", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{base.name}-switch" / "config.json").is_file()


def test_every_command_that_prints_a_table_has_json() -> None:
    without = {path[-1] for path, command in COMMANDS.items() if not any("--json" in p.opts for p in command.params)}
    assert without == {"gguf", "extract", "push", "serve", "play"}


def test_json_of_changes(composed: Path, adapters: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(composed, tmp_path / "model"))
    for words in (
        ("update", model, adapters / "citations"),
        ("remove", model, "citations"),
        ("add", model, adapters / "citations"),
        ("rename", model, "citations", "sources"),
    ):
        told = json.loads(runner.invoke(app, [*map(str, words), "--json"]).stdout)
        assert told["switch"] == json.loads((model / "config.json").read_text())["switch"], words
    assert "sources" in json.loads(runner.invoke(app, ["verify", str(model), "--json"]).stdout)["adapters"]


def test_json_of_check(composed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = import_module("granite_switch.vllm.check")
    monkeypatch.setattr(check, "find_spec", lambda _: True)
    monkeypatch.setattr(check, "run", lambda *_: [check.Row("eager", "base", 3, 0, 0.2, 0.0, "float32")])
    told = runner.invoke(app, ["check", str(composed), "--json"])
    assert (told.exit_code, [row["agrees"] for row in json.loads(told.stdout)]) == (1, [False])


@pytest.mark.skipif(bool((found := find_spec("vllm")) and found.origin), reason="vLLM is here")  # tests/vllm has none
@pytest.mark.parametrize("command", ["check", "serve"])
def test_without_vllm_it_says_what_to_install(command: str, composed: Path) -> None:
    done = run(command, composed)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: not installed: vllm\nhint: pip install 'granite-switch[vllm]'\n"


def test_quiet_leaves_errors_and_what_was_asked_for(
    composed: Path, base: Path, adapters: Path, tmp_path: Path, hub: Hub
) -> None:
    model = shutil.copytree(composed, tmp_path / "model")
    done = run("rename", model, "citations", "sources", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    failed = run("remove", composed, "nobody", "--quiet")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error:")
    for words in (("inspect", composed), ("compose", base, "--adapters", adapters, "--list")):
        assert "guardian-core" in run(*words, "--quiet").stdout, words
    code, shown = on_terminal("push", composed, "me/switch", "--quiet", **hub_of(hub))
    assert (code, shown) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("verify", "--help"),
        ("compose",),
        ("inspect", "/no/such/folder"),
        pytest.param(
            ("generate", "MODEL", "-m", "Where?", "-a", "citations", "--trace", "--max-new-tokens", "2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["help", "a command's help", "usage", "error", "trace"],
)
def test_colours_obey_no_color(words: tuple[str, ...], composed: Path) -> None:
    line = [composed if word == "MODEL" else word for word in words]
    code, shown = on_terminal(*line)
    assert COLOUR.search(shown)
    again, plain = on_terminal(*line, NO_COLOR="1")
    assert code == again
    assert plain.strip()
    assert not COLOUR.search(plain)


@pytest.mark.slow
def test_a_bar_has_a_rate_and_what_is_left_and_needs_a_terminal(base: Path, adapters: Path, tmp_path: Path) -> None:
    line = ("compose", base, "--adapters", adapters / "citations", "--output", tmp_path / "o", "--force")
    _, shown = on_terminal(*line)
    for part in ("composing", "B/s", "0:00:0"):
        assert part in shown
    assert COLOUR.search(shown)
    assert not COLOUR.search(on_terminal(*line, NO_COLOR="1")[1])
    assert run(*line, FORCE_COLOR="1").stderr == ""


@pytest.mark.slow
def test_bars_of_the_hub_need_a_terminal(composed: Path, base: Path, adapters: Path, tmp_path: Path, hub: Hub) -> None:
    for name, folder in (("me/base", base), ("me/citations", adapters / "citations")):
        hub.repos[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    fetch = ("compose", "me/base", "--adapters", "me/citations", "--output", tmp_path / "o", "--force")
    upload = ("push", composed, "me/switch")
    for line, parts in ((upload, ("model-00001-of-00001.safetensors", "B/s")), (fetch, ("Fetching", "Download"))):
        _, shown = on_terminal(*line, **hub_of(hub), HF_HOME=str(tmp_path / "a"))
        for part in parts:
            assert part in shown
        own = hub_of(hub) | {"HF_HOME": str(tmp_path / "b"), "FORCE_COLOR": "1", "HF_HUB_DISABLE_PROGRESS_BARS": ""}
        done = run(*line, **own)
        assert done.returncode == 0
        assert "%" not in done.stderr


@pytest.mark.slow
def test_libraries_are_not_heard(base: Path, composed: Path, adapters: Path) -> None:
    for words in (
        ("generate", composed, "-m", "Where?", "--max-new-tokens", 2),
        ("verify", composed, "--against", adapters, "--against", base),
    ):
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = [sys.executable, "-m", "granite_switch.cli", "play", str(composed), "--port", port]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background of a shell ignore it
    with subprocess.Popen(line, **pipes, preexec_fn=heed) as play:
        try:
            assert play.stdout
            assert play.stdout.readline() == f"open http://127.0.0.1:{port}/ (Ctrl-C stops the server)\n"
            play.send_signal(signal.SIGINT)
            assert play.communicate(timeout=60)[1] == ""
        finally:
            play.kill()
