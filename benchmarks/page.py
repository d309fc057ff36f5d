"""Fill docs/performance.md and draw its plots from the result files of bench.py.

    python benchmarks/page.py

The page's text is written by hand. The parts between `<!-- begin NAME -->` and `<!-- end NAME -->` are generated here,
from the newest benchmarks/results/DATE-NAME.json, where NAME is full, quick, bfloat16, wide, growth, loading or cuda.
Each part names its file and the command that produced it.
"""

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from bench import PLAIN, ratios

ROOT = Path(__file__).parent.parent
PAGE, IMAGES, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "images", ROOT / "benchmarks" / "results"
COLOURS = {"plain": "#8a8a8a", "switch": "#0f62fe", "PEFT": "#d9730d", "older": "#8a3ffc"}
CASES = {  # Case.name without group and dtype -> column heading
    "prefill/1/128": "prefill 128",
    "prefill/1/512": "prefill 512",
    "prefill/1/2048": "prefill 2,048",
    "prefill/8/16": "prefill 8 × 16",
    "prefill/8/64": "prefill 8 × 64",
    "prefill/8/256": "prefill 8 × 256",
    "decode/1/128": "decode, batch 1",
    "decode/8/64": "decode, batch 8",
    "decode/32/64": "decode, batch 32",
}

Ratio = tuple[float, float, float]  # median, and both ends of its 95 % interval


@dataclass(frozen=True)
class Target:
    """The bound for the ratio of two contenders in a case."""

    what: str
    case: str
    over: str
    under: str
    bound: float
    least: bool = False  # a lower bound, not an upper one


def targets() -> Iterator[Target]:
    one, two = ("prefill/1/512", "prefill/8/64"), ("prefill/1/2048", "prefill/8/256")
    decode = (("decode/1/128", "LoRA"), ("decode/8/64", "five mixed"), ("decode/32/64", "five mixed"))
    for case in (one[0], decode[0][0], decode[1][0]):
        yield Target("base traffic on a switch model", case, "switch base", PLAIN, 1.01)
    for single, mixed in (one, two):
        yield Target("one LoRA", single, "switch LoRA", PLAIN, 1.03)
        yield Target("one aLoRA", single, "switch aLoRA", PLAIN, 1.03)
        yield Target("five mixed", mixed, "switch five mixed", PLAIN, 1.03)
    yield Target("one aLoRA", decode[0][0], "switch aLoRA", PLAIN, 1.05)
    for case, traffic in decode:
        yield Target(
            traffic.replace("LoRA", "one LoRA"), case, f"switch {traffic}", PLAIN, 1.05 if "1/" in case else 1.08
        )
    for case, traffic in ((one[0], "LoRA"), (one[1], "five mixed"), *decode):
        bound = 1.2 if "prefill" in case else 1.3
        yield Target(
            f"release 0.1.1 relative to this, {traffic}", case, f"older {traffic}", f"switch {traffic}", bound, True
        )
    for case, traffic in ((one[0], "LoRA"), (one[1], "five mixed"), *decode):
        bound = 1.3 if traffic == "five mixed" and "decode" in case else 1.0
        yield Target(f"PEFT relative to this, {traffic}", case, f"PEFT {traffic}", f"switch {traffic}", bound, True)
    for traffic in ("base", "LoRA"):
        over, under = (f"switch {traffic}, {count} adapters" for count in (50, 1))
        yield Target(f"50 adapters against 1, {traffic} traffic", "decode/1/128", over, under, 1.01)


class Result:
    """One result file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text())
        self.cases = {case["name"]: case for case in self.data["cases"]}

    def ratio(self, case: str, over: str, under: str = PLAIN) -> Ratio | None:
        """The ratio of two contenders' times; None if either was not measured."""
        times = self.cases.get(case, {}).get("times", {})
        if over not in times or under not in times:
            return None
        return ratios(*([run["seconds"] for run in times[name]] for name in (over, under)))

    def median(self, case: str, name: str) -> float:
        return statistics.median(run["seconds"] for run in self.cases[case]["times"][name])

    def source(self, only: str = "") -> str:
        """The line that names the command and the file of a part."""
        command = self.data["command"] + (f" --only '{only}'" if only and "--only" not in self.data["command"] else "")
        return f"\n`{command}`, [{self.path.name}](../benchmarks/results/{self.path.name})"


def newest(*names: str) -> Result | None:
    """The newest result file of the first name that has one."""
    for name in names:
        found = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
        if found:
            return Result(found[-1])
    return None


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(ratio: Ratio | None) -> str:
    return "–" if ratio is None else "{:.3f} [{:.3f}–{:.3f}]".format(*ratio)


