"""Recipes from which models can be composed from scratch. `SOAK=1` runs the random tests for longer."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from granite_switch import compose

ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOAK = bool(os.environ.get("SOAK"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(left: Path, right: Path) -> None:
    a, b = contents(left), contents(right)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@dataclass
class Recipe:
    """The expected model, as the entries of a manifest from which it can be composed from scratch."""

    base: Path
    folder: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in self.entries if "path" in entry]

    def compose(self, name: str = "anew") -> Path:
        """Compose the model from scratch."""
        manifest = self.folder / "manifest.yaml"
        manifest.write_text(yaml.safe_dump(self.entries))
        compose(self.base, [manifest], self.folder / name, force=True)
        return self.folder / name

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.entries if entry["name"] == name and "path" in entry)
