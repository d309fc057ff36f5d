"""Compare the transformers backend with another commit's in one run: times relative to the plain base.

    git worktree add --detach ../before COMMIT
    python benchmarks/before.py ../before [--python PYTHON] [--rounds 12] [--size small]

Each tree composes the base and the adapters itself and runs in its own process. In each round the tasks alternate in
random order. The output is the median of the rounds' ratios, with the 10th and 90th percentile. PYTHON is the
interpreter of an environment whose transformers release works with both trees.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CASES = [
    ("base", "prefill", 1, 512),
    ("lora", "prefill", 1, 512),
    ("alora", "prefill", 1, 512),
    ("mixed", "prefill", 8, 64),
    ("base", "decode", 1, 128),
    ("lora", "decode", 1, 128),
    ("base", "decode", 8, 128),
    ("mixed", "decode", 8, 128),
    ("mixed", "decode", 32, 64),
]


class Tree:
    """A worker process that runs the code of one tree."""

    def __init__(self, name: str, tree: Path, python: str, threads: int) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks/worker.py"), "--threads", str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, name: str, request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({name: request}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer


def make(tree: Path, folder: Path, python: str, size: str, sets: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
    command = [python, str(tree / "benchmarks/synthetic.py"), str(folder), "--size", size]
    chosen = [word for name in sets for word in ("--set", name)]
    subprocess.run([*command, *chosen], env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--size", default="small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=["12-r16", "5-mixed"])
    parser.add_argument("--folder", type=Path, default=ROOT / "out/before")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="part of a case's name: `decode`, `mixed`, `8 x 128`")
    options = parser.parse_args()
    trees = {"before": options.before.resolve(), "now": ROOT}
    for name, tree in trees.items():
        make(tree, options.folder / name, options.python, options.size, options.sets)
    workers = {name: Tree(name, tree, options.python, options.threads) for name, tree in trees.items()}
    home = options.folder / "now" / options.size
    ids = json.loads(subprocess.check_output([options.python, "-c", _INVOCATION, str(home / "base")], text=True))
    results: dict[str, dict[str, list[float]]] = {}
    for adapters in options.sets:
        for name, worker in workers.items():
            path = options.folder / name / options.size / f"switch-{adapters}"
            worker.ask("load", _model("switch", path, ids, options.dtype, f"switch-{adapters}"))
        workers["now"].ask("load", _model("granite", home / "base", ids, options.dtype, "plain"))
        for traffic, task, batch, length in CASES:
            if adapters != options.sets[0] and traffic != "mixed":
                continue
            case = f"{task} {batch} x {length}, {traffic}, {adapters}"
            if options.only not in case:
                continue
            results[case] = _measure(workers, (traffic, task, batch, length), f"switch-{adapters}", options.rounds)
            print(case, {name: _shown(values) for name, values in results[case].items()}, flush=True)
        for worker in workers.values():
            worker.ask("drop", f"switch-{adapters}")
        workers["now"].ask("drop", "plain")
    print(json.dumps({case: {n: _shown(v) for n, v in found.items()} for case, found in results.items()}, indent=1))


_INVOCATION = """
import json, sys
from tokenizers import Tokenizer
text = "<|start_of_role|>assistant<|end_of_role|>"
print(json.dumps(Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode(text, add_special_tokens=False).ids))
"""


def _model(kind: str, path: Path, invocation: list[int], dtype: str, key: str) -> dict[str, Any]:
    return {"key": key, "kind": kind, "path": str(path), "dtype": dtype, "invocation": invocation}


def _measure(
    workers: dict[str, Tree], case: tuple[str, str, int, int], key: str, rounds: int
) -> dict[str, list[float]]:
    traffic, task, batch, length = case
    asked = {"task": task, "batch": batch, "length": length}
    contenders = [("plain", workers["now"], "plain", "base")]
    contenders += [(name, worker, key, traffic) for name, worker in workers.items()]
    for name, worker, model, kind in contenders:
        worker.ask("prepare", {"id": name, "model": model, "traffic": kind, **asked})
    times: dict[str, list[float]] = {name: [] for name, *_ in contenders}
    for _ in range(rounds + 1):
        for name, worker, *_ in random.sample(contenders, len(contenders)):
            times[name].append(worker.ask("time", name)["seconds"])
    for worker in workers.values():
        worker.ask("clear", None)
    plain = times.pop("plain")[1:]
    return {name: [t / p for t, p in zip(values[1:], plain, strict=True)] for name, values in times.items()}


def _shown(values: list[float]) -> str:
    low, *_, high = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.3f} [{low:.2f}-{high:.2f}]"


if __name__ == "__main__":
    main()
