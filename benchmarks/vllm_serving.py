"""Compare the base, the switch model and vLLM's own multi-LoRA in vLLM, alternating in one process.

    .venv-vllm/bin/python benchmarks/vllm_serving.py throughput [--size half] [--rounds 7] [--compiled]
    .venv-vllm/bin/python benchmarks/vllm_serving.py prefix     [--size half]
    .venv/bin/python      benchmarks/vllm_serving.py plot       (needs matplotlib)

`throughput`: tokens per second in prefill and decode, relative to the base's in the same round (median
[lowest-highest]). `prefix`: five adapters check a conversation of about 2,000 tokens in turn; measured are the prompt
tokens from the cache, as vLLM counts them, and the time to first token. vLLM's own LoRA gets the same five adapters as
plain LoRA, because it does not load aLoRA. Results go to benchmarks/results/DATE-vllm-COMMAND-SIZE.json; `plot` draws
the newest result of `prefix`.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from synthetic import INVOCATION, SIZES, adapter_folder, make_base, make_library, once

RESULTS = Path(__file__).parent / "results"
ADAPTERS = 5
CASES = {  # name -> (prompts, tokens of each, new tokens)
    "prefill 1x512": (1, 512, 1),
    "prefill 8x128": (8, 128, 1),
    "decode 1": (1, 16, 48),
    "decode 8": (8, 16, 48),
    "decode 32": (32, 16, 48),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["throughput", "prefix", "plot"])
    options = settings(parser)
    if options.command == "plot":
        plot(json.loads(max(RESULTS.glob("*-vllm-prefix*.json")).read_text())["result"])
        return
    folder = models(options.folder / options.size, options.size)
    report(options.command, options, {"throughput": throughput, "prefix": prefix}[options.command](folder, options))


def settings(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What every benchmark of vLLM's takes."""
    parser.add_argument("--folder", type=Path, default=Path("out/bench-vllm"))
    parser.add_argument("--size", choices=SIZES, default="half")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="torch.compile; vLLM's own LoRA on CPU runs without it")
    return parser.parse_args()


def report(name: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    import torch
    import vllm

    now = datetime.datetime.now(datetime.UTC)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    head = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "command": sys.argv, **versions}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-vllm-{name}-{options.size}.json"
    path.write_text(json.dumps(head | {"size": options.size, "dtype": options.dtype, "result": result}, indent=1))
    print(path)


def models(folder: Path, size: str) -> Path:
    """The base, a library of five aLoRAs, the same five as LoRA, and the switch model; created once."""
    folder.mkdir(parents=True, exist_ok=True)
    once(folder / "base", lambda part: make_base(part, size))
    once(folder / "lora", lambda part: make_library(part, folder / "base", size, f"{ADAPTERS}-r16"))
    once(folder / "alora", lambda part: as_alora(folder, part))

    def compose(part: Path) -> None:
        from granite_switch import compose

        compose(folder / "base", [folder / "alora" / f"adapter{i}" for i in range(ADAPTERS)], part)

    once(folder / "switch", compose)
    return folder


def as_alora(folder: Path, part: Path) -> None:
    from tokenizers import Tokenizer

    invocation = Tokenizer.from_file(str(folder / "base" / "tokenizer.json")).encode(INVOCATION).ids
    for i in range(ADAPTERS):
        copy = part / f"adapter{i}"
        shutil.copytree(adapter_folder(folder / "lora", i), copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": invocation}))


def engine(model: Path, options: argparse.Namespace, **more: Any) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "enforce_eager": not options.compiled,
        "block_size": 32,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
    }
    return LLM(str(model), **{**settings, **more})


def lora_engine(folder: Path, options: argparse.Namespace, **more: Any) -> Any:
    return engine(
        folder / "base", options, enable_lora=True, max_loras=ADAPTERS, max_lora_rank=16, enforce_eager=True, **more
    )


def requests(folder: Path) -> list[Any]:
    from vllm.lora.request import LoRARequest

    return [LoRARequest(f"a{i}", i + 1, str(adapter_folder(folder / "lora", i))) for i in range(ADAPTERS)]


