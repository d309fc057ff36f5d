"""Two processes that train different adapters of one model: DDP and FSDP2 give the gradients of both batches."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("names", ["answerability,hallucination_detection", "citations,base"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_each_rank_another_adapter(composed, reference, tmp_path, how, names):
    prompts = {"base" if name is None else name: ids for name, ids in reference.prompts.items()}
    torch.save(prompts, tmp_path / "results.prompts")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(composed), how, names, str(tmp_path / "results.pt")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.load(tmp_path / "results.pt")
    alone = copy.deepcopy(reference.model).double()
    for name in names.split(","):
        (alone(prompts[name], labels=prompts[name]).loss / 2).backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if "_lora" in name}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-10)
