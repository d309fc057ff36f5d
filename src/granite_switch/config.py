"""The `PretrainedConfig` that the transformers and vLLM backends share: Granite's, and the `switch` object."""

import json
from functools import lru_cache
from typing import Any

from transformers import GraniteConfig

from granite_switch.core import legacy
from granite_switch.core.spec import MODEL_TYPE, SwitchSpec
from granite_switch.errors import CheckpointError


class GraniteSwitchConfig(GraniteConfig):
    """Configuration of a Granite model with adapters inside.

    Args:
        switch: the `switch` object of config.json (docs/format.md).
        kwargs: as for `GraniteConfig`.

    Raises:
        CheckpointError: `switch` is of a newer format or contradicts itself.
    """

    model_type = MODEL_TYPE
    switch: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.switch is not None:
            self.switch_spec  # noqa: B018  (a bad one is an error here, not at the first use)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; a config of an older generation becomes what it amounts to in format 1."""
        if legacy.generation(config_dict):
            config_dict = legacy.format_1_config(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def switch_spec(self) -> SwitchSpec:
        """The adapters and their tokens."""
        if self.switch is None:
            raise CheckpointError(
                "config.json holds no `switch`, nor the keys of an older generation",
                hint="compose the model: granite-switch compose",
            )
        return _parse(json.dumps(self.switch))


@lru_cache(maxsize=8)
def _parse(switch: str) -> SwitchSpec:
    return SwitchSpec.from_dict(json.loads(switch))
