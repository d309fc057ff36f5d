"""The commands as a user types them: exit codes, streams, no traceback, quick to start."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from granite_switch.cli import app
from granite_switch.cli.generate import read_document
from granite_switch.errors import SwitchError

runner = CliRunner()


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "granite_switch.cli", *map(str, arguments)], capture_output=True, text=True
    )


def test_starts_without_heavy_imports() -> None:
    code = (
        "import sys; {};"
        "heavy = {{'torch', 'transformers', 'vllm', 'tokenizers', 'jinja2', 'numpy', 'huggingface_hub'}};"
        "heavy |= {{'pydantic', 'regex', 'yaml', 'filelock'}};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for statement in ("import granite_switch", "from granite_switch.cli import app"):
        run = subprocess.run([sys.executable, "-c", code.format(statement)], capture_output=True, text=True)
        assert run.stdout.strip() == "[]", run.stderr


def test_compose_writes_and_shows(base: Path, adapters: Path, tmp_path: Path) -> None:
    run = command(
        "compose", base, "--adapters", adapters / "citations", adapters / "guardian-core", "-o", tmp_path / "o"
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "citations" in run.stdout
    assert "guardian-core" in run.stdout
    assert (tmp_path / "o" / "adapter-guardian-core.safetensors").exists()


def test_dry_run_and_list_write_nothing(base: Path, adapters: Path, tmp_path: Path) -> None:
    run = command("compose", base, "--adapters", adapters, "--output", tmp_path / "o", "--dry-run")
    assert run.returncode == 0
    assert "would be written" in run.stdout
    run = command("compose", base, "--adapters", adapters, "--list")
    assert run.returncode == 0
    assert run.stdout.count("citations") >= 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_error(base: Path, tmp_path: Path) -> None:
    run = command("compose", base, "--adapters", tmp_path / "nowhere", "--output", tmp_path / "o")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    run = command("compose", base)
    assert run.returncode == 2


def test_generate(composed: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The river ends in the sea.")
    arguments = ["generate", str(composed), "-m", "Where?", "--max-new-tokens", "4"]
    base = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    named = runner.invoke(
        app,
        [*arguments, "--adapter", "citations", "--system", "Be brief.", "--document", str(tmp_path / "note.txt")]
        + ["--json", "--trace", "--trace-html", str(tmp_path / "t.html")],
    )
    record = json.loads(named.stdout)
    assert base["adapter"] == "base"
    assert record["prompt_tokens"] > base["prompt_tokens"] + 10
    assert {token["slot"] for token in record["trace"]} == {2}
    assert len(record["trace"]) == record["prompt_tokens"] + record["generated_tokens"]
    page = (tmp_path / "t.html").read_text()
    assert page.count("<span") >= len(record["trace"])
    assert "&lt;|citations|&gt;" in page
    assert "http" not in page


def test_generate_streams_and_traces(composed: Path) -> None:
    arguments = ["generate", str(composed), "-m", "Where?", "--max-new-tokens", "4", "--adapter", "answerability"]
    streamed = runner.invoke(app, arguments)
    assert streamed.exit_code == 0
    assert streamed.stdout.strip()
    traced = runner.invoke(app, [*arguments, "--trace"])
    assert "<|answerability|>" in traced.stdout
    assert "slot 1  answerability" in traced.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "nobody"], "no adapter 'nobody'"),
        (["--adapter", "query_rewrite"], "acts from its invocation text"),
        (["--document", "/no/such/file"], "/no/such/file"),
    ],
)
def test_generate_refuses(options: list[str], words: str, composed: Path) -> None:
    result = runner.invoke(app, ["generate", str(composed), "-m", "Where?", *options])
    assert result.exit_code == 1
    assert words in str(result.exception)


@pytest.mark.parametrize("text", ["{", "7", '["a"]', "[" * 20_000])
def test_documents_are_objects(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(SwitchError, match=r"--document .*d\.json is n"):
        read_document(tmp_path / "d.json", 1)


def test_generate_refuses_what_holds_no_adapters(base: Path, tmp_path: Path) -> None:
    for model, words in [(base, "not a composed model"), (tmp_path / "nowhere", "no such folder")]:
        result = runner.invoke(app, ["generate", str(model), "-m", "Where?"])
        assert words in str(result.exception)


def test_generate_with_another_family(tmp_path: Path) -> None:
    from artefacts import make_adapter
    from families import FAMILIES, make_decoder

    from granite_switch import compose

    base = make_decoder(tmp_path / "base", "qwen3", intermediate_size=128)
    make_adapter(tmp_path / "first", base, targets=FAMILIES["qwen3"].targets)
    compose(base, [tmp_path / "first"], tmp_path / "model")
    arguments = ["generate", str(tmp_path / "model"), "-m", "Where?", "--adapter", "first", "--max-new-tokens", "2"]
    result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["adapter"] == "first"


def test_a_killed_compose_leaves_nothing_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    from artefacts import make_adapter, make_base

    base = make_base(tmp_path / "base", layers=2, hidden=128, mlp=512)
    make_adapter(tmp_path / "a", base)
    arguments = [sys.executable, "-m", "granite_switch.cli", "compose", base, "--adapters", tmp_path / "a", "-o"]
    output = tmp_path / "made" / "out"
    output.parent.mkdir()
    for delay in (0.3, 0.45, 0.5, 0.55, 0.6, 0.7):
        process = subprocess.Popen([*map(str, arguments), str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(delay)
        process.kill()
        process.wait()
        if output.exists():
            assert (output / "README.md").exists()
            break
    run = subprocess.run([*map(str, arguments), str(output), "--force"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [p.name for p in output.parent.iterdir()] == ["out"]
