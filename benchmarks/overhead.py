"""What the switch itself costs: a switch model and its plain base on the same weights in memory, in one process.

    python benchmarks/before.py ../before --size half          # composes both trees' models in out/before
    python benchmarks/overhead.py out/before/now/half 12-r16 5-mixed
    PYTHONPATH=../before/src python benchmarks/overhead.py out/before/before/half 12-r16 5-mixed

Two copies of the same weights differ by up to 6 % in decoding, by where they happen to be in memory; here both models
read one copy, so the ratios hold to about 1 %. Medians of the rounds' ratios, with the 10th and 90th percentile.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from before import CASES
from transformers import AutoModelForCausalLM, PreTrainedModel

import granite_switch.hf  # noqa: F401

ROUNDS, STEPS, ADAPTERS = 40, 4, 5


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def share(plain: PreTrainedModel, switch: PreTrainedModel) -> None:
    """Make the plain model read the switch model's weights, but for those whose shapes differ."""
    held = dict(switch.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in held and held[name].shape == parameter.shape:
            parameter.data = held[name].data


def prompt(model: PreTrainedModel, traffic: str, batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(16, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    if traffic != "base":
        for row in range(batch):
            number = row % ADAPTERS if traffic == "mixed" else 0
            ids[row, 0] = model.config.switch_spec.adapter(f"adapter{number:02}").token_id
    return ids


def timed(model: PreTrainedModel, ids: torch.Tensor, task: str) -> Callable[[], float]:
    """A function that runs the task once and returns its seconds, for decode the median of some steps."""

    def clock(**inputs: Any) -> float:
        start = time.perf_counter()
        model(use_cache=True, **inputs)
        return time.perf_counter() - start

    if task == "prefill":
        return lambda: clock(input_ids=ids, logits_to_keep=1)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = output.get("cache") or output.get("past_key_values")
    token = torch.full((len(ids), 1), 20)

    def decode() -> float:
        cache.crop(ids.shape[1] - int(cache.get_seq_length()))
        return statistics.median([clock(input_ids=token, past_key_values=cache) for _ in range(STEPS + 1)][1:])

    return decode


def main(home: str, sets: list[str]) -> None:
    plain = load(f"{home}/base")
    for adapters in sets:
        switch = load(f"{home}/switch-{adapters}")
        share(plain, switch)
        for traffic, task, batch, length in CASES:
            if traffic == "alora" or (adapters != sets[0] and traffic != "mixed"):
                continue
            ours = timed(switch, prompt(switch, traffic, batch, length), task)
            base = timed(plain, prompt(switch, "base", batch, length), task)
            ratios = []
            for _ in range(ROUNDS + 2):
                times = {run: run() for run in random.sample([ours, base], 2)}
                ratios.append(times[ours] / times[base])
            low, *_, high = statistics.quantiles(ratios[2:], n=10)
            median = statistics.median(ratios[2:])
            print(f"{task} {batch} x {length}, {traffic}, {adapters}: {median:.3f} [{low:.2f}-{high:.2f}]", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    main(sys.argv[1], sys.argv[2:])
