"""Accuracy on held-out examples: `python sample/evaluate.py [--examples N] [--composed MODEL_DIR]`.

Each task runs on the plain base, on the base with the task's adapter in PEFT, and on a composed checkpoint. Decoding is
greedy, with padding on the left. An answer counts only if all of it is right. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import world
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE = HERE / "base"
BATCH = 50


def adapter_folders() -> dict[str, Path]:
    """Adapter name -> its folder, library/<name>/<base>/<technology>."""
    found = {path.parents[2].name: path.parent for path in HERE.glob("library/*/*/*/adapter_config.json")}
    return {task: found[task] for task in world.TASKS if task in found}


def render(tokenizer, example: world.Example, adapter_name: str | None = None) -> str:
    """The prompt of an example."""
    select = {"adapter_name": adapter_name} if adapter_name else {}
    return tokenizer.apply_chat_template(
        example.messages, documents=example.documents, add_generation_prompt=True, tokenize=False, **select
    )


@torch.no_grad()
def answers(model, tokenizer, examples: list[world.Example], adapter_name: str | None = None) -> list[str]:
    """The answers that `model` generates."""
    texts = []
    for group in (examples[i : i + BATCH] for i in range(0, len(examples), BATCH)):
        prompts = [render(tokenizer, example, adapter_name) for example in group]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        longest = max(len(tokenizer(example.expected)["input_ids"]) for example in examples)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 4)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(model, tokenizer, examples: list[world.Example], adapter_name: str | None = None) -> float:
    """The share of examples that `model` answers correctly."""
    return sum(map(world.is_right, examples, answers(model, tokenizer, examples, adapter_name))) / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="held-out examples for each task")
    parser.add_argument("--composed", type=Path, help="a checkpoint composed of sample/base and sample/library")
    options = parser.parse_args()
    torch.set_num_threads(2)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    folders = adapter_folders()
    held_out = {task: world.examples(task, options.examples) for task in ("answer", *folders)}
    figures: dict[str, list[str]] = {task: [] for task in held_out}

    def note(task: str, value: float | None) -> None:
        figures[task].append("" if value is None else f"{value:.1%}")
        print(task, *figures[task], file=sys.stderr)

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for task, examples in held_out.items():
        note(task, accuracy(base, tokenizer, examples))
    note("answer", None)
    for task, folder in folders.items():
        adapted = PeftModel.from_pretrained(base, folder)
        note(task, accuracy(adapted, tokenizer, held_out[task]))
        ranks = adapted.peft_config["default"]
        figures[task].insert(0, f"{folder.name}, {ranks.r}")
        base = adapted.unload()
    figures["answer"].insert(0, "base model")
    if options.composed:
        import granite_switch.hf  # noqa: F401  registers the Auto classes

        tokenizer = AutoTokenizer.from_pretrained(options.composed)
        model = AutoModelForCausalLM.from_pretrained(options.composed, dtype=torch.float32)
        for task, examples in held_out.items():
            note(task, accuracy(model, tokenizer, examples, adapter_name=task if task in folders else None))

    print("| task | technology, rank | base | PEFT |" + (" composed |" if options.composed else ""))
    print("|---|---|---|---|" + ("---|" if options.composed else ""))
    for task, cells in figures.items():
        print("|", " | ".join([task, *cells]), "|")


if __name__ == "__main__":
    main()
