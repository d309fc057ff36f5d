"""Compare composed tokenizers with their bases' in a process that never imports `granite_switch.hf`."""

import json
import logging
import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from granite_switch.autotokenizer import differences


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


kept = _Kept()
transformers_logging.disable_default_handler()
transformers_logging.add_handler(kept)
pairs = [[Path(folder) for folder in pair] for pair in json.load(sys.stdin)]
found = [differences(composed, base) for base, composed in pairs]
transformers_logging.set_verbosity_warning()
for _, composed in pairs:
    AutoTokenizer.from_pretrained(composed, trust_remote_code=False)
assert "granite_switch.hf" not in sys.modules
print(json.dumps({"differences": found, "warnings": kept.lines}))
