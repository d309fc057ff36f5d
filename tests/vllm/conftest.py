"""Engines for the vLLM tests, in this process, so that they start in seconds and tests can inspect them."""

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm.config") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Granite whose heads have 32 dimensions, the smallest that vLLM's CPU attention takes."""
    from artefacts import make_base

    return make_base(tmp_path_factory.mktemp("models") / "base", hidden=128, pad_vocab=9)


@pytest.fixture(scope="session")
def spec(composed: Path) -> Any:
    """The composed model's `SwitchSpec`."""
    from granite_switch.core.border import read_json
    from granite_switch.core.spec import SwitchSpec

    return SwitchSpec.from_dict(read_json(composed / "config.json")["switch"])


def start(model: Path, **options: Any) -> Any:
    """A small `vllm.LLM`, eager, in this process."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "seed": 0,
        # random weights would fill a JSON answer with newlines
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return LLM(str(model), **{**settings, **options})


@contextmanager
def running(model: Path, **options: Any) -> Iterator[Any]:
    """An engine that is shut down afterwards, to free its memory for the next one."""
    llm = start(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@contextmanager
def serving(model: Path, name: str, log: Path, *options: object) -> Iterator[str]:
    """Run `granite-switch serve` in float32 on loopback, under one or several names; yields its URL."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "granite_switch.cli", "serve", model, "--served-model-name", *name.split()]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--block-size", 32, "--max-model-len", 2048, *options]
    # the first request for log-probabilities compiles a kernel, which takes long on a busy machine
    patience = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200"}
    environment = os.environ | patience | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def core_of(llm: Any) -> Any:
    """The engine's core: scheduler and executor."""
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm: Any) -> Any:
    """The engine's model runner."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def engine(composed: Path) -> Iterator[Any]:
    """The composed model in float32, one engine for a module."""
    with running(composed) as llm:
        yield llm


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained sample, composed."""
    from artefacts import ROOT

    from granite_switch import compose

    output = tmp_path_factory.mktemp("sample") / "model"
    compose(ROOT / "sample" / "base", [ROOT / "sample" / "library"], output, base_name="granite-switch-sample")
    return output


def transformers_model(folder: Path) -> Any:
    """The transformers backend in float32, which is the oracle here."""
    import torch
    from transformers import AutoModelForCausalLM

    import granite_switch.hf  # noqa: F401  (registers the classes)

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def reference(composed: Path) -> Callable[[list[int], int], list[int]]:
    """Greedy continuation of the composed model by transformers: (prompt, number of tokens) -> tokens."""
    import torch

    model = transformers_model(composed)
    model.generation_config.eos_token_id = None

    def greedy(prompt: list[int], count: int) -> list[int]:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        return tokens[0, len(prompt) :].tolist()

    return greedy
