"""transformers' tensor parallelism: two processes on the CPU give what one model gives."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "parallel_worker.py"


@pytest.fixture(scope="module")
def together(composed, reference, tmp_path_factory):
    """The outputs of two processes, and the folder that they saved."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.save(reference.prompts, folder / "prompts.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    files = [composed, folder / "prompts.pt", folder / "results.pt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, WORKER, *files], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(**torch.load(folder / "results.pt"), saved=folder / "results.saved")


@pytest.fixture(scope="module")
def alone(reference):
    return copy.deepcopy(reference.model).double()


@pytest.mark.slow
class TestTwoProcesses:
    def test_logits(self, together, reference, alone, row):
        with torch.no_grad():
            for name, ids in reference.prompts.items():
                torch.testing.assert_close(together.logits[name], alone(ids).logits, rtol=1e-10, atol=1e-10)
        row("Devices", '`tp_plan="auto"`, two processes', seen=reference.compare(together.logits))

    def test_text(self, together, reference, alone):
        for name, ids in reference.prompts.items():
            assert together.text[name].tolist() == alone.generate(ids, max_new_tokens=6, do_sample=False).tolist()

    def test_each_holds_a_part(self, together, alone):
        whole = dict(alone.named_parameters())
        split = {name for name in together.held if "_lora" in name}
        assert {name.rsplit("-", 1)[1] for name in split if not _is_rowwise(name)} == {"B"}
        assert {name.rsplit("-", 1)[1] for name in split if _is_rowwise(name)} == {"A"}
        assert all(together.held[name] * 2 == whole[name].numel() for name in split)

    def test_gradients(self, together, reference, alone):
        for ids in reference.prompts.values():
            alone(ids, labels=ids).loss.backward()
        for name, parameter in alone.named_parameters():
            if "_lora" in name:
                torch.testing.assert_close(together.gradients[name], parameter.grad, rtol=1e-8, atol=1e-8)

    def test_saving(self, together, composed):
        for file in composed.glob("adapter-*.safetensors"):
            assert file.read_bytes() == (together.saved / file.name).read_bytes()
        saved, original = _tensors(together.saved), _tensors(composed)
        assert saved.keys() - original.keys() <= {"lm_head.weight"}  # transformers unties what it gathers
        assert all(torch.equal(saved[key], tensor) for key, tensor in original.items())


def _is_rowwise(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
