"""Granite Switch: one Granite checkpoint, many LoRA and aLoRA adapters, switched per token by control tokens.

Importing this registers nothing and imports nothing heavy; `import granite_switch.hf` registers with transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from granite_switch.errors import SwitchError

if TYPE_CHECKING:
    from granite_switch.compose import compose

__version__ = "0.2.0"
__all__ = ["SwitchError", "__version__", "compose"]


def __getattr__(name: str) -> Any:
    if name != "compose":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("granite_switch.compose")  # a module that can be called
