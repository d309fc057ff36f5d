"""llama.cpp: one GGUF file with the base and every adapter, for its `graniteswitch` architecture."""

from granite_switch.errors import SwitchError

try:
    from granite_switch.gguf.export import OUTTYPES, Plan, export, prepare, write
except ModuleNotFoundError as error:
    if error.name != "gguf":
        raise
    raise SwitchError("the package gguf is not installed", hint="pip install 'granite-switch[gguf]'") from None

__all__ = ["OUTTYPES", "Plan", "export", "prepare", "write"]