def targets_part(result: Result) -> str:
    rows = []
    for target in targets():
        group = "adapters" if "50 adapters" in target.what else "main"
        ratio = result.ratio(f"{group}/{target.case}/float32", target.over, target.under)
        if ratio is not None:
            rows.append([f"{target.what}, {CASES[target.case]}", *_against(ratio, target.bound, target.least)])
    flow = _first_tokens(result)
    if len(flow) > 1:
        again = [a / b for a, b in zip(flow["switch, LoRA, prefilled again"], flow["switch, kept cache"], strict=True)]
        rows.append(["flow: first tokens, prefilled again over kept cache", *_against(_bootstrap(again), 5, True)])
    return table(("ratio of times", "target", "measured", ""), rows) + "\n" + result.source()


def _against(ratio: Ratio, bound: float, least: bool) -> list[str]:
    """Cells: the target, the measurement, and the verdict."""
    short = bound - ratio[0] if least else ratio[0] - bound
    near = ratio[1] <= bound <= ratio[2]
    verdict = ("reached" if short <= 0 else f"missed by {short:.3f}") + (" (target in the interval)" if near else "")
    return [f"{'≥' if least else '≤'} {bound:.2f}", shown(ratio), verdict]


def _bootstrap(values: Sequence[float]) -> Ratio:
    return ratios(values, [1.0] * len(values))


def measured_part(result: Result, only: str = "main") -> str:
    """Tables of every contender's times and ratios, for each dtype and task."""
    parts = []
    for dtype in ("float32", "bfloat16"):
        for task in ("prefill", "decode"):
            columns = {f"main/{case}/{dtype}": head for case, head in CASES.items() if case.startswith(task)}
            columns = {case: head for case, head in columns.items() if case in result.cases}
            if not columns:
                continue
            names = dict.fromkeys(name for case in columns for name in result.cases[case]["times"])
            rows = [[PLAIN + ", ms"] + [f"{result.median(case, PLAIN) * 1e3:.1f}" for case in columns]]
            rows += [[n] + [shown(result.ratio(case, n)) for case in columns] for n in names if n != PLAIN]
            parts.append(f"{task.capitalize()}, {dtype}\n\n" + table(["", *columns.values()], rows))
    return "\n\n".join(parts) + "\n" + result.source(only)


def flow_part(result: Result) -> str:
    case = next(case for case in result.cases.values() if case["task"] == "flow")
    rows = []
    for name, runs in case["times"].items():
        first, later = [run["first"][0] for run in runs], [sum(run["first"][1:]) / 4 for run in runs]
        cells = [_spread(values) for values in (first, later, [sum(run["total"]) for run in runs])]
        rows.append([name, *cells])
    heading = (
        "seconds, median [least–most]",
        "first token, step 1",
        "first token, steps 2 to 5 each",
        "all five steps",
    )
    return table(heading, rows) + "\n" + result.source("flow")


def loading_part(result: Result) -> str:
    loading = result.data["loading"]
    rows = []
    for name, runs in loading["times"].items():
        cells = [_spread([run["seconds"] for run in runs])]
        cells += [_megabytes(statistics.median(run[key] for run in runs)) for key in ("before", "peak", "used")]
        rows.append([name, _megabytes(loading["bytes"].get(name, 0)), *cells])
    heading = ("", "weights, MB", "loading, s", "memory before, MB", "peak memory, MB", "after a forward, MB")
    against = [[what, *_against(ratio, bound, False)] for what, ratio, bound in _loading_ratios(result)]
    compared = table(("relative to the base", "target", "measured", ""), against)
    machine = f"\n{result.data['date']}, {result.data['machine']['processor']}:"
    return f"{machine}\n\n{table(heading, rows)}\n\n{compared}\n{result.source('loading')}".strip()


def tools_part(result: Result) -> str:
    rows = []
    for name, runs in result.data["tools"].items():
        cells = [_megabytes(max(run["peak"] for run in runs)), _megabytes(runs[0]["written"])]
        rows.append([name, _spread([run["seconds"] for run in runs]), *cells])
    return table(("", "seconds", "peak memory, MB", "written, MB"), rows) + "\n" + result.source("tools")


