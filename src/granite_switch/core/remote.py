"""The Python module in a composed folder, for tools that cannot be told to import this package.

`pipeline(..., trust_remote_code=True)`, lm_eval and TRL load it from the folder. It contains no model code: it imports
the installed package, which registers itself with transformers. If the package is already imported, transformers does
not load the module.
"""

from pathlib import Path
from typing import Any

MODULE = "configuration_granite_switch.py"

# for config.json; the Auto classes for models need no entry, because they go by the config's class
AUTO_MAP: dict[str, Any] = {"auto_map": {"AutoConfig": f"{Path(MODULE).stem}.SwitchConfig"}}

_TEXT = '''\
"""Granite Switch for `trust_remote_code=True`: the installed package runs the model, not this file."""

try:
    import granite_switch.hf
    from granite_switch.config import SwitchConfig
except ImportError as error:
    needed = "this model runs with the package granite-switch"
    raise ImportError(f"{needed} ({error}): pip install 'granite-switch[hf]>=0.2'") from error
'''


def write_module(folder: Path) -> None:
    """Write the module into a checkpoint's folder, whose config.json names it."""
    (folder / MODULE).write_text(_TEXT, encoding="utf-8")
