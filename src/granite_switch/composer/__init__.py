"""`python -m granite_switch.composer.compose_granite_switch`, the command of releases up to 0.1.1.

It runs today's commands. The Python interface of those releases is gone; its names raise an error that says what to
use instead (docs/migrate.md).
"""

from typing import Any

_CLASSES = {"GraniteSwitchComposer", "AdapterRemapper", "RemapResult", "ArchDescriptor", "ModuleDescriptor"}


def __getattr__(name: str) -> Any:
    if name in _CLASSES or name == "resolve_arch" or name.endswith("_arch"):
        raise ImportError(
            f"{name} was removed after granite-switch 0.1.1, which needed a table for each architecture. "
            "granite_switch.compose(base, adapters, output) composes any decoder (docs/migrate.md)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
