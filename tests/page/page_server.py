"""Servers for the tests: `granite-switch play`, and a stand-in for vLLM's.

The latter has /v1/models and streamed /v1/completions over the sample.

vLLM has its own environment; tests/vllm/test_vllm_play.py uses the real server.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BLOCK = 4


class Server(uvicorn.Server):
    """Serves the model as NAME `sample` and each adapter as `sample:ADAPTER`."""

    def __init__(self, local: Any, port: int) -> None:
        self.model, self.spec = local.model, local.files.spec
        self.seen: list[list[int]] = []
        self.told = True  # whether usage includes cached tokens
        self.pause = 0.0  # seconds before each token
        self.ended = threading.Event()
        self.breaks = False  # whether connections break after two tokens
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.completions, methods=["POST"])]
        super().__init__(uvicorn.Config(Starlette(routes=routes), port=port, log_level="error", lifespan="off"))

    def run(self, *sockets: Any) -> None:
        super().run(*sockets)
        self.ended.set()

    def wait(self) -> None:
        while not self.started:
            time.sleep(0.02)

    def end(self) -> None:
        self.should_exit = self.force_exit = True

    async def models(self, request: Request) -> Response:
        cards = [{"id": "sample", "parent": None, "max_model_len": 2000}]
        cards += [{"id": f"sample:{name}", "parent": "sample"} for name in self.spec.names]
        return JSONResponse({"data": cards})

    async def completions(self, request: Request) -> Response:
        asked = await request.json()
        slots = self.spec.control_slots
        slot = next((slots[token] for token in reversed(asked["prompt"]) if token in slots), 0)
        if slot != self.spec.slot(asked["model"].partition(":")[2] or "base"):
            return JSONResponse({"error": {"message": "the prompt ends under another adapter"}}, 400)
        return StreamingResponse(self.events(asked), media_type="text/event-stream")

    def events(self, asked: dict[str, Any]) -> Iterator[str]:
        prompt = asked["prompt"]
        shared = max((common(prompt, ids) for ids in self.seen), default=0)
        cached = min(shared, len(prompt) - 1) // BLOCK * BLOCK
        with torch.no_grad():
            output = self.model.generate(
                torch.tensor([prompt]), max_new_tokens=asked["max_tokens"], do_sample=asked["temperature"] > 0
            )
        new = output[0, len(prompt) :].tolist()
        self.seen.append([*prompt, *new[:-1]])
        for count, token in enumerate(new):
            if self.breaks and count == 2:
                raise RuntimeError("the server breaks")
            time.sleep(self.pause)
            yield _line({"choices": [{"text": "x", "token_ids": [token]}]})
        details = {"prompt_tokens_details": {"cached_tokens": cached}} if self.told else {}
        yield _line({"choices": [], "usage": {"prompt_tokens": len(prompt), **details}})
        yield "data: [DONE]\n\n"


@contextmanager
def serving(local: Any, port: int, running: "Server | None" = None) -> Iterator[str]:
    """A server with the model, stopped afterwards."""
    running = running or Server(local, port)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        running.wait()
        yield f"http://127.0.0.1:{port}"
    finally:
        running.end()
        thread.join(30)


@contextmanager
def playing(sample: Path, *options: object) -> Iterator[str]:
    """Run `granite-switch play`; yields the page's address."""
    command = [sys.executable, "-m", "granite_switch.cli", "play", sample, "--port", free_port(), *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield next(line.split()[1] for line in process.stdout if line.startswith("open http"))
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def common(left: list[int], right: list[int]) -> int:
    """How many leading tokens two sequences share."""
    return next(
        (at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
