"""Fixtures for the transformers backend: the plain load as reference, and the table of results.

For every way of loading and running, `check` compares the logits of the base and of each adapter with the plain load's.
`WRITE_TABLE=1 pytest tests/hf` writes the results to the table in docs/transformers.md.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from artefacts import ROOT
from ways import Conversation, Reference, Seen

import granite_switch.hf  # noqa: F401  (registers the Auto classes)

PAGE = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


@pytest.fixture(scope="session")
def reference(composed: Path) -> Reference:
    return Reference(composed, Conversation([{"role": "user", "content": "Where does Anna live? <rewrite>"}]))


@pytest.fixture
def row(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """A function that adds a row to the table: section, way, outcome, measurements."""

    def add(section: str, way: str, outcome: str = "works", seen: Seen | None = None, difference: float = -1) -> None:
        effects = sorted(seen.effects.values()) if seen else []
        difference = seen.difference if seen else difference
        record_property("row", [section, way, outcome, difference, effects[:1] + effects[-1:]])

    return add


@pytest.fixture
def check(reference: Reference, row: Callable[..., None]) -> Callable[..., None]:
    """A function that asserts that a model matches the plain load, and adds a row to the table."""

    def compare(model: Any, section: str, way: str, tolerance: float = 1e-5) -> None:
        seen = reference.seen(model)
        assert seen.difference <= tolerance, f"{way}: logits differ by {seen.difference:.2g}"
        row(section, way, seen=seen)

    return compare


_ROWS: list[list[Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.failed:
        _ROWS.extend(value for name, value in report.user_properties if name == "row")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Replace the table in docs/transformers.md, in the main process and only if no test failed."""
    if not os.environ.get("WRITE_TABLE") or hasattr(session.config, "workerinput") or exitstatus or not _ROWS:
        return
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n".join(_table()) + "\n" + END + tail, encoding="utf-8")


def _table() -> Iterator[str]:
    yield f"\ntransformers {transformers.__version__}, torch {torch.__version__}."
    rows = {(section, way): shown for section, way, *shown in _ROWS}
    for section in sorted({section for section, _ in rows}):
        yield f"\n### {section}\n"
        yield "| way | outcome | largest difference | adapters' effect |"
        yield "|---|---|---|---|"
        for way in sorted(way for owner, way in rows if owner == section):
            outcome, difference, effects = rows[section, way]
            shown = "" if difference < 0 else "0" if difference == 0 else f"{difference:.1e}"
            spread = " to ".join(f"{effect:.2f}" for effect in effects)
            yield f"| {way} | {outcome} | {shown} | {spread} |"
