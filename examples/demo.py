"""Compose the sample, generate with each of its adapters, and show where each token was routed."""

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "sample"))

import world  # the sample's tasks
from rich.console import Console
from transformers.utils import logging

from granite_switch import compose
from granite_switch.cli import trace
from granite_switch.cli.compose import summary
from granite_switch.cli.console import console
from granite_switch.cli.generate import encode, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "granite-switch-sample")
    parser.add_argument("--svg", type=Path, help="also draw the trace of query_rewrite, for the README")
    options = parser.parse_args()
    output: Path = options.output
    logging.disable_progress_bar()

    plan = compose(ROOT / "sample" / "base", [ROOT / "sample" / "library"], output, base_name=NAME, force=True)
    console.print(summary(plan))

    model, tokenizer = load(str(output), device_map="auto")
    for name in ("base", *plan.spec.names):
        example = world.examples("answer" if name == "base" else name, 1, seed=7)[0]
        prompt = encode(tokenizer, example.messages, example.documents, name)
        sequence = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0].tolist()
        length = prompt["input_ids"].shape[1]
        answer = tokenizer.decode(sequence[length:], skip_special_tokens=True)
        console.rule(f"[bold]{name}")
        tokens = trace.trace(sequence, length, plan.spec, lambda i: tokenizer.decode([i]))
        trace.show(tokens, plan.spec, console)
        if options.svg and name == "query_rewrite":
            picture = Console(record=True, width=100, file=io.StringIO())
            trace.show(tokens, plan.spec, picture)
            options.svg.parent.mkdir(parents=True, exist_ok=True)
            picture.save_svg(str(options.svg), title=f"adapter_name={name!r}")
        verdict = "right" if world.is_right(example, answer) else f"expected {example.expected!r}"
        console.print(f"\n  answer: {answer!r} ({verdict})\n", markup=False)
        page = output.parent / f"trace-{name}.html"
        page.write_text(trace.page(tokens, plan.spec), encoding="utf-8")
    console.print(f"model: {output}, traces as web pages: {output.parent}/trace-*.html")


NAME = "granite-switch-sample"

if __name__ == "__main__":
    main()
