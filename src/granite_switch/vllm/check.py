"""Compare vLLM with transformers on this machine: `granite-switch check MODEL`.

Built-in prompts for the base, each adapter and all of them in one sequence run eagerly, and then as a server runs them:
compiled, in chunks, the second time from the prefix cache. transformers scores vLLM's greedy output: within a tolerance
for the dtype, every token must have the same log-probability, and no other token a higher one.
"""

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from granite_switch.errors import ServingError

_QUESTION = "Where does the river end, and who lives near the harbour? " * 16
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}  # difference of a log-probability
_NEW_TOKENS = 16
DTYPES = ("auto", *_TOLERANCE)
# vLLM's options for each run, and how many times it runs the prompts
_RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "eager": ({"enforce_eager": True, "enable_prefix_caching": False}, 1),
    "as the server": ({"enable_prefix_caching": True, "max_num_batched_tokens": 256, "max_num_seqs": 16}, 2),
}


@dataclass(frozen=True)
class Row:
    """One prompt in one run."""

    run: str
    prompt: str
    tokens: int
    cached: int
    difference: float  # largest difference in log-probability of a generated token
    lag: float  # by how much, at most, transformers prefers another token
    dtype: str

    @property
    def agrees(self) -> bool:
        return max(self.difference, self.lag) <= _TOLERANCE[self.dtype]


def run(model: Path, dtype: str = "auto", tensor_parallel_size: int = 1) -> list[Row]:
    """Run the prompts in vLLM and transformers and compare.

    Args:
        model: folder of a composed model.
        dtype: one of DTYPES, for both backends; "auto": vLLM's choice.
        tensor_parallel_size: vLLM's option.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    prompts = _prompts(model)
    options = {"dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
    options["max_model_len"] = max(map(len, prompts.values())) + _NEW_TOKENS
    outputs = []
    for name, (more, times) in _RUNS.items():
        dtype, found = _vllm(model, {**options, **more}, list(prompts.values()), times)
        outputs.append((name, found))
    reference = _reference(model, dtype)
    return [
        _compare(name, prompt, prompts[prompt], output, reference, dtype)
        for name, found in outputs
        for prompt, output in zip(prompts, found, strict=True)
    ]


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table to print."""
    result = Table(title=title, title_justify="left")
    for column in ("run", "prompt", "tokens", "cached", "largest difference", "below the best", ""):
        result.add_column(column)
    for row in rows:
        figures = (str(row.tokens), str(row.cached), f"{row.difference:.1e}", f"{row.lag:.1e}")
        result.add_row(row.run, row.prompt, *figures, "ok" if row.agrees else "DIFFERS")
    return result


def _prompts(model: Path) -> dict[str, list[int]]:
    """Name of each prompt -> its token ids."""
    from granite_switch.config import SwitchConfig
    from granite_switch.core.tokenizer import read_tokenizer

    spec = SwitchConfig.from_pretrained(model).switch_spec
    text = list(read_tokenizer(model).library.encode(_QUESTION, add_special_tokens=False).ids)
    prompts = {"base": text}
    prompts |= {a.name: [a.token_id, *text] for a in spec.active}
    together = [token for name, prompt in prompts.items() if name != "base" for token in prompt[: len(text) // 4]]
    back = [spec.base_token_id, *text] if spec.base_token_id >= 0 else []
    return prompts | {"all in one": [*text, *together], "and back": [*together, *back]} if together else prompts


def _vllm(model: Path, options: dict[str, Any], prompts: list[list[int]], times: int) -> tuple[str, list[Any]]:
    """The engine's dtype, and its outputs of the last of `times` runs."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), **options)
    sampling = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=1)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    try:
        outputs = [llm.generate(given, sampling, use_tqdm=False) for _ in range(times)]
        return str(llm.llm_engine.model_config.dtype).removeprefix("torch."), outputs[-1]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _reference(model: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import granite_switch.hf  # noqa: F401  (registers the classes)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return reference.to(device).eval()


def _compare(run: str, name: str, prompt: list[int], output: Any, model: Any, dtype: str) -> Row:
    """Score vLLM's output with transformers."""
    import torch

    written = list(output.outputs[0].token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *written]], device=model.device)).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(-1).cpu()
    chosen = logprobs.gather(1, torch.tensor(written)[:, None])[:, 0]
    theirs = torch.tensor(
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, written, strict=True)]
    )
    difference = (chosen - theirs).abs().max().item()
    lag = (logprobs.max(1).values - chosen).max().item()
    return Row(run, name, len(prompt), output.num_cached_tokens or 0, difference, lag, dtype)


def check(
    model: Annotated[
        Path, typer.Argument(help="Composed model: local folder.", metavar="MODEL", exists=True, file_okay=False)
    ],
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; auto is vLLM's choice.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Number of GPUs; vLLM's option.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a record for each row of the table.")] = False,
) -> None:
    """Compare vLLM with transformers on this machine, eagerly and as a server. The exit code is 1 if they differ."""
    from rich.console import Console

    if dtype not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}", param_hint="--dtype")
    if find_spec("vllm") is None:
        raise ServingError("not installed: vllm", hint="pip install 'granite-switch[vllm]'")
    rows = run(model, dtype, tensor_parallel_size)
    if as_json:
        print(json.dumps([{**asdict(row), "agrees": row.agrees} for row in rows], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows, f"{model}, {rows[0].dtype}"))
    if not all(row.agrees for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(check)
