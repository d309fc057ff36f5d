"""Stand-ins for the repositories on the pages, and the working environment of a reader."""

import sys
from dataclasses import dataclass
from pathlib import Path

from artefacts import ROOT

sys.path[:0] = [str(ROOT / "tests" / "maintain"), str(ROOT / "tests" / "legacy")]

from hub import Hub

# published bases: model_type and kinds of layers as in the real ones, everything else tiny
BASES = {
    "ibm-granite/granite-4.0-micro": "granitemoehybrid",
    "ibm-granite/granite-4.0-h-micro": "granitemoehybrid_mamba",
    "ibm-granite/granite-4.1-3b": "granite",
}
# published libraries: adapter -> its technologies
LIBRARIES = {
    "ibm-granite/granitelib-rag-r1.0": {
        "answerability": ("alora", "lora"),
        "citations": ("lora",),
        "hallucination_detection": ("lora",),
        "query_rewrite": ("alora", "lora"),
    },
    "ibm-granite/granitelib-core-r1.0": {"requirement_check": ("alora", "lora"), "uncertainty": ("alora",)},
}
TARGETS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Reader:
    """A reader who follows the pages: a working folder and the environment of a shell."""

    folder: Path
    environment: dict[str, str]
    hub: Hub
