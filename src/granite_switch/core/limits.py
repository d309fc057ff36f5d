"""Render third-party chat templates within limits of time and memory.

A worker process renders. It starts on first use and runs until a limit stops it or this process ends. On systems
without `resource` (Windows) only time is limited.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from queue import Empty, Queue
from typing import Any

from granite_switch.core.chat import render
from granite_switch.errors import TemplateError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes of address space


def render_limited(template: str, *, seconds: float = SECONDS, **variables: Any) -> str:
    """Render a chat template like `core.chat.render`; the variables must be JSON.

    Raises:
        TemplateError: the template raised, or took too much time or memory.
    """
    with _lock:
        return _worker().render(json.dumps({"template": template, **variables}), seconds)


class _Worker:
    """The process that renders, and a thread that reads its replies."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from granite_switch.core.limits import serve; serve()", str(MEMORY)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.answers: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")  # the process ended

    def render(self, job: str, seconds: float) -> str:
        try:
            assert self.process.stdin
            self.process.stdin.write(job + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.answers.get(timeout=seconds) or "{}")
        except Empty:
            self.stop()
            raise TemplateError(f"chat template: does not finish within {seconds:g} seconds") from None
        except OSError:
            answer = {}
        if "text" in answer:
            return str(answer["text"])
        if "error" in answer:
            raise TemplateError(answer["error"])
        self.stop()
        raise TemplateError(f"chat template: the process that renders it ended ({self.process.returncode})")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_running: list[_Worker] = []


def _worker() -> _Worker:
    if not _running or _running[0].process.poll() is not None:
        _running[:] = [_Worker()]
    return _running[0]


@atexit.register
def _stop() -> None:
    for worker in _running:
        worker.stop()


def serve() -> None:
    """Run the worker process: read one line of JSON per template, write one line of JSON per text or error."""
    _limit_memory(int(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(job: Mapping[str, Any]) -> dict[str, str]:
    try:
        return {"text": render(**job)}
    except TemplateError as error:
        reason = error.message
        if "MemoryError" in reason:
            reason = f"chat template: needs more than {MEMORY >> 20} MB of memory"
        return {"error": reason}


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
