"""Prove with transformers, if it is installed, that a composed folder's tokenizer is read like the base's.

`granite_switch.autotokenizer` does the work, in a separate process unless this one has already imported transformers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from granite_switch.errors import BaseModelError

_PROGRAM = "granite_switch.autotokenizer"


def release() -> int:
    """The installed transformers' major version; 0 without it."""
    try:
        return int(version("transformers").split(".")[0])
    except PackageNotFoundError:
        return 0


class Prover:
    """Proves one folder's tokenizer. Its process imports transformers, which takes seconds, while the caller goes on.

    It is a context manager: leaving it ends the process.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        if release() >= 5 and "transformers" not in sys.modules:
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                [sys.executable, "-m", _PROGRAM], text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()

    def start(self, folder: Path, base: Path | None = None) -> Callable[[], list[str]]:
        """Start proving the tokenizer of a composed folder.

        Args:
            folder: the composed folder, with the tokenizer's files and config.json.
            base: the base's folder; without it, only the folder's own files are compared.

        Returns:
            A function that waits and returns the differences, one per line; none without transformers.
        """
        if release() < 5:
            return list
        if self.process is None:
            return partial(_in_this_process, folder, base)
        if self.process.stdin:
            with suppress(BrokenPipeError):  # the process has ended; its last line of errors is the reason
                self.process.stdin.write(json.dumps([str(path) for path in (folder, base) if path]) + "\n")
                self.process.stdin.flush()
        return partial(_of_process, self.process)


def differences(folder: Path, base: Path | None = None) -> list[str]:
    """Prove at once: as `Prover.start`, without going on meanwhile."""
    with Prover() as prover:
        return prover.start(folder, base)()


def _in_this_process(folder: Path, base: Path | None) -> list[str]:
    try:
        return list(import_module(_PROGRAM).differences(folder, base))
    except Exception as error:  # whatever a tokenizer's files make transformers raise
        return [f"transformers cannot read it: {type(error).__name__} {error}"]


def _of_process(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate()
    if process.returncode:
        return [f"transformers cannot read it: {(err.strip().splitlines() or ['no reason given'])[-1]}"]
    return list(json.loads(out))


def check(differences: list[str]) -> None:
    """Raise if a proof found differences.

    Raises:
        BaseModelError: the composed tokenizer is not read like the base's; lists the differences.
    """
    if differences:
        raise BaseModelError(
            f"transformers {version('transformers')} reads the composed tokenizer differently from the base's",
            problems=differences[:8],
            hint="save the base's tokenizer as transformers reads it: AutoTokenizer.from_pretrained(BASE)"
            ".backend_tokenizer.save('BASE/tokenizer.json'), and set tokenizer_class to TokenizersBackend",
        )
