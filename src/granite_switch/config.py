"""Configs of switch models, shared by the transformers and vLLM backends: the base's config plus the `switch` object.

On disk `model_type` is granite_switch, so that nothing mistakes the model for its base. In memory it is the base's,
because transformers and vLLM branch on it (windows, hybrids, rope). Config classes are made on demand, one per base.
"""

import copy
import json
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from granite_switch.core import legacy
from granite_switch.core.files import inside
from granite_switch.core.layout import decoder_config
from granite_switch.core.records import read_config
from granite_switch.core.spec import MODEL_TYPE, SwitchSpec, architecture
from granite_switch.errors import CheckpointError, SwitchError


class SwitchConfig(PreTrainedConfig):
    """The config class that AutoConfig has for `granite_switch`; `from_dict` returns the base's own switch config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A switch config for the base that `switch` names; legacy formats are converted to format 1."""
        config_dict = _format_1(config_dict)
        return config_class(_parse(json.dumps(config_dict["switch"])).base_model_type).from_dict(config_dict, **kwargs)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
else:
    _Config = object


class _Switched(_Config):
    """Mixin for the config class of any base."""

    switch: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.switch is not None and (size := self.get_text_config().vocab_size) < (rows := self.switch_spec.rows):
            raise CheckpointError(
                f"config.json: vocab_size {size} is less than the {rows} rows that control tokens need",
                hint="restore config.json, or compose the model again",
            )

    @property
    def switch_spec(self) -> SwitchSpec:
        """The adapters and their tokens.

        Raises:
            CheckpointError: there is no `switch`, or it has a newer format or contradicts itself.
        """
        if self.switch is None:
            raise CheckpointError(
                "config.json has neither a `switch` nor the keys of a legacy format",
                hint="compose the model: granite-switch compose",
            )
        return _parse(json.dumps(self.switch))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = {key: value for key, value in _format_1(config_dict).items() if key != "model_type"}
        try:
            return super().from_dict(config_dict, **kwargs)
        except SwitchError:
            raise
        except Exception as error:  # whatever the base's class says of its keys
            raise CheckpointError(f"config.json: {' '.join(str(error).split())[:300]}") from None

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == MODEL_TYPE:
            config_dict = {**_format_1(config_dict), "model_type": cls.model_type}
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_type": MODEL_TYPE}


def renewed(config: Any, folder: Path) -> Any:
    """A config that was read from a folder's config.json, and that file's adapters, should they have changed since.

    A `switch` that somebody changed in memory stays.
    """
    if not isinstance(config, _Switched) or Path(config._name_or_path).absolute() != folder.absolute():
        return config
    there = read_config(inside(folder, "config.json"))
    if there.get("switch") in (None, config.switch) or json.dumps(config.switch) not in _READ:
        return config
    config = copy.deepcopy(config)
    config.switch = there["switch"]
    config.get_text_config().vocab_size = decoder_config(there)["vocab_size"]
    return config


_READ: deque[str] = deque(maxlen=64)  # every `switch` that came out of a file
_MADE: dict[str, type[PreTrainedConfig]] = {}
_LISTENERS: list[Callable[[type[PreTrainedConfig]], None]] = []


def config_class(base_model_type: str) -> type[PreTrainedConfig]:
    """The config class of a base's switch models: `Qwen3SwitchConfig` for "qwen3".

    Raises:
        CheckpointError: the installed transformers does not know the base.
    """
    if base_model_type not in _MADE:
        _MADE[base_model_type] = _make(base_model_type)
        for listener in _LISTENERS:
            listener(_MADE[base_model_type])
    return _MADE[base_model_type]


def on_config_class(listener: Callable[[type[PreTrainedConfig]], None]) -> None:
    """Call a function with every config class, those made so far and those to come."""
    _LISTENERS.append(listener)
    for made in list(_MADE.values()):
        listener(made)


def _make(base_model_type: str) -> type[PreTrainedConfig]:
    try:
        base = CONFIG_MAPPING[base_model_type]
    except KeyError:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know the base's model type, {base_model_type!r}",
            hint="pip install --upgrade transformers, within the range that granite-switch requires",
        ) from None
    name = architecture(base.__name__)
    body = {"switch": None, "__annotations__": {"switch": dict[str, Any] | None}, "__module__": __name__}
    body["__doc__"] = f"`{base.__name__}` plus the `switch` object of config.json (docs/format.md)."
    return type(name, (_Switched, base), {**body, "__qualname__": name})


def __getattr__(name: str) -> Any:
    """Config classes by name, for imports and unpickling."""
    base: Any = getattr(transformers, name.replace("Switch", "", 1), None) if name.endswith("SwitchConfig") else None
    if not hasattr(base, "model_type"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(base.model_type)


def _format_1(config_dict: dict[str, Any]) -> dict[str, Any]:
    if legacy.legacy_format(config_dict):
        config_dict = legacy.format_1_config(config_dict)
    _READ.append(json.dumps(config_dict.get("switch")))
    if config_dict.get("model_type") == MODEL_TYPE and not isinstance(config_dict.get("switch"), dict):
        raise CheckpointError("config.json: model_type is granite_switch, but there is no `switch` or legacy format")
    return config_dict


@lru_cache(maxsize=8)
def _parse(switch: str) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads(switch))
