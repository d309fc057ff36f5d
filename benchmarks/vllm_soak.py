"""Load test of the server: mixed adapters for minutes, with each answer compared to the one that its request got alone.

    .venv-vllm/bin/python benchmarks/vllm_soak.py MODEL [--minutes 5] [--concurrent 200] [--dtype float32]

Starts `granite-switch serve` on loopback and calls adapters as models. Exits with 1 if an answer differs or is lost.
The default is float32, because in shorter dtypes the composition of a batch can decide between two candidates. Memory
is the total of the server's processes.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "granite_switch.cli", "serve", str(options.model)]
    command += ["--served-model-name", "switch", "--host", "127.0.0.1", "--port", str(port), "--block-size", "32"]
    command += ["--dtype", options.dtype, "--enforce-eager", "--max-num-seqs", "256", "--max-model-len", "2048"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    try:
        figures = asyncio.run(soak(f"http://127.0.0.1:{port}", server, options))
    finally:
        server.terminate()
        server.wait(60)
    print(json.dumps(figures, indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=1))
    return 1 if figures["different"] or figures["lost"] else 0


async def soak(url: str, server: subprocess.Popen, options: argparse.Namespace) -> dict[str, Any]:
    # the server closes connections that are idle for 5 s, and a request sent at that moment is lost
    limits = httpx.Limits(max_connections=options.concurrent, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await until_up(client, server)
        requests = [body(name, i) for i in range(8) for name in [None, *names(options.model)]]
        alone = [await ask(client, request) for request in requests]
        if wrong := [
            text for text, r in zip(alone, requests, strict=True) if not f"{text}".startswith(r["model"] + ": ")
        ]:
            raise SystemExit(f"not answered, or under another model's name: {wrong}")
        end = time.monotonic() + 60 * options.minutes
        counts = {"answers": 0, "different": 0, "lost": 0}
        memory = [resident(server)]

        async def user(number: int) -> None:
            turn = number
            while time.monotonic() < end:
                turn += 7
                answer = await ask(client, requests[turn % len(requests)])
                counts["answers"] += 1
                counts["lost"] += answer is None
                counts["different"] += answer is not None and answer != alone[turn % len(requests)]

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(10)
                memory.append(resident(server))

        await asyncio.gather(watch(), *(user(i) for i in range(options.concurrent)))
    return {**counts, "minutes": options.minutes, "concurrent": options.concurrent, "resident_mb": memory}


async def until_up(client: httpx.AsyncClient, server: subprocess.Popen) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(1)


def names(model: Path) -> list[str]:
    return [adapter["name"] for adapter in json.loads((model / "config.json").read_text())["switch"]["adapters"]]


def body(name: str | None, number: int) -> dict[str, Any]:
    message = {"role": "user", "content": f"Where does Anna live? Question {number} <rewrite>"}
    model = f"switch:{name}" if name else "switch"
    return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 24}


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> str | None:
    """The answer's text, and its `model`."""
    try:
        answer = await client.post("/v1/chat/completions", json=request)
        if answer.status_code != 200:
            return None
        found = answer.json()
        return f"{found['model']}: {found['choices'][0]['message']['content']}"
    except httpx.HTTPError as error:
        print(f"lost: {type(error).__name__} {error}", file=sys.stderr, flush=True)
        return None


def resident(server: subprocess.Popen) -> int:
    process = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) >> 20


if __name__ == "__main__":
    sys.exit(main())
