"""Prove with transformers, if it is installed, that a composed folder's tokenizer is read like the base's.

`granite_switch.autotokenizer` does the work, in a separate process unless this one has already imported transformers.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from granite_switch.core.checkpoint import read_json
from granite_switch.core.spec import MODEL_TYPE
from granite_switch.errors import BaseModelError

_PROGRAM = "granite_switch.autotokenizer"


@dataclass(frozen=True)
class Proof:
    """A proof in progress."""

    folder: Path
    base: Path | None
    process: subprocess.Popen[str] | None  # None: to be run in this process


def start_proof(folder: Path, base: Path | None = None) -> Proof | None:
    """Start proving the tokenizer of a composed folder; None without transformers, or if there is nothing to prove.

    Args:
        folder: the composed folder, with the tokenizer's files and config.json.
        base: the base's folder. A base that is itself a composed model was proved when it was composed.
    """
    try:
        if int(version("transformers").split(".")[0]) < 5:
            return None
    except PackageNotFoundError:
        return None
    if base and read_json(base / "config.json").get("model_type") == MODEL_TYPE:
        return None
    process = None
    if "transformers" not in sys.modules:
        command = [sys.executable, "-m", _PROGRAM, str(folder), *([str(base)] if base else [])]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return Proof(folder, base, process)


def differences(proof: Proof | None) -> list[str]:
    """Wait for a proof and return the differences, one per line."""
    if proof is None:
        return []
    if proof.process is None:
        try:
            return list(import_module(_PROGRAM).differences(proof.folder, proof.base))
        except Exception as error:  # whatever a tokenizer's files make transformers raise
            return [f"transformers cannot read it: {type(error).__name__} {error}"]
    out, err = proof.process.communicate()
    if proof.process.returncode:
        return [f"transformers cannot read it: {(err.strip().splitlines() or ['no reason given'])[-1]}"]
    return list(json.loads(out))


def finish_proof(proof: Proof | None) -> None:
    """Wait for a proof.

    Raises:
        BaseModelError: the composed tokenizer is not read like the base's; lists the differences.
    """
    if problems := differences(proof):
        raise BaseModelError(
            f"transformers {version('transformers')} reads the composed tokenizer differently from the base's",
            problems=problems[:8],
            hint="save the base's tokenizer as transformers reads it: AutoTokenizer.from_pretrained(BASE)"
            ".backend_tokenizer.save('BASE/tokenizer.json'), and set tokenizer_class to TokenizersBackend",
        )
