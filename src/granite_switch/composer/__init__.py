"""`python -m granite_switch.composer.compose_granite_switch`, the command of releases up to 0.1.1, run by today's.

Their Python interface is gone; asking for one of its names says what to use (docs/migrate.md).
"""

from typing import Any

_CLASSES = {"GraniteSwitchComposer", "AdapterRemapper", "RemapResult", "ArchDescriptor", "ModuleDescriptor"}


def __getattr__(name: str) -> Any:
    if name in _CLASSES or name == "resolve_arch" or name.endswith("_arch"):
        raise ImportError(
            f"{name} was of granite-switch up to 0.1.1, which needed a table for each architecture. "
            "granite_switch.compose(base, adapters, output) composes any decoder (docs/migrate.md)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
