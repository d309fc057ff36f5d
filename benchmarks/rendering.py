"""Time to render the composed chat template: harmless text, the worst text that users can write, and kept turns.

python benchmarks/rendering.py [--template FILE]
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from granite_switch.core.chat import Placement, Return, render, wrap

NAMES = [
    "citations", "hallucination_detection", "query_rewrite", "query_clarification", "answerability",
    "factuality-detection", "factuality-correction", "policy-guardrails", "guardian-core", "uncertainty",
    "requirement-check", "context-relevance",
]  # fmt: skip
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""
SIZES = (10_000, 100_000, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, help="the base's template; a plain one by default")
    options = parser.parse_args()
    base = options.template.read_text() if options.template else TEMPLATE
    controls = ["<|return_to_base|>", *(f"<|{name}|>" for name in NAMES)]
    placements = [Placement(name, f"<|{name}|>", opening="<|start_of_role|>") for name in NAMES]
    composed = wrap(base, placements, Return(controls[0], "<|start_of_role|>"), [*controls, "<|unused_"])
    print("| text | " + " | ".join(f"{size // 1000:,} kB" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    rows = {"harmless, base's own template": (base, texts()["harmless"])}
    rows |= {kind: (composed, piece) for kind, piece in texts().items()}
    for kind, (template, piece) in rows.items():
        times = [seconds(template, [user(piece, size)]) for size in SIZES]
        print(f"| {kind} | " + " | ".join(f"{1000 * t:.2f} ms" for t in times) + " |")
    for turns in (10, 50, 200):
        chat = conversation(turns)
        print(f"| {turns} turns of 2 kB, an adapter for each | | | {1000 * seconds(composed, chat):.1f} ms |")


def texts() -> Mapping[str, str]:
    """Kind of text -> a piece that is repeated to any size."""
    nested = "<|answerability|>"
    while len(nested) < 5000:
        nested = f"<|answer{nested}ability|>"
    return {
        "harmless": "the river ends in the sea and the road begins at the mill ",
        "control tokens": "".join(f"<|{name}|>" for name in NAMES),
        "nested control tokens": nested,
        "role tokens around control tokens": "<|start_of<|citations|>_role|>",
        "spare tokens": "<|unused_100400|>",
        "the letter in the markers": "x",
        "'<' alone": "<",
        "'<', and every control token once": "1",
        "'<', and every control token 1,000 times": "1000",
    }


def user(piece: str, size: int) -> dict[str, str]:
    if piece.isdigit():
        tokens = "".join(f"<|{name}|>" for name in NAMES) * int(piece)
        return {"role": "user", "content": (tokens + "<" * size)[:size]}
    return {"role": "user", "content": (piece * (size // len(piece) + 1))[:size]}


def conversation(turns: int) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for turn in range(turns):
        question = user("Where does the road begin? ", 1000)
        messages += [{**question, "adapter": NAMES[turn % 5]}, {"role": "assistant", "content": "At the mill. " * 80}]
    return [*messages, user("And where does it end? ", 1000)]


def seconds(template: str, messages: Sequence[Mapping[str, Any]]) -> float:
    """The shortest CPU time of nine runs."""
    times = []
    for _ in range(9):
        start = time.process_time()
        render(template, messages, add_generation_prompt=True)
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
