"""`python -m granite_switch.vllm.check MODEL`: does vLLM here give what the transformers backend gives?

For when something looks wrong on a machine: starts the engine, runs built-in prompts under the base, every adapter and
all of them in one sequence, and prints a table. What vLLM writes greedily is read by transformers, which must find
every token as likely as vLLM did, and none likelier, to within what the dtype can tell apart.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

_QUESTION = "Where does the river end, and who lives near the harbour?"
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}  # of a log-probability
_NEW_TOKENS = 16


def main() -> int:
    """Print the table; 0 if all rows agree, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m granite_switch.vllm.check", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a composed model")
    parser.add_argument("--dtype", default="float32", choices=_TOLERANCE, help="of both backends (default: float32)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

    prompts = _prompts(arguments.model)
    found = _vllm(arguments, list(prompts.values()))
    rows = []
    for (name, prompt), output in zip(prompts.items(), found, strict=True):
        rows.append(_compare(name, prompt, output, _TOLERANCE[arguments.dtype], _reference(arguments)))
    _print(rows, f"{arguments.model}, {arguments.dtype}")
    return 0 if all(row[-1] == "ok" for row in rows) else 1


def _prompts(model: Path) -> dict[str, list[int]]:
    """Name of a row to its token ids."""
    from transformers import AutoTokenizer

    from granite_switch.config import GraniteSwitchConfig

    spec = GraniteSwitchConfig.from_pretrained(model).switch_spec
    text = AutoTokenizer.from_pretrained(model).encode(_QUESTION, add_special_tokens=False)
    prompts = {"base": text}
    prompts |= {a.name: [a.token_id, *text] for a in spec.active}
    together = [token for name, prompt in prompts.items() if name != "base" for token in prompt]
    back = [spec.base_token_id, *text] if spec.base_token_id >= 0 else []
    return prompts | {"all in one": [*text, *together], "and back": [*together, *back]} if together else prompts


def _vllm(arguments: argparse.Namespace, prompts: list[list[int]]) -> list[Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + _NEW_TOKENS,
    )
    sampling = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, logprobs=1)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


_models: dict[Path, Any] = {}


def _reference(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import granite_switch.hf  # noqa: F401  (registers the classes)

    if arguments.model not in _models:
        dtype = getattr(torch, arguments.dtype)
        _models[arguments.model] = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    return _models[arguments.model]


def _compare(name: str, prompt: list[int], output: Any, tolerance: float, model: Any) -> tuple[str, ...]:
    """One row: transformers reads what vLLM wrote, and must find each token as likely, and nothing likelier."""
    import torch

    written = list(output.outputs[0].token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(written)[:, None])[:, 0]
    theirs = torch.tensor(
        [step[token].logprob for step, token in zip(output.outputs[0].logprobs, written, strict=True)]
    )
    largest = (chosen - theirs).abs().max().item()
    behind = (logprobs.max(1).values - chosen).max().item()
    verdict = "ok" if largest <= tolerance and behind <= tolerance else "DIFFERS"
    return name, str(len(prompt)), f"{largest:.1e}", f"{behind:.1e}", verdict


def _print(rows: list[tuple[str, ...]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("prompt", "tokens", "largest difference", "behind the best", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
