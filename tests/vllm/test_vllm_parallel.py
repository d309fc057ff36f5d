"""Two processes, tensor- or pipeline-parallel, give the transformers backend's greedy tokens."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from granite_switch.core.spec import SwitchSpec

# pipeline parallelism needs a compiled model on CPU (vLLM 0.32)
WAYS = {
    "tensor": {"tensor_parallel_size": 2, "enforce_eager": True},
    "pipeline": {"pipeline_parallel_size": 2, "enforce_eager": False},
}
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, prompts, options = json.loads(sys.argv[1])
    llm = LLM(model, dtype="float32", block_size=32, max_model_len=2048, max_num_batched_tokens=64, **options)
    sampling = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(
    composed: Path, tmp_path: Path, way: str, reference: Callable[[list[int], int], list[int]]
) -> None:
    spec = SwitchSpec.from_dict(json.loads((composed / "config.json").read_text())["switch"])
    text = [7, 60, 61, 90, 12, 33] * 6
    prompts = [text, *([*text, adapter.token_id, 41, 42] for adapter in spec.adapters)]
    prompts.append([*chain_of(prompts), spec.base_token_id, 9])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, str(program), json.dumps([str(composed), prompts, WAYS[way]])]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=1200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers outlive an engine that is killed
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(output.strip().splitlines()[-1]) == [reference(p, 10) for p in prompts]


def chain_of(prompts: list[list[int]]) -> list[int]:
    return [token for prompt in prompts for token in prompt]
