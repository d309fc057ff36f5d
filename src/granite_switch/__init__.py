"""Granite Switch: one checkpoint with many LoRA and aLoRA adapters, switched per token by control tokens.

Importing this package registers nothing and loads no heavy library; `import granite_switch.hf` registers with
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from granite_switch.errors import SwitchError

if TYPE_CHECKING:
    from granite_switch.composition.compose import compose
    from granite_switch.composition.edit import add, remove, rename, update
    from granite_switch.composition.extract import extract
    from granite_switch.composition.inspect import inspect
    from granite_switch.composition.push import push
    from granite_switch.composition.verify import verify
    from granite_switch.conversation import Conversation

__version__ = "0.2.0"
__all__ = [
    "Conversation",
    "SwitchError",
    "__version__",
    "add",
    "compose",
    "extract",
    "inspect",
    "push",
    "remove",
    "rename",
    "update",
    "verify",
]

_HOME = {name: f"granite_switch.composition.{name}" for name in ("compose", "extract", "inspect", "push", "verify")}
_HOME |= dict.fromkeys(("add", "remove", "rename", "update"), "granite_switch.composition.edit")
_HOME["Conversation"] = "granite_switch.conversation"
_HOME["GraniteSwitchConfig"] = "granite_switch.config"
_HOME["KVHistoryPolicy"] = "granite_switch.conversation"  # removed after 0.1.1; the error names the replacement


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
