"""Each notebook's two files agree: the text (.py), and the one with the outputs of the last run (.ipynb)."""

import ast
import sys
from importlib import import_module

import pytest
from artefacts import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
sys.path.insert(0, str(ROOT / "notebooks"))
import run

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


def test_they_are_there() -> None:
    assert [path.name[0] for path in SOURCES] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_of_this_text(source) -> None:
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(kept)
    assert [c.source for c in kept.cells] == [c.source for c in run.read(source).cells]
    outputs = [output for cell in kept.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error"]
    assert f"notebooks/{source.stem}.ipynb" in kept.cells[0].source  # the badge opens this notebook
    assert "google.colab" in source.read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_it_imports_of_ours_is_there(source) -> None:
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [one.module if isinstance(one, ast.ImportFrom) else one.names[0].name for one in found]
    ours = [(name, node) for name, node in zip(modules, found, strict=True) if name.startswith("granite_switch")]
    assert ours
    for name, node in ours:
        module = import_module(name)
        if isinstance(node, ast.ImportFrom):
            for one in node.names:
                assert hasattr(module, one.name) or import_module(f"{name}.{one.name}"), f"{name}: {one.name}"
