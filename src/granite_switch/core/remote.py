"""The module that a composed folder carries for tools that cannot be told to import this package.

`pipeline(..., trust_remote_code=True)`, lm_eval and TRL load it from the folder. It holds no code of a model: it
imports the installed package, which registers itself with transformers. Where the package is imported already,
transformers takes that and never looks at the module.
"""

from pathlib import Path
from typing import Any

MODULE = "configuration_granite_switch.py"

# of config.json; the Auto classes of models find theirs by the config's class
AUTO_MAP: dict[str, Any] = {"auto_map": {"AutoConfig": f"{Path(MODULE).stem}.SwitchConfig"}}

_TEXT = '''\
"""Granite Switch for `trust_remote_code=True`: what runs the model is the installed package, not this file."""

try:
    import granite_switch.hf
    from granite_switch.config import SwitchConfig
except ImportError as error:
    needed = "this model runs with the package granite-switch"
    raise ImportError(f"{needed} ({error}): pip install 'granite-switch[hf]>=0.2'") from error
'''


def write_module(folder: Path) -> None:
    """Write the module into a checkpoint's folder, beside a config.json that names it."""
    (folder / MODULE).write_text(_TEXT, encoding="utf-8")
