"""Prove with transformers, if it is installed, that a composed folder's tokenizer is read like the base's.

`granite_switch.autotokenizer` does the work, in a separate process unless this one has already imported transformers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from granite_switch.core.border import read_json
from granite_switch.core.spec import MODEL_TYPE
from granite_switch.errors import BaseModelError

_PROGRAM = "granite_switch.autotokenizer"


def start_proof(folder: Path, base: Path | None = None) -> Callable[[], list[str]]:
    """Start proving the tokenizer of a composed folder.

    Args:
        folder: the composed folder, with the tokenizer's files and config.json.
        base: the base's folder. A base that is itself a composed model was proved when it was composed.

    Returns:
        A function that waits and returns the differences, one per line; none without transformers.
    """
    try:
        if int(version("transformers").split(".")[0]) < 5:
            return list
    except PackageNotFoundError:
        return list
    if base and read_json(base / "config.json").get("model_type") == MODEL_TYPE:
        return list
    if "transformers" in sys.modules:
        return partial(_in_this_process, folder, base)
    command = [sys.executable, "-m", _PROGRAM, str(folder), *([str(base)] if base else [])]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    return partial(_of_process, subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe))


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


def finish_proof(differences: Callable[[], list[str]]) -> None:
    """Wait for a proof that `start_proof` began.

    Raises:
        BaseModelError: the composed tokenizer is not read like the base's; lists the differences.
    """
    if problems := differences():
        raise BaseModelError(
            f"transformers {version('transformers')} reads the composed tokenizer differently from the base's",
            problems=problems[:8],
            hint="save the base's tokenizer as transformers reads it: AutoTokenizer.from_pretrained(BASE)"
            ".backend_tokenizer.save('BASE/tokenizer.json'), and set tokenizer_class to TokenizersBackend",
        )