def cuda_part(result: Result) -> str:
    rows = []
    for case in result.cases.values():
        for name in case["times"] if case["task"] != "flow" else ():
            if name != PLAIN:
                what = f"{case['group']}, {'prefill' if case['task'] == 'prefill' else 'decode'}"
                shape = f"{case['batch']} × {case['length']}"
                plain = f"{result.median(case['name'], PLAIN) * 1e3:.2f}"
                rows.append([what, shape, name, plain, shown(result.ratio(case["name"], name))])
    return table(("", "batch × context", "contender", "plain, ms", "ratio"), rows) + "\n" + result.source()


def machine_part(result: Result) -> str:
    data = result.data
    size = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in data["size"].items() if key != "name")
    machine = data["machine"]
    processor = ", ".join([machine["processor"], *machine.get("features", [])])
    lines = [f"{data['date']}; {processor}; {machine['threads']} threads.", f"Base: {size}."]
    for who, versions in data["versions"].items():
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"{'Release 0.1.1' if who == 'older' else 'All others'}: {found}.")
    lines += [f"Note: {note}." for note in data["notes"]]
    return "\n".join(f"- {line}" for line in lines)


def _first_tokens(result: Result) -> dict[str, list[float]]:
    """Contender -> for each round, the seconds to the first tokens of steps 2 to 5, added up."""
    for case in result.cases.values():
        if case["task"] == "flow":
            return {name: [sum(run["first"][1:]) for run in runs] for name, runs in case["times"].items()}
    return {}


def _loading_ratios(result: Result) -> Iterator[tuple[str, Ratio, float]]:
    """Loading relative to the base: time per byte, and peak memory minus the adapters' bytes."""
    loading = result.data.get("loading")
    if not loading or PLAIN not in loading["times"]:
        return
    plain, weights = loading["times"][PLAIN], loading["bytes"]
    for name in (name for name in loading["times"] if name.startswith("switch")):
        rounds = list(zip(loading["times"][name], plain, strict=False))
        share = weights[name] / weights[PLAIN]
        yield (
            f"loading, seconds per byte, {name}",
            _bootstrap([a["seconds"] / b["seconds"] / share for a, b in rounds]),
            1.10,
        )
        extra = weights[name] - weights[PLAIN]
        yield (
            f"loading, peak memory minus the adapters, {name}",
            _bootstrap([(a["peak"] - extra) / b["peak"] for a, b in rounds]),
            1.05,
        )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}–{max(values):.3g}]"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f}"


def draw_ratios(result: Result) -> None:
    """Plot every contender's ratio to plain Granite, with its interval."""
    cases = [case for case in CASES if f"main/{case}/float32" in result.cases]
    figure, axes = plt.subplots(1, len(cases), figsize=(2.1 * len(cases), 3.2), sharey=True)
    names = [n for case in cases for n in result.cases[f"main/{case}/float32"]["times"] if n != PLAIN]
    names = sorted(dict.fromkeys(names), key=lambda name: list(COLOURS).index(name.split()[0].rstrip(",")))
    for axis, case in zip(axes if len(cases) > 1 else [axes], cases, strict=True):
        axis.axvline(1, color="#c6c6c6", linewidth=1)
        for row, name in enumerate(reversed(names)):
            ratio = result.ratio(f"main/{case}/float32", name)
            if ratio:
                colour = COLOURS[name.split()[0].rstrip(",")]
                axis.plot(ratio[1:], (row, row), color=colour, linewidth=2)
                axis.plot(ratio[0], row, "o", color=colour, markersize=5)
        axis.set_title(CASES[case], fontsize=9)
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("time, as a ratio to plain Granite in the same round", fontsize=9)
    _save(figure, "ratios")


def _panels() -> dict[str, list[tuple[str, str, str, str]]]:
    """The panels of the growth plot: title -> points (who, label, case, contender)."""
    labels = {"r8": "8", "r16": "16", "r32": "32", "r64": "64", "mixed": "mixed"}
    return {
        "adapters in the checkpoint (decode, batch 1)": [
            ("switch", str(count), "adapters/decode/1/128/float32", f"switch LoRA, {count} adapters")
            for count in (1, 12, 50)
        ],
        "rank (decode, batch 8, five mixed)": [
            (who, label, f"rank/{ranks}/decode/8/64/float32", f"{who} five mixed")
            for who in ("switch", "PEFT", "older")
            for ranks, label in labels.items()
        ],
        "context (decode, batch 1, LoRA)": [
            (who, f"{length:,}", f"context/decode/1/{length}/float32", f"{who} LoRA")
            for who in ("switch", "PEFT", "older")
            for length in (128, 512, 2048, 4096)
        ],
        "batch (decode, five mixed)": [
            (who, str(batch), f"batch/decode/{batch}/64/float32", f"{who} five mixed")
            for who in ("switch", "PEFT", "older")
            for batch in (1, 2, 4, 8, 16, 32)
        ],
    }


