"""What the tests of the transformers backend share: the plain load as the reference, and the table they write.

Every way of loading and running is judged by what the adapters do, so `check` compares logits of the base and of each
adapter with the plain load's. `WRITE_TABLE=1 pytest tests/hf` writes docs/transformers.md's table from what was seen.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.hf import GraniteSwitchForCausalLM

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


@dataclass(frozen=True)
class Seen:
    """How a way of loading compares with the plain load."""

    difference: float  # largest, relative to the largest logit
    effects: dict[str, float]  # adapter -> its change of the base's logits, relative to that change in the plain load


class Reference:
    """The plain load of a checkpoint: float32, on the CPU, eager execution.

    Args:
        folder: a composed checkpoint.
        question: what the user asks in the prompts.
    """

    def __init__(self, folder: Path, question: str) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = GraniteSwitchForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.spec = self.model.config.switch_spec
        self.question = question
        self.prompts = {name: self.ids(name) for name in (None, *self.spec.names)}
        self.logits = {name: self.of(self.model, ids) for name, ids in self.prompts.items()}

    def ids(self, adapter: str | None = None, question: str | None = None) -> Tensor:
        """A prompt's ids, [1, S]."""
        messages = [{"role": "user", "content": question or self.question}]
        rendered = self.tokenizer.apply_chat_template(
            messages, adapter_name=adapter, add_generation_prompt=True, return_tensors="pt"
        )
        return rendered["input_ids"]

    def batch(self) -> tuple[Tensor, Tensor]:
        """All prompts of different lengths, padded on the left: ids and attention mask, [B, S]."""
        rows = [ids[0, cut:] if name is None else ids[0] for cut, (name, ids) in enumerate(self.prompts.items(), 3)]
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=1) for row in rows])
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
        return ids, mask

    @staticmethod
    @torch.no_grad()
    def of(model: Any, ids: Tensor) -> Tensor:
        """A model's logits in float32, [1, S, V]."""
        device = model.get_input_embeddings().weight.device
        return model(ids if device.type == "meta" else ids.to(device)).logits.float().cpu()

    def seen(self, model: Any) -> Seen:
        """Compare a model with this one: the same checkpoint, loaded another way."""
        return self.compare({name: self.of(model, ids) for name, ids in self.prompts.items()})

    def compare(self, logits: dict[str | None, Tensor]) -> Seen:
        """Compare logits of the prompts with this model's."""
        differences = []
        for name, expected in self.logits.items():
            finite = expected.isfinite()
            largest = (logits[name] - expected)[finite].abs().nan_to_num(nan=float("inf")).max()
            differences.append(largest / expected[finite].abs().max())
        effects = {name: _change(logits, name) / _change(self.logits, name) for name in self.spec.names}
        return Seen(float(max(differences)), effects)


def _change(logits: dict[str | None, Tensor], adapter: str) -> float:
    """By how much an adapter changes the last token's logits, in the Euclidean norm.

    The two prompts differ by the control token alone, in whose place the decoder sees what the base's prompt has.
    """
    base, own = logits[None][0, -1], logits[adapter][0, -1]
    kept = own.isfinite()
    return float((own - base)[kept].norm())


@pytest.fixture(scope="session")
def reference(composed: Path) -> Reference:
    return Reference(composed, "Where does Anna live? <rewrite>")


@pytest.fixture
def row(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Puts a row into the table: section, way, outcome, and what was seen."""

    def add(section: str, way: str, outcome: str = "works", seen: Seen | None = None, difference: float = -1) -> None:
        effects = sorted(seen.effects.values()) if seen else []
        difference = seen.difference if seen else difference
        record_property("row", [section, way, outcome, difference, effects[:1] + effects[-1:]])

    return add


@pytest.fixture
def check(reference: Reference, row: Callable[..., None]) -> Callable[..., None]:
    """Asserts that a model does what the plain load does, and puts a row into the table."""

    def compare(model: Any, section: str, way: str, tolerance: float = 1e-5) -> None:
        seen = reference.seen(model)
        assert seen.difference <= tolerance, f"{way}: logits differ by {seen.difference:.2g}"
        row(section, way, seen=seen)

    return compare


_ROWS: list[list[Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _ROWS.extend(value for name, value in report.user_properties if name == "row")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Replace the table of docs/transformers.md; on the process that hears of all tests."""
    if not os.environ.get("WRITE_TABLE") or hasattr(session.config, "workerinput") or not _ROWS:
        return
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n".join(_table()) + "\n" + END + tail, encoding="utf-8")


def _table() -> Iterator[str]:
    yield f"\ntransformers {transformers.__version__}, torch {torch.__version__}."
    for section in sorted({row[0] for row in _ROWS}):
        yield f"\n### {section}\n"
        yield "| way | outcome | largest difference | adapters' effect |"
        yield "|---|---|---|---|"
        for _, way, outcome, difference, effects in sorted(r for r in _ROWS if r[0] == section):
            shown = "" if difference < 0 else "0" if difference == 0 else f"{difference:.1e}"
            spread = " to ".join(f"{effect:.2f}" for effect in effects)
            yield f"| {way} | {outcome} | {shown} | {spread} |"
