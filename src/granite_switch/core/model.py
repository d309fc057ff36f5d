"""What everything that opens a composed model does: read its config.json, and compare its tensors with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_switch.core.files import inside
from granite_switch.core.legacy import UPGRADE, legacy_format
from granite_switch.core.records import read_config
from granite_switch.core.spec import MODEL_TYPE, SwitchSpec
from granite_switch.errors import CheckpointError


def read_model(folder: Path) -> tuple[dict[str, Any], SwitchSpec]:
    """Read a composed model's config.json and its `switch` object.

    Raises:
        CheckpointError: it is not in format 1, or has wrong keys.
    """
    config = read_config(inside(folder, "config.json"))
    kind = config["model_type"]
    if kind == MODEL_TYPE and config.get("switch"):
        return config, SwitchSpec.from_dict(config["switch"])
    hint = "`granite-switch compose` makes one from a base model and adapters"
    if kind == MODEL_TYPE and legacy_format(config):
        hint = UPGRADE
    raise CheckpointError(f"{folder}: is not a composed model of format 1 (model_type {kind!r})", hint=hint)


def shape_problems(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], unknown: str = "not in config.json"
) -> list[str]:
    """Return the differences between tensors and those that config.json implies, in a line each.

    Args:
        found: shapes by name.
        expected: shapes by name.
        unknown: what is said of a tensor that is not expected.
    """
    return [
        *(f"{name}: missing" for name in expected if name not in found),
        *(f"{name}: {unknown}" for name in found if name not in expected),
        *(
            f"{name}: shape {list(shape)}, but config.json says {list(expected[name])}"
            for name, shape in found.items()
            if shape != expected.get(name, shape)
        ),
    ]
