"""A process that holds models and times tasks: one JSON request per line on stdin, one answer per line on stdout.

It runs in any environment with torch and transformers, so contenders with different requirements can be measured in the
same rounds. The parent (`bench.py`) lets only one worker run at a time, and does the statistics.

    python benchmarks/worker.py --load '{"kind": "granite", "path": ..., "dtype": "float32"}'

loads one model in a fresh process and prints seconds and memory instead.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
import transformers.models.granite.modeling_granite  # noqa: F401  (before loading is timed)
from transformers import AutoModelForCausalLM

INVOKED = 8  # tokens from the start of an aLoRA's invocation to the end of the prompt
LORAS, ALORAS = range(5), range(5, 9)  # adapter numbers, as in synthetic.py


class Model:
    """One model, and its inputs for each kind of traffic.

    Args:
        kind: granite, switch (format 1 or legacy), peft or merged.
        path: of the base or the checkpoint.
        adapters: folders of PEFT adapters, by number, for peft and merged.
        invocation: token ids of the aLoRA adapters' invocation.
    """

    def __init__(
        self,
        kind: str,
        path: str,
        dtype: str,
        device: str = "cpu",
        adapters: dict[str, str] | None = None,
        invocation: list[int] | None = None,
    ) -> None:
        self.kind, self.invocation = kind, invocation or []
        if kind == "switch":
            import granite_switch.hf  # noqa: F401  (registers the Auto classes)
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
        if kind in ("peft", "merged"):
            from peft import PeftModel

            for number, folder in (adapters or {}).items():
                if isinstance(model, PeftModel):
                    model.load_adapter(folder, _name(int(number)), autocast_adapter_dtype=False)
                else:
                    model = PeftModel.from_pretrained(model, folder, _name(int(number)), autocast_adapter_dtype=False)
            if kind == "merged":
                model = model.merge_and_unload()
        self.model = model.eval()
        self.forward: Callable[..., Any] = model.base_model.model if kind == "peft" else model
        self.device = torch.device(device)
        self.synchronize()
        self.seconds = time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def prompt(self, traffic: str, batch: int, length: int, seed: int = 0) -> torch.Tensor:
        """The prompt of a case, [B, S]: equal for all models except for a switch model's control tokens."""
        ids = tokens(batch, length, seed)
        ids[:, 0] = self.invocation[0]  # the token that opens a turn
        ids[:, length - INVOKED : length - INVOKED + len(self.invocation)] = torch.tensor(self.invocation)
        if self.kind == "switch":
            for row, number in enumerate(adapters_of(traffic, batch)):
                if number is not None:
                    ids[row, length - INVOKED if number in ALORAS else 0] = self.control(number)
        return ids.to(self.device)

    def control(self, number: int | None) -> int:
        """The control token of an adapter; None: the return-to-base token."""
        config = self.model.config
        if hasattr(config, "switch_spec"):  # format 1
            spec = config.switch_spec
            return (
                next(t for t, slot in spec.control_slots.items() if not slot)
                if number is None
                else spec.adapter(_name(number)).token_id
            )
        return config.adapter_token_ids[config.adapter_names.index(_name(number))]

    @contextlib.contextmanager
    def serving(self, traffic: str, batch: int, tail: int = INVOKED) -> Iterator[None]:
        """A context with PEFT's hooks for a batch, set once as its `generate` does; empty for other models.

        Args:
            tail: tokens from an aLoRA's invocation to the end of the input.
        """
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.kind == "peft":
                numbers = adapters_of(traffic, batch)
                if traffic == "base":
                    stack.enter_context(self.model.disable_adapter())
                elif traffic == "mixed":
                    names = [_name(number) for number in numbers]
                    stack.enter_context(self.model.base_model._enable_peft_forward_hooks(adapter_names=names))
                else:
                    self.model.set_adapter(_name(numbers[0]))
                    if traffic == "alora":
                        offsets = {"alora_offsets": [tail] * batch}
                        stack.enter_context(self.model.base_model._enable_peft_forward_hooks(**offsets))
            yield

    def clock(self, call: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens, [B, S]."""
    return torch.randint(16, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapters_of(traffic: str, batch: int) -> list[int | None]:
    """The adapter of each row of a batch; None is the base."""
    numbers = {"base": [None], "lora": LORAS[:1], "alora": ALORAS[:1], "mixed": LORAS}[traffic]
    return [numbers[row % len(numbers)] for row in range(batch)]


def _name(number: int | None) -> str:
    return f"adapter{number:02}"


def cache_of(output: Any) -> Any:
    """The cache in a forward's output; its name is `cache` since transformers 5.24."""
    return output["cache"] if "cache" in output else output["past_key_values"]


class Prefill:
    """One forward over the whole prompt."""

    def __init__(self, model: Model, traffic: str, batch: int, length: int, **_: Any) -> None:
        self.model, self.traffic, self.batch = model, traffic, batch
        self.ids = model.prompt(traffic, batch, length)
        self.logits = self._run()[:, -1]

    def _run(self) -> torch.Tensor:
        return self.model.forward(input_ids=self.ids, use_cache=True, logits_to_keep=1).logits

    def __call__(self) -> dict[str, Any]:
        return {"seconds": self.model.clock(self._run)}


class Decode:
    """Single tokens after a cached prompt: the median time of some steps, afterwards cropped from the cache."""

    def __init__(self, model: Model, traffic: str, batch: int, length: int, steps: int = 6, **_: Any) -> None:
        self.model, self.traffic, self.batch, self.length = model, traffic, batch, length
        prompt = model.prompt(traffic, batch, length)
        self.cache = cache_of(model.forward(input_ids=prompt, use_cache=True, logits_to_keep=1))
        self.next = tokens(batch, steps + 1, seed=1).to(model.device)
        self.logits = self._step(0)[:, -1]

    def _step(self, step: int) -> torch.Tensor:
        ids = self.next[:, step : step + 1]
        return self.model.forward(input_ids=ids, past_key_values=self.cache, use_cache=True).logits

    def __call__(self) -> dict[str, Any]:
        self.cache.crop(self.length - int(self.cache.get_seq_length()))
        self._step(0)  # warms up after other contenders ran
        times = [self.model.clock(lambda step=step: self._step(step)) for step in range(1, self.next.shape[1])]
        return {"seconds": statistics.median(times)}


class Generate:
    """`generate` with a static cache, which transformers compiles: the median time between new tokens."""

    def __init__(self, model: Model, traffic: str, batch: int, length: int, steps: int = 32, **_: Any) -> None:
        from transformers import CompileConfig

        self.model, self.steps = model, steps
        self.ids = model.prompt(traffic, batch, length)
        # transformers itself compiles only on CUDA
        self.compile = CompileConfig(**({} if model.device.type == "cuda" else {"mode": "default"}))
        self.compile._compile_all_devices = True
        for _ in range(3):  # compiles and records CUDA graphs
            self()
        self.logits = model.forward(input_ids=self.ids, logits_to_keep=1).logits[:, -1]

    def __call__(self) -> dict[str, Any]:
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.model.synchronize()
            stamps.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        self.model.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            min_new_tokens=self.steps,
            max_new_tokens=self.steps,
            do_sample=False,
            cache_implementation="static",
            compile_config=self.compile,
            stopping_criteria=[stamp],
        )
        times = [after - before for before, after in pairwise(stamps[1:])]
        return {"seconds": statistics.median(times)}


