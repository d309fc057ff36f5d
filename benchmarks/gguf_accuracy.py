"""Accuracy of the sample in llama.cpp: `python benchmarks/gguf_accuracy.py MODEL [--examples N] [--outtypes f32 q8_0]`.

Held-out examples and scoring of sample/evaluate.py, greedy, with the engine's defaults (a float16 cache).
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "sample"), str(ROOT / "examples")]

import world
from llama_cpp import Llama
from with_llama_cpp import adapters, answer

from granite_switch.gguf import OUTTYPES, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the composed sample")
    parser.add_argument("--examples", type=int, default=200, help="held-out examples for each task")
    parser.add_argument("--outtypes", nargs="+", default=["f32", "q8_0"], choices=OUTTYPES)
    parser.add_argument("--threads", type=int, default=1, help="engine threads; more help only on an idle machine")
    options = parser.parse_args()

    rows: dict[str, list[str]] = {}
    for outtype in options.outtypes:
        with tempfile.TemporaryDirectory() as folder:
            export(options.model, Path(folder) / "sample.gguf", outtype=outtype)
            llm = Llama(f"{folder}/sample.gguf", n_ctx=2048, n_threads=options.threads, verbose=False)
            for name in ("base", *adapters(llm)):
                task = "answer" if name == "base" else name
                share = accuracy(llm, name, world.examples(task, options.examples))
                rows.setdefault(task, []).append(f"{share:.1%}")
                print(outtype, task, rows[task][-1], file=sys.stderr)
            llm.close()
    print("| task |", " | ".join(f"llama.cpp, {outtype}" for outtype in options.outtypes), "|")
    print("|---" * (len(options.outtypes) + 1) + "|")
    for task, cells in rows.items():
        print("|", " | ".join([task, *cells]), "|")


def accuracy(llm: Llama, name: str, examples: list[world.Example]) -> float:
    """The share of examples whose whole answer is right."""
    right = 0
    for example in examples:
        text = answer(llm, example.messages, name, documents=example.documents)
        right += world.is_right(example, text)
    return right / len(examples)


if __name__ == "__main__":
    main()
