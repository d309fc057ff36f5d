"""Does vLLM on this machine give what transformers gives? `granite-switch check MODEL` prints the table.

Built-in prompts under the base, every adapter and all of them in one sequence run twice: eager, and as a server runs
them (compiled, in chunks, the second time out of the prefix cache). What vLLM writes greedily is read by transformers,
which must find every token as likely as vLLM did, and none likelier, to within what the dtype can tell apart.
"""

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

_QUESTION = "Where does the river end, and who lives near the harbour? " * 16
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}  # of a log-probability
_NEW_TOKENS = 16
DTYPES = ("auto", *_TOLERANCE)
# vLLM's options for each run, and how often the prompts are given
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
    difference: float  # largest, of the log-probabilities of what was written
    lag: float  # by how much transformers finds another token likelier, at most
    dtype: str

    @property
    def agrees(self) -> bool:
        return max(self.difference, self.lag) <= _TOLERANCE[self.dtype]


def run(model: Path, dtype: str = "auto", tensor_parallel_size: int = 1) -> list[Row]:
    """Run the prompts in vLLM and transformers and compare.

    Args:
        model: folder of a composed model.
        dtype: one of DTYPES, for both backends; "auto": as vLLM chooses for the model here.
        tensor_parallel_size: as vLLM takes it.
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
    """The rows for people."""
    result = Table(title=title, title_justify="left")
    for column in ("run", "prompt", "tokens", "cached", "largest difference", "below the best", ""):
        result.add_column(column)
    for row in rows:
        figures = (str(row.tokens), str(row.cached), f"{row.difference:.1e}", f"{row.lag:.1e}")
        result.add_row(row.run, row.prompt, *figures, "ok" if row.agrees else "DIFFERS")
    return result


def _prompts(model: Path) -> dict[str, list[int]]:
    """Name of a row to its token ids."""
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
    """The dtype that the engine has, and what it gave the last time."""
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
    """Transformers reads what vLLM wrote, and must find each token as likely, and nothing likelier."""
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
    model: Annotated[Path, typer.Argument(help="Folder of a composed model.", exists=True, file_okay=False)],
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; auto: as vLLM chooses.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As vLLM takes it.")] = 1,
) -> None:
    """Compare vLLM with transformers on this machine, eager and as a server runs. Exit code 1 if they differ."""
    from rich.console import Console

    if dtype not in DTYPES:
        raise typer.BadParameter(f"is one of {', '.join(DTYPES)}", param_hint="--dtype")
    rows = run(model, dtype, tensor_parallel_size)
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, f"{model}, {rows[0].dtype}"))
    if not all(row.agrees for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(check)
