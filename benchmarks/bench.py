"""Compare plain Granite, switch models, PEFT and release 0.1.1 ("older"), on one machine in the same rounds.

    python benchmarks/bench.py --quick              # the main targets, about 12 minutes
    python benchmarks/bench.py                      # everything, about 2 hours
    python benchmarks/bench.py --only 'decode/8'    # cases whose name matches
    python benchmarks/bench.py --device cuda --size 3b

Models live in worker processes (`worker.py`), one for each environment, and only one contender runs at a time. In each
round every contender of a case is timed once, in random order. A ratio is the median over the rounds of its time
divided by plain Granite's in the same round, with a 95 % bootstrap interval. "plain again" is a second copy of plain
Granite; its distance from 1.00 shows how far to trust the rest. Before timing, contenders with the same traffic must
give the same logits. Each finished case is saved immediately to benchmarks/results/DATE-NAME.json, from which `page.py`
generates docs/performance.md. `--only` adds its cases to the file of that day.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthetic import INVOCATION, SIZES, adapter_folder, older_command

HERE = Path(__file__).parent
PLAIN = "plain Granite"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # between logits for the same traffic, relative to the largest


@dataclass(frozen=True)
class Contender:
    """A model to time, and its traffic."""

    name: str
    kind: str  # granite, switch, peft or merged, as in worker.Model
    traffic: str  # base, lora, alora, mixed
    checkpoint: str = "base"  # a folder; for peft and merged the library's
    adapters: tuple[int, ...] = ()
    older: bool = False  # runs in the environment of release 0.1.1
    copy: int = 0
    kept: bool = False  # in a flow: one cache for all steps


@dataclass(frozen=True)
class Case:
    """A task to time with several contenders, and for how long."""

    group: str
    task: str  # one of worker.TASKS
    batch: int
    length: int
    contenders: tuple[Contender, ...]
    seconds: float
    rounds: tuple[int, int] = (5, 60)  # minimum, maximum
    dtype: str = "float32"
    label: str = ""  # the value that varies within a group: ranks, number of adapters

    @property
    def name(self) -> str:
        parts = (self.group, self.label, self.task, str(self.batch), str(self.length), self.dtype)
        return "/".join(part for part in parts if part)


def contenders(adapters: str = "12-r16") -> dict[str, Contender]:
    """All contenders by name, on one set of adapters (see synthetic.py)."""
    switch, library = f"switch-{adapters}", f"library-{adapters}"
    count = int(adapters.split("-")[0])
    peft = tuple(range(min(count, 5))) + ((5,) if count > 5 else ())
    found = [Contender(PLAIN, "granite", "base"), Contender("plain again", "granite", "base", copy=1)]
    found += [Contender(f"switch {_called(t)}", "switch", t, switch) for t in ("base", "lora", "alora", "mixed")]
    found += [Contender(f"PEFT {_called(t)}", "peft", t, library, peft) for t in ("lora", "alora", "mixed")]
    found += [Contender("PEFT merged", "merged", "lora", library, (0,))]
    older = f"older-{adapters}"
    found += [Contender(f"older {_called(t)}", "switch", t, older, older=True) for t in ("base", "lora", "mixed")]
    found += [Contender("plain, older transformers", "granite", "base", older=True)]
    return {contender.name: contender for contender in found}


def _called(traffic: str) -> str:
    return {"base": "base", "lora": "LoRA", "alora": "aLoRA", "mixed": "five mixed"}[traffic]


ONE = (PLAIN, "plain again", "switch base", "switch LoRA", "switch aLoRA", "PEFT LoRA", "older LoRA")
MIXED = (PLAIN, "switch five mixed", "PEFT five mixed", "older five mixed")
ALL_ONE = ONE + ("PEFT aLoRA", "PEFT merged", "older base", "plain, older transformers")
FLOW = (
    Contender("switch, kept cache", "switch", "base", "switch-12-r16", kept=True),
    Contender("switch, LoRA, prefilled again", "switch", "lora", "switch-12-r16"),
    Contender("PEFT, LoRA, prefilled again", "peft", "lora", "library-12-r16", (0, 1, 2, 3, 4, 5)),
    Contender("older, kept cache", "switch", "base", "older-12-r16", older=True, kept=True),
    Contender("plain Granite, kept cache", "granite", "base", kept=True),
)


def quick_cases() -> Iterator[Case]:
    """The cases of the main targets."""
    every = contenders()

    def case(task: str, batch: int, length: int, names: Sequence[str], seconds: float, **more: Any) -> Case:
        return Case("main", task, batch, length, tuple(every[name] for name in names), seconds, **more)

    yield case("decode", 1, 128, ALL_ONE, 50)
    yield case("decode", 8, 64, (*MIXED, "plain again", "switch base"), 40)
    yield case("decode", 32, 64, MIXED, 45)
    yield case("prefill", 1, 512, ONE, 60)
    yield case("prefill", 8, 64, MIXED, 40)
    yield case("prefill", 1, 2048, (PLAIN, "switch LoRA", "PEFT LoRA"), 50)
    yield case("prefill", 8, 256, (PLAIN, "switch five mixed", "PEFT five mixed"), 50)
    yield from _numbers(25, ("1-r16", "50-r16"), (("decode", 1, 128),))
    yield Case("flow", "flow", 1, 2000, (FLOW[0], FLOW[1], FLOW[3]), 60, rounds=(2, 5))


def full_cases() -> Iterator[Case]:
    """All cases for a CPU."""
    every = contenders()

    def case(group: str, task: str, batch: int, length: int, names: Sequence[str], **more: Any) -> Case:
        return Case(group, task, batch, length, tuple(every[name] for name in names), **more)

    mixed = (*MIXED, "plain again", "switch base")
    for dtype in ("float32", "bfloat16"):
        for length in (128, 512, 2048):
            names = ALL_ONE if length < 2048 else ONE
            yield case("main", "prefill", 1, length, names, seconds=150, rounds=(5, 40), dtype=dtype)
            yield case("main", "prefill", 8, length // 8, mixed, seconds=100, rounds=(5, 40), dtype=dtype)
        yield case("main", "decode", 1, 128, ALL_ONE, seconds=120, dtype=dtype)
        for batch in (8, 32):
            yield case("main", "decode", batch, 64, mixed, seconds=100, dtype=dtype)
    yield from _numbers(60, ("1-r16", "12-r16", "50-r16"), (("decode", 1, 128), ("prefill", 1, 512)))
    for ranks in ("r8", "r16", "r32", "r64", "mixed"):
        these = contenders(f"5-{ranks}")
        for task, batch, length in (("decode", 1, 128), ("prefill", 1, 512), ("decode", 8, 64), ("prefill", 8, 64)):
            names = MIXED if batch > 1 else (PLAIN, "switch LoRA", "PEFT LoRA", "older LoRA")
            chosen = tuple(these[name] for name in names)
            yield Case("rank", task, batch, length, chosen, 50, label=ranks)
    for length in (128, 512, 2048, 4096):
        names = (PLAIN, "switch LoRA", "switch aLoRA", "PEFT LoRA", "older LoRA")
        yield case("context", "decode", 1, length, names, seconds=50, rounds=(15, 60))
    for batch in (1, 2, 4, 8, 16, 32):
        yield case("batch", "decode", batch, 64, MIXED, seconds=50, rounds=(15, 60))
    yield Case("flow", "flow", 1, 2000, FLOW, 300, rounds=(5, 10))


def cuda_cases() -> Iterator[Case]:
    """The cases for one GPU, in bfloat16: eager, and compiled with a static cache."""
    every = contenders()
    one, mixed = (PLAIN, "plain again", "switch base", "switch LoRA"), (PLAIN, "plain again", "switch five mixed")
    for task, group in (("decode", "eager"), ("generate", "compiled")):
        for batch in (1, 8, 64):
            # PEFT selects rows on the host, by adapter names, so it is measured only eagerly
            names = (*(one if batch == 1 else ()), *mixed, *(("PEFT five mixed",) if task == "decode" else ()))
            chosen = tuple(every[name] for name in dict.fromkeys(names))
            yield Case(group, task, batch, 512, chosen, 30, dtype="bfloat16")
    for batch, length in ((1, 4096), (8, 512)):
        names = one if batch == 1 else (*mixed, "PEFT five mixed")
        yield Case("eager", "prefill", batch, length, tuple(every[n] for n in names), 30, dtype="bfloat16")
    yield Case("flow", "flow", 1, 2000, tuple(c for c in FLOW if not c.older), 40, rounds=(3, 10), dtype="bfloat16")


def _numbers(seconds: float, sets: Sequence[str], shapes: Sequence[tuple[str, int, int]]) -> Iterator[Case]:
    """Cases with the same traffic on checkpoints with increasing numbers of adapters."""
    for task, batch, length in shapes:
        chosen = [contenders()[PLAIN]]
        for adapters in sets:
            these, count = contenders(adapters), adapters.split("-")[0]
            chosen += [replace(these[f"switch {t}"], name=f"switch {t}, {count} adapters") for t in ("base", "LoRA")]
        yield Case("adapters", task, batch, length, tuple(chosen), seconds)


class Worker:
    """A handle to a worker process."""

    def __init__(self, python: str, threads: int, log: Path) -> None:
        command = [python, str(HERE / "worker.py"), "--threads", str(threads)]
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment()
            )
        self.loaded: set[str] = set()
        self.versions = self.ask("versions", None)

    def ask(self, name: str, request: Any) -> dict[str, Any]:
        """The worker's answer to a request.

        Raises:
            RuntimeError: the worker failed, with its message.
        """
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({name: request}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def hold(self, models: dict[str, dict[str, Any]]) -> None:
        """Load these models and no others."""
        for key in self.loaded - set(models):
            self.ask("drop", key)
        for key in set(models) - self.loaded:
            self.ask("load", {"key": key, **models[key]})
        self.loaded = set(models)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Bench:
    """One run: the folder of models, the workers and the results."""

    folder: Path  # models of one size
    pythons: dict[bool, str]  # interpreters, by `Contender.older`
    threads: int
    device: str
    results: Path
    found: dict[str, Any]
    workers: dict[bool, Worker] = field(default_factory=dict)

    def worker(self, older: bool) -> Worker:
        if older not in self.workers:
            self.workers[older] = Worker(self.pythons[older], self.threads, self.folder / "workers.log")
            self.found["versions"]["older" if older else "main"] = self.workers[older].versions
        return self.workers[older]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def run(self, case: Case) -> None:
        """Time a case and save the result."""
        case = replace(case, contenders=tuple(c for c in case.contenders if c.older in self.pythons))
        for older in self.pythons:
            mine = [c for c in case.contenders if c.older == older]
            if mine or older in self.workers:
                self.worker(older).hold({_key(c, case): self.model(c, case.dtype) for c in mine})
        ready = self.prepare(case)
        results: list[dict[str, Any]] = []
        start = time.monotonic()
        while len(results) <= case.rounds[0] or (
            len(results) <= case.rounds[1] and time.monotonic() - start < case.seconds
        ):
            order = random.sample(ready, len(ready))
            taken = {c.name: self.worker(c.older).ask("time", c.name) for c in order}
            results.append({c.name: taken[c.name] for c in ready})
        for older in self.workers:
            self.worker(older).ask("clear", None)
        results = results[1:]  # the first round is a warm-up
        self.save(case, {c.name: [result[c.name] for result in results] for c in ready})

    def prepare(self, case: Case) -> list[Contender]:
        """The contenders that can run the case, after comparing their logits."""
        ready, logits = [], {}
        for contender in case.contenders:
            request = {"id": contender.name, "model": _key(contender, case), "traffic": contender.traffic}
            request |= {"task": case.task, "batch": case.batch, "length": case.length}
            if case.task == "flow":
                request["kept"] = contender.kept
            try:
                answer = self.worker(contender.older).ask("prepare", request)
            except RuntimeError as problem:
                self.note(f"{case.name}: {contender.name} was not measured: {problem}")
                continue
            ready.append(contender)
            if answer["logits"] is None:
                continue
            flat = [value for row in answer["logits"] for value in row]
            apart = _apart(flat, logits.setdefault(contender.traffic, flat))
            if apart > TOLERANCE[case.dtype]:
                self.note(f"{case.name}: logits of {contender.name} are {apart:.1e} of the largest from its peers'")
            if contender.traffic != "base" and "base" in logits and _apart(flat, logits["base"]) < 1e-2:
                self.note(f"{case.name}: the adapters of {contender.name} do nothing")
        return ready

    def note(self, text: str) -> None:
        print(f"! {text}", file=sys.stderr, flush=True)
        self.found["notes"].append(text)

    def model(self, contender: Contender, dtype: str) -> dict[str, Any]:
        """The request with which a worker loads a contender's model."""
        request: dict[str, Any] = {"kind": contender.kind, "dtype": dtype, "device": self.device}
        request["invocation"] = self.found["invocation"]
        if contender.adapters:
            library = self.folder / contender.checkpoint
            request["adapters"] = {str(n): str(adapter_folder(library, n)) for n in contender.adapters}
        request["path"] = str(self.folder / ("base" if contender.adapters else contender.checkpoint))
        return request

    def save(self, case: Case, times: dict[str, list[dict[str, Any]]]) -> None:
        entry = {"name": case.name, "group": case.group, "label": case.label, "task": case.task, "batch": case.batch}
        entry |= {"length": case.length, "dtype": case.dtype, "times": times}
        kept = [other for other in self.found["cases"] if other["name"] != case.name]
        self.found["cases"] = [*kept, entry]
        self.write()
        show(entry)

    def write(self) -> None:
        self.results.parent.mkdir(exist_ok=True)
        self.results.write_text(json.dumps(self.found, indent=1) + "\n")

    def loading(self, rounds: int) -> None:
        """Measure seconds and peak memory of loading, each time in a fresh process."""
        dtype = "bfloat16" if self.device == "cuda" or self.folder.name == "3b" else "float32"
        chosen = [contenders()[PLAIN]]
        for adapters in ("1-r16", "12-r16", "50-r16"):
            count = adapters.split("-")[0]
            chosen.append(replace(contenders(adapters)["switch base"], name=f"switch, {count} adapters"))
        chosen.append(replace(contenders()["PEFT LoRA"], name="PEFT, 12 adapters", adapters=tuple(range(12))))
        chosen.append(replace(contenders()["older base"], name="older, 12 adapters"))
        chosen = [c for c in chosen if c.older in self.pythons]
        times: dict[str, list[dict[str, Any]]] = {c.name: [] for c in chosen}
        for turn in range(rounds + 1):
            for c in random.sample(chosen, len(chosen)):
                request = json.dumps(self.model(c, dtype))
                command = [self.pythons[c.older], str(HERE / "worker.py"), "--threads", str(self.threads)]
                command += ["--load", request]
                run = subprocess.run(command, capture_output=True, text=True, env=_environment())
                if run.returncode:
                    self.note(f"loading {c.name} failed: {run.stderr.strip().splitlines()[-1]}")
                elif turn:  # the first turn fills the page cache
                    times[c.name].append(json.loads(run.stdout))
        times = {name: values for name, values in times.items() if values}
        weights = {c.name: _weights(self.folder / c.checkpoint) for c in chosen}
        self.found["loading"] = {"times": times, "bytes": weights}
        self.write()
        for name, values in times.items():
            seconds, peak = ([v[key] for v in values] for key in ("seconds", "peak"))
            print(f"  {name:28} {spread(seconds)} s, peak memory {max(peak) / 1e6:.0f} MB")

    def tools(self, rounds: int) -> None:
        """Measure seconds and peak memory of the checkpoint commands, each in its own process."""
        work, base, library = self.folder / "tools", self.folder / "base", self.folder / "library-12-r16"
        ours = [str(Path(self.pythons[False]).parent / "granite-switch")]
        commands = {
            "cp of base and adapters": ["cp", "-rL", str(base), str(library), str(work)],
            "compose": [*ours, "compose", base, "--adapters", library, "--base-name", "base", "--output", work / "new"],
            "export gguf": [*ours, "export", "gguf", self.folder / "switch-12-r16", "--output", work / "new.gguf"],
        }
        commands["export gguf"] += ["--outtype", "bf16", "--pre", "gpt-2"]
        if True in self.pythons:
            commands["older compose"] = older_command(self.pythons[True], base, library, work / "older")
            commands["upgrade of an older model"] = [*ours, "upgrade", self.folder / "older-12-r16", work / "upgraded"]
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for turn in range(rounds + 1):
            for name in random.sample(list(commands), len(commands)):
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                os.sync()
                try:
                    result = _command([str(part) for part in commands[name]]) | {"written": _written(work)}
                except RuntimeError as problem:
                    self.note(f"{name} failed: {problem}")
                    del commands[name]
                    continue
                if turn:
                    times[name].append(result)
        shutil.rmtree(work)
        self.found["tools"] = times = {name: values for name, values in times.items() if values}
        self.write()
        for name, values in times.items():
            seconds, peak = ([v[key] for v in values] for key in ("seconds", "peak"))
            print(f"  {name:28} {spread(seconds)} s, peak memory {max(peak) / 1e6:.0f} MB")


