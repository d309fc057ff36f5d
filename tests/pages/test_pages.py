"""The commands and Python blocks on the pages work, against stand-ins for what they name."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from artefacts import ROOT, make_adapter
from commands import blocks, filled, snippets
from stand_ins import BASES, LIBRARIES, Reader

from layouts import write_old  # isort: skip

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = {"log.md"}  # commands of the past, not to run
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def run(reader: Reader, line: str) -> str:
    done = subprocess.run(
        ["bash", "-ec", line], cwd=reader.folder, env=reader.environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(reader: Reader) -> None:
    """Every command of the README in order, in one folder, as a new user does it."""
    outputs = {line: run(reader, line) for line in (filled(command, {}) for command in readme())}
    texts = [text for line, text in outputs.items() if line.startswith("granite-switch generate")]
    assert texts[0].strip() == "Ada lives in Tarn."
    assert '{"answerability": "answerable"}' in texts[1].replace("\n", "")
    noted = (reader.folder.parent / "noted").read_text().splitlines()
    assert "granite-switch serve my-model" in noted
    assert (reader.folder / "my-model.gguf").is_file()
    for code in snippets(ROOT / "README.md"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=reader.folder, env=reader.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip()


def readme() -> list[str]:
    return [
        line for lines in blocks(ROOT / "README.md") for line in lines if " OLD" not in line and " MODEL" not in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_commands_of_the_pages(page: Path, reader: Reader, composed: Path, base: Path, adapters: Path) -> None:
    if page.name in HISTORY:
        pytest.skip("history")
    found = [[line for line in lines if ours(line)] for lines in blocks(page)]
    if not any(found):
        pytest.skip("it names no command of ours")
    make_adapter(reader.folder / "more" / "certainty", base, seed=9)
    write_old(reader.folder / "old", 3, base, adapters, ("answerability", "citations", "guardian-core"))
    for lines in found:
        shutil.rmtree(reader.folder / "model", ignore_errors=True)
        shutil.copytree(composed, reader.folder / "model")
        for line in lines:
            run(reader, prepared(line, reader, base, adapters))


def ours(line: str) -> bool:
    """Whether to run a line: with fewer than three words it only names a command, and a server does not end."""
    words = line.split()
    return words[0] == "granite-switch" and len(words) > 2 and words[1] not in ("serve", "play")


def prepared(line: str, reader: Reader, base: Path, adapters: Path) -> str:
    """A page's line with a fresh model as MODEL, and its other inputs and outputs."""
    source = adapters / "citations" if line.startswith("granite-switch update") else reader.folder / "more"
    words = {"MODEL": "model", "SOURCE": str(source), "BASE": str(base), "ADAPTERS": str(adapters)}
    words |= {"FOLDER": str(source / "certainty"), "DIR": "taken", "NAME": "citations", "NEW": "renamed"}
    words |= {"OLD": "citations" if " rename " in line else "old", "FILE": "file"}
    words |= {"TRAINED": "model", "TEXT": "Judge:"}
    if "--new" in line:
        words["NAME"] = "fresh"
    if "--output MODEL" in line:
        words["MODEL"] = "made"
    if "--against FOLDER" in line:
        words["FOLDER"] = str(adapters)
    if ".gguf" in line and "inspect" in line:
        line = f"granite-switch export gguf MODEL --output {line.split()[-1]} --force && {line}"
    for made in ("renamed", "taken", "made", "model.gguf", "model-q8.gguf"):
        shutil.rmtree(reader.folder / made, ignore_errors=True)
        (reader.folder / made).unlink(missing_ok=True)
    return filled(line, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_name_exists(page: Path) -> None:
    """The pages name only hub repositories with stand-ins, extras in pyproject.toml, and link targets that exist."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\bibm-granite/[\w.-]*\w", text))
    if page.name not in HISTORY:
        assert named <= {*BASES, *LIBRARIES}
    for extras in re.findall(r"pip install [^\n`]*\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= EXTRAS
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / target).exists(), target


def test_figures_of_the_readme_are_measured() -> None:
    """Every figure in the README's tables of measurements is in docs/performance.md or docs/real-model.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = "".join(
        (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("performance", "real-model")
    )
    figures = re.findall(r"\d+\.\d{3,4}|\d+\.\d+(?= s\b)|\d+(?= MB)", text)
    assert len(figures) > 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured), figure