def timed(llm: Any, prompts: list[list[int]], new: int, loras: list[Any] | None = None) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    llm.generate(inputs, sampling, use_tqdm=False, lora_request=loras)
    return time.perf_counter() - start


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    quiet = {"enable_prefix_caching": False}
    base = engine(folder / "base", options, **quiet)
    switch = engine(folder / "switch", options, **quiet)
    loras = lora_engine(folder, options, **quiet)
    spec = switch.llm_engine.model_config.hf_config.switch_spec
    tokens = [adapter.token_id for adapter in spec.adapters]

    def prompts(count: int, length: int, controls: list[int]) -> list[list[int]]:
        draw = random.Random(count * length)
        texts = [[draw.randrange(10, 300) for _ in range(length)] for _ in range(count)]
        return [[controls[i % len(controls)], *t[1:]] if controls else t for i, t in enumerate(texts)]

    contenders = {  # name -> (engine, control tokens in turn, requests of vLLM's own LoRA in turn)
        "base": (base, [], []),
        "base again": (base, [], []),
        "switch, base traffic": (switch, [], []),
        "switch, one adapter": (switch, tokens[:1], []),
        "switch, five mixed": (switch, tokens, []),
        "vLLM LoRA, five mixed": (loras, [], requests(folder)),
    }

    def run(name: str, count: int, length: int, new: int) -> float:
        llm, controls, theirs = contenders[name]
        turns = [theirs[i % ADAPTERS] for i in range(count)] if theirs else None
        return timed(llm, prompts(count, length, controls), new, turns)

    result: dict[str, Any] = {}
    for case, work in CASES.items():
        for name in contenders:
            run(name, *work)
        rounds = []
        for _ in range(options.rounds):
            order = random.sample(list(contenders), len(contenders))
            rounds.append({name: run(name, *work) for name in order})
        result[case] = {
            name: {
                "seconds": statistics.median(r[name] for r in rounds),
                "speed": spread([r["base"] / r[name] for r in rounds]),
            }
            for name in contenders
        }
        print(case, *(f"\n  {name:24} {row['speed']}" for name, row in result[case].items()), flush=True)
    return result


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def prefix(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    switch, loras = engine(folder / "switch", options), lora_engine(folder, options)
    tokenizer = switch.get_tokenizer()
    words = "the river ends in the sea and the road begins at the mill "
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": words * 14} for i in range(9)]

    def render(name: str | None) -> list[int]:
        more = {"adapter_name": name} if name else {}
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)
        return tokenizer.encode(text, add_special_tokens=False)

    def ask(llm: Any, tokens: list[int], request: Any = None) -> dict[str, Any]:
        start = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False, lora_request=request)
        seconds = time.perf_counter() - start
        cached = output.num_cached_tokens or 0
        return {"tokens": len(tokens), "cached": cached, "share": cached / len(tokens), "first_token_s": seconds}

    ask(switch, list(range(10, 300)))
    ask(loras, list(range(10, 300)))
    names = switch.llm_engine.model_config.hf_config.switch_spec.names
    plain = render(None)
    result = {
        "switch": [ask(switch, plain), *(ask(switch, render(name)) for name in names)],
        "vLLM LoRA": [ask(loras, plain), *(ask(loras, plain, request) for request in requests(folder))],
    }
    for name, rows in result.items():
        for step, row in zip(["answer", *(f"check {i}" for i in range(1, ADAPTERS + 1))], rows, strict=True):
            print(
                f"{name:10} {step:8} {row['tokens']:5} tokens {row['share']:6.1%} cached {row['first_token_s']:.3f} s"
            )
    return result


def plot(result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for shift, (name, rows) in zip((-0.2, 0.2), result.items(), strict=True):
        axes.bar([i + shift for i in range(len(rows))], [row["first_token_s"] for row in rows], 0.4, label=name)
    axes.set_xticks(range(ADAPTERS + 1), ["answer", *(f"check {i}" for i in range(1, ADAPTERS + 1))])
    axes.set_ylabel("time to first token, s")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(RESULTS.parent.parent / "docs" / "images" / "vllm-prefix.svg")


if __name__ == "__main__":
    main()