def _apart(values: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference, relative to the largest value."""
    return max(abs(a - b) for a, b in zip(values, reference, strict=True)) / max(map(abs, reference))


def ratios(times: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios, with its 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(times, reference, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(1000))
    return statistics.median(pairs), medians[25], medians[974]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g}-{max(values):.4g}]"


def show(entry: dict[str, Any]) -> None:
    """Print a finished case."""
    print(f"\n{entry['name']}: {len(next(iter(entry['times'].values())))} rounds")
    if entry["task"] == "flow":
        for name, runs in entry["times"].items():
            later, total = ([sum(run[key][start:]) for run in runs] for key, start in (("first", 1), ("total", 0)))
            print(f"  {name:32} first tokens of steps 2 to 5 {spread(later)} s, all {spread(total)} s")
        return
    seconds = {name: [run["seconds"] for run in runs] for name, runs in entry["times"].items()}
    for name, values in seconds.items():
        line = f"  {name:28} {statistics.median(values) * 1e3:9.2f} ms"
        if PLAIN in seconds and name != PLAIN:
            line += "   {:.3f} [{:.3f}-{:.3f}]".format(*ratios(values, seconds[PLAIN]))
        print(line, flush=True)


def _key(contender: Contender, case: Case) -> str:
    """The name of a contender's model within its worker."""
    return f"{contender.kind} {contender.checkpoint} {contender.adapters} {contender.copy} {case.dtype}"


def _environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | quiet | {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def _command(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory in bytes of a command.

    Raises:
        RuntimeError: the command failed, with the end of its output.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=_environment())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        errors.seek(0)
        said = errors.read().strip()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(said[-400:])
    return {"seconds": seconds, "peak": usage.ru_maxrss * 1024}


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _written(folder: Path) -> int:
    """Bytes of the files in a folder that are not hard links."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the main targets, on half the layers")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases, `loading` or `tools`, by name")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="of the base; half for --quick, else small")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--time", type=float, default=1, metavar="FACTOR", help="on the seconds that each case gets")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "out" / "bench", help="of the models")
    parser.add_argument("--older", default=str(HERE.parent / ".venv-old" / "bin" / "python"), metavar="PYTHON")
    parser.add_argument("--name", help="of the result file")
    options = parser.parse_args()

    cuda = options.device == "cuda"
    size = options.size or ("3b" if cuda else "half" if options.quick else "small")
    cases = list(cuda_cases() if cuda else quick_cases() if options.quick else full_cases())
    cases = [replace(c, seconds=c.seconds * options.time) for c in cases if re.search(options.only, c.name)]
    extra = [name for name in ("loading", "tools") if re.search(options.only, name) and not cuda]
    if options.list:
        print("\n".join([*(f"{case.seconds:5.0f} s  {case.name}" for case in cases), *extra]))
        return

    pythons = {False: sys.executable}
    notes = []
    if Path(options.older).exists() and not cuda:
        pythons[True] = options.older
    elif not cuda:
        notes.append(f"the older project was not measured: there is no {options.older} (`make bench-setup` makes it)")
        print(f"! {notes[0]}", file=sys.stderr)
    folder = options.folder / size
    make_models(options.folder, size, cases, extra, pythons)
    name = options.name or ("cuda" if cuda else "quick" if options.quick else "full")
    when = datetime.datetime.now(datetime.UTC)
    results = HERE / "results" / f"{when:%Y-%m-%d}-{name}.json"
    earlier = json.loads(results.read_text()) if options.only and results.exists() else {"cases": []}
    found = earlier | {
        "date": f"{when:%Y-%m-%d %H:%M} UTC",
        "command": " ".join(["python", "benchmarks/bench.py", *_without_only(sys.argv[1:])]),
        "machine": {"processor": _processor(), "system": platform.platform(), "threads": options.threads}
        | {"features": _features()},
        "device": options.device,
        "size": {"name": size, **SIZES[size]},
        "versions": {},
        "notes": notes,
        "invocation": _invocation(folder),
    }
    bench = Bench(folder, pythons, options.threads, options.device, results, found)
    try:
        for case in cases:
            bench.run(case)
        bench.close()
        if "loading" in extra:
            bench.loading(2 if options.quick else 5)
        if "tools" in extra:
            bench.tools(1 if options.quick else 5)
    finally:
        bench.close()
    print(f"\nwritten: {bench.results}")


def make_models(folder: Path, size: str, cases: Sequence[Case], extra: Sequence[str], pythons: dict[bool, str]) -> None:
    """Create missing models, in a separate process: a child's peak memory includes that of its parent."""
    wanted = {c.checkpoint for case in cases for c in case.contenders}
    wanted |= {"older-12-r16", "switch-12-r16"} if extra else set()
    wanted |= {"switch-1-r16", "switch-50-r16"} if "loading" in extra else set()
    sets = {name.split("-", 1)[1] for name in wanted if name != "base"}
    older = {name.split("-", 1)[1] for name in wanted if name.startswith("older") and True in pythons}
    print(f"models in {folder / size}", file=sys.stderr)
    command = [sys.executable, str(HERE / "synthetic.py"), str(folder), "--size", size]
    for names, more in ((sets - older, []), (older, ["--older", pythons.get(True, "")])):
        if names:
            chosen = [part for name in sorted(names) for part in ("--set", name)]
            run = subprocess.run([*command, *chosen, *more], capture_output=True, text=True, env=_environment())
            if run.returncode:
                sys.exit(f"making the models failed:\n{run.stderr}")


def _invocation(folder: Path) -> list[int]:
    """Token ids of the aLoRA adapters' invocation text."""
    code = "import sys; from tokenizers import Tokenizer; t = Tokenizer.from_file(sys.argv[1]);"
    code += "print(t.encode(sys.argv[2], add_special_tokens=False).ids)"
    command = [sys.executable, "-c", code, str(folder / "base" / "tokenizer.json"), INVOCATION]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _without_only(arguments: list[str]) -> list[str]:
    """The command without --only, which stands for the whole file of the day."""
    place = arguments.index("--only") if "--only" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _features() -> list[str]:
    """The processor's features that determine the speed of matmuls."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return [feature for feature in wanted if feature in words]


if __name__ == "__main__":
    main()