class Flow:
    """Five steps over one conversation (rewrite, answer by the base, three checks), each with its own answer.

    With `kept`, one cache grows through all steps. Without it every step prefills its whole input, as is necessary if
    the adapter acts on the conversation itself (LoRA). The tokens are fixed, so that all contenders do the same work.
    """

    STEPS = (("rewrite", 5), ("answer", None), ("check 1", 6), ("check 2", 7), ("check 3", 8))
    TURN, ANSWER = 24, 16  # new prompt tokens per step, answer tokens per step

    def __init__(self, model: Model, traffic: str, length: int, kept: bool, **_: Any) -> None:
        self.model, self.traffic, self.kept = model, traffic, kept
        self.ids = tokens(1, length + len(self.STEPS) * (self.TURN + self.ANSWER)).to(model.device)
        self.starts = []
        for index, (_, alora) in enumerate(self.STEPS):
            start = length + index * (self.TURN + self.ANSWER)
            self.starts.append(start)
            number = alora if kept or alora is None else alora - 5  # a LoRA instead of an aLoRA
            if model.kind == "switch" and kept and (number is not None or hasattr(model.model.config, "switch_spec")):
                self.ids[:, start] = model.control(number)
        self.logits = None

    def __call__(self) -> dict[str, Any]:
        first, total, cache = [], [], None
        for start, (_, alora) in zip(self.starts, self.STEPS, strict=True):
            number = None if alora is None else alora - 5
            ids = self.ids.clone()
            if not self.kept and self.model.kind == "switch" and number is not None:
                ids[:, 0] = self.model.control(number)
            traffic = "base" if number is None else self.traffic
            with self.model.serving(traffic, 1):
                if self.model.kind == "peft" and number is not None:
                    self.model.model.set_adapter(_name(number))
                begin = time.perf_counter()
                cached = cache.get_seq_length() if self.kept and cache is not None else 0
                output = self.model.forward(
                    input_ids=ids[:, cached : start + self.TURN],
                    past_key_values=cache if cached else None,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = cache_of(output)
                output.logits.argmax().item()
                first.append(time.perf_counter() - begin)
                for position in range(start + self.TURN, start + self.TURN + self.ANSWER):
                    ids_next = ids[:, position : position + 1]
                    self.model.forward(input_ids=ids_next, past_key_values=cache, use_cache=True)
                self.model.synchronize()
                total.append(time.perf_counter() - begin)
        return {"first": first, "total": total}


TASKS: dict[str, Any] = {"prefill": Prefill, "decode": Decode, "generate": Generate, "flow": Flow}


class Worker:
    """Answers requests: each is a dict whose key is the name of a method."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.prepared: dict[str, Any] = {}

    def versions(self, _: Any) -> dict[str, str]:
        found = {"python": sys.version.split()[0]}
        for name in ("torch", "transformers", "peft", "granite-switch"):
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        return found

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        key = request.pop("key")
        self.models[key] = Model(**request)
        gc.collect()
        gc.freeze()
        return {"seconds": self.models[key].seconds}

    def drop(self, key: str) -> dict[str, Any]:
        del self.models[key]
        gc.collect()
        return {}

    def clear(self, _: Any) -> dict[str, Any]:
        self.prepared.clear()
        gc.collect()
        return {}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare a contender's inputs and caches; returns its last logits for comparison."""
        model, traffic = self.models[request["model"]], request["traffic"]
        with model.serving(traffic, request.get("batch", 1)):
            task = TASKS[request["task"]](model, **{k: v for k, v in request.items() if k not in ("model", "task")})
        self.prepared[request["id"]] = (task, model, request)
        return {"logits": None if task.logits is None else task.logits[:8, :256].float().tolist()}

    def time(self, name: str) -> dict[str, Any]:
        task, model, request = self.prepared[name]
        if request["task"] == "flow":
            with torch.no_grad():
                return task()
        with model.serving(request["traffic"], request["batch"]):
            return task()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps library output apart from the answers
    worker = Worker()
    gc.disable()
    for line in sys.stdin:
        ((name, request),) = json.loads(line).items()
        try:
            answer = getattr(worker, name)(request)
        except Exception as problem:
            answer = {"error": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(answer), file=answers, flush=True)


def load_once(request: dict[str, Any]) -> None:
    """Seconds of loading, and resident memory in bytes: before, at the peak and after."""
    if request["kind"] == "switch":
        import granite_switch.hf  # noqa: F401
    if request["kind"] == "peft":
        import peft  # noqa: F401
    before = _memory()["VmRSS"]
    model = Model(**request)
    after = _memory()
    # weights stay mapped from the file until they are used; a forward reads all of them
    with model.serving("base", 1):
        model.forward(input_ids=tokens(1, 8).to(model.device))
    used = _memory()
    answer = {"seconds": model.seconds, "before": before, "peak": after["VmHWM"], "used": used["VmHWM"]}
    print(json.dumps(answer))


def _memory() -> dict[str, int]:
    with open("/proc/self/status") as status:
        rows = [line.split() for line in status if line.startswith("Vm")]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--load", metavar="JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.load:
        load_once(json.loads(options.load))
    else:
        serve()