def growth_part(result: Result) -> str:
    """Tables of the growth plot's figures."""
    parts = []
    for title, points in _panels().items():
        columns = list(dict.fromkeys(label for _, label, _, _ in points))
        rows = []
        for who in dict.fromkeys(point[0] for point in points):
            found = {label: result.ratio(case, name) for w, label, case, name in points if w == who}
            rows.append([who, *(shown(found.get(label)) for label in columns)])
        parts.append(table((title, *columns), rows))
    return "\n\n".join(parts) + "\n" + result.source("(adapters/decode|rank/.*/decode/8|context|batch)")


def draw_growth(result: Result) -> None:
    """Plot ratios over the number of adapters, rank, context and batch."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
    for axis, (title, points) in zip(axes, _panels().items(), strict=True):
        axis.axhline(1, color="#c6c6c6", linewidth=1)
        for who in dict.fromkeys(point[0] for point in points):
            found = [(label, result.ratio(case, name)) for w, label, case, name in points if w == who]
            found = [(label, ratio) for label, ratio in found if ratio]
            if found:
                middle = [ratio[0] for _, ratio in found]
                errors = [[r[0] - r[1] for _, r in found], [r[2] - r[0] for _, r in found]]
                axis.errorbar(
                    [label for label, _ in found],
                    middle,
                    errors,
                    color=COLOURS[who],
                    marker="o",
                    markersize=4,
                    label=who,
                )
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ratio to plain Granite", fontsize=9)
    axes[-1].legend(fontsize=8, frameon=False)
    _save(figure, "growth")


def draw_flow(result: Result) -> None:
    """Plot the seconds to the first token of each step."""
    case = next(case for case in result.cases.values() if case["task"] == "flow")
    figure, axis = plt.subplots(figsize=(7, 2.6))
    width = 0.8 / len(case["times"])
    shades = ("#0f62fe", "#78a9ff", "#d9730d", "#8a3ffc", "#8a8a8a")
    for index, ((name, runs), shade) in enumerate(zip(case["times"].items(), shades, strict=False)):
        medians = [statistics.median(run["first"][step] for run in runs) for step in range(5)]
        axis.bar([step + index * width for step in range(5)], medians, width, color=shade, label=name)
    axis.set_xticks(
        [step + 0.4 - width / 2 for step in range(5)], ["rewrite", "answer", "check 1", "check 2", "check 3"]
    )
    axis.set_ylabel("s to the first token", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    _save(figure, "flow")


def _save(figure: Any, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / f"performance-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def fill(page: str, name: str, text: str) -> str:
    """Replace the part between its markers."""
    marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.escape(marks[0]) + r".*?" + re.escape(marks[1])
    return re.sub(pattern, lambda _: f"{marks[0]}\n\n{text}\n\n{marks[1]}", page, flags=re.DOTALL)


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "granite-switch", "font.family": "sans-serif"})
    page = PAGE.read_text()
    cpu, cuda = newest("full", "quick"), newest("cuda")
    wide, growth, loading = newest("wide"), newest("full", "growth"), newest("loading", "full", "quick")
    bfloat16 = newest("bfloat16")
    if cpu:
        parts = {"machine": machine_part, "targets": targets_part, "measured": measured_part}
        if any(case["task"] == "flow" for case in cpu.cases.values()):
            parts["flow"] = flow_part
            draw_flow(cpu)
        parts |= {"tools": tools_part} if "tools" in cpu.data else {}
        for name, part in parts.items():
            page = fill(page, name, part(cpu))
        if any(case["group"] == "main" for case in cpu.cases.values()):
            draw_ratios(cpu)
    if loading:
        page = fill(page, "loading", loading_part(loading))
    if bfloat16:
        page = fill(page, "bfloat16", machine_part(bfloat16) + "\n\n" + measured_part(bfloat16, "main/.*bfloat16"))
    if wide:
        page = fill(page, "wide", "\n\n".join(part(wide) for part in (machine_part, targets_part, measured_part)))
    if growth:
        draw_growth(growth)
        plot = "![How the ratio grows](images/performance-growth.svg)"
        page = fill(page, "growth", plot + "\n\n" + growth_part(growth))
    if cuda:
        page = fill(page, "cuda", machine_part(cuda) + "\n\n" + cuda_part(cuda))
    PAGE.write_text(page)
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
