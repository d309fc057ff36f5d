"""Greedy answers to the same prompts in PEFT, transformers, vLLM and llama.cpp, for real_model.py.

vLLM has its own environment, so this file is also a program that reads prompts and writes answers as JSON.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

TOKENS = 48  # at most, per answer
Prompts = Mapping[str, Sequence[Sequence[int]]]  # adapter, or "base" -> token ids of its prompts
Answers = dict[str, list[list[int]]]


def in_transformers(model: Any, prompts: Sequence[Sequence[int]], pad: int, batch: int = 10) -> list[list[int]]:
    """Answers of a transformers model or a PEFT model."""
    import torch

    answers = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
        answers += [_ended(line, pad) for line in out[:, width:].tolist()]
    return answers


def in_switch(model: Any, prompts: Prompts, pad: int) -> Answers:
    """The switch model's answers: control tokens in the prompts select the adapter."""
    return {name: in_transformers(model, some, pad) for name, some in prompts.items()}


def in_peft(base: Path, adapters: Mapping[str, Path], prompts: Prompts, pad: int) -> Answers:
    """The reference answers: PEFT with each adapter loaded onto the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    answers = {"base": in_transformers(model, prompts["base"], pad)}
    for name, folder in adapters.items():
        peft = PeftModel.from_pretrained(model, folder).eval()
        answers[name] = in_transformers(peft, prompts[name], pad)
        model = peft.unload()
    return answers


def in_vllm(python: Path, composed: Path, prompts: Prompts, pad: int, work: Path) -> Answers:
    """vLLM's answers, from a process in its own environment."""
    asked, answered = work / "prompts.json", work / "vllm.json"
    asked.write_text(json.dumps({"model": str(composed), "prompts": prompts, "end": pad}))
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run([python, __file__, str(asked), str(answered)], check=True, env=quiet)
    return dict(json.loads(answered.read_text()))


def vllm_program(asked: Path, answered: Path) -> None:
    from vllm import LLM, SamplingParams

    task = json.loads(asked.read_text())
    llm = LLM(task["model"], dtype="float32", max_model_len=1024, enforce_eager=True, enable_prefix_caching=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, stop_token_ids=[task["end"]])
    answers = {}
    for name, prompts in task["prompts"].items():
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
        answers[name] = [_ended(list(output.outputs[0].token_ids), task["end"]) for output in outputs]
    answered.write_text(json.dumps(answers))


def in_llama_cpp(file: Path, prompts: Prompts, end: int) -> Answers:
    """llama.cpp's answers, from a GGUF file."""
    import torch
    from llama_cpp import GGML_TYPE_F32, Llama

    threads = torch.get_num_threads()  # as the other engines use
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    llm = Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, **cache)
    answers: Answers = {}
    for name, some in prompts.items():
        answers[name] = []
        for ids in some:
            answer: list[int] = []
            for token in llm.generate(list(ids), temp=0.0, repeat_penalty=1.0):
                if token == end or len(answer) == TOKENS:
                    break
                answer.append(token)
            answers[name].append(answer)
    return answers


def _ended(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def gap(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], end: int) -> float:
    """Difference between a switch model's logits of the two tokens at which two answers first differ."""
    import torch

    pairs = enumerate(zip_longest(one, other, fillvalue=end))
    at, differing = next((i, list(pair)) for i, pair in pairs if pair[0] != pair[1])
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *other[:at]]])).logits[0, -1, differing]
    return float(logits.diff().abs())


def perplexity(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """A model's perplexity per token over some texts."""
    import torch

    total, count = 0.0, 0
    for ids in texts:
        tokens = torch.tensor([list(ids)])
        with torch.no_grad():
            total += float(model(tokens, labels=tokens).loss) * (len(ids) - 1)
        count += len(ids) - 1
    return math.exp(total / count)


def time_to_first_token(model: Any, composed: Path, text: str, checks: Sequence[str], adapter: str) -> dict[str, float]:
    """Total seconds to the first tokens of all checks: on one conversation's cache, and prefilled again for each.

    `equal` is 1 if both ways gave the same tokens.
    """
    from granite_switch.hf import Conversation

    shared = Conversation(model, composed)
    shared.say(text, max_new_tokens=1)
    started = time.monotonic()
    first = [shared.say(check, adapter, aside=True, max_new_tokens=1).ids for check in checks]
    with_cache = time.monotonic() - started
    started = time.monotonic()
    again = []
    for check in checks:
        alone = Conversation(model, composed)
        alone.messages, alone.ids = list(shared.messages), shared.ids
        again.append(alone.say(check, adapter, aside=True, max_new_tokens=1).ids)
    without = time.monotonic() - started
    return {"shared": with_cache, "alone": without, "tokens": float(len(shared.ids)), "equal": float(first == again)}


if __name__ == "__main__":
    vllm_program(Path(sys.argv[1]), Path(sys.argv[2]))
