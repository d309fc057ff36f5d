"""Load adapter files without transformers' cost per tensor.

transformers compiles a regular expression for each tensor and expands the device map twice, which for the hundreds of
small tensors of an adapter takes most of the loading time. Where loading means only reading and placing tensors,
adapter files are read here. transformers loads everything else.
"""

from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import expand_device_map
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from granite_switch.core.layout import parse_key


def load_adapters(model: PreTrainedModel, files: Sequence[str], load_config: Any) -> tuple[list[str], set[str]]:
    """Load every file that holds only tensors of the model's adapters.

    Args:
        model: with its parameters on the meta device.
        files: the checkpoint's.
        load_config: transformers' `LoadStateDictConfig`.

    Returns:
        The files left to transformers, and the names of the loaded parameters. Left to transformers are files with an
        unexpected tensor or shape, which it reports; and all files with a quantiser, tensor parallelism, disk offload,
        `dtype_plan` or ZeRO 3.
    """
    devices = load_config.device_map or {"": "cpu"}
    plain = not (load_config.hf_quantizer or load_config.device_mesh or load_config.dtype_plan)
    if not plain or load_config.disable_mmap or "disk" in devices.values() or is_deepspeed_zero3_enabled():
        return list(files), set()
    parameters = dict(model.named_parameters())
    left, found = [], []
    for file in files:
        names = _names(file, parameters) if file.endswith(".safetensors") else None
        if names is None:
            left.append(file)
        else:
            found.append((file, names))
    if not left:
        return list(files), set()
    loaded = {name for _, names in found for name in names.values()}
    devices = expand_device_map(devices, sorted(loaded))
    modules = dict(model.named_modules())
    for file, names in found:
        with safe_open(file, framework="pt") as opened:
            for key, name in names.items():
                module, _, attribute = name.rpartition(".")
                value = opened.get_tensor(key).to(devices[name], parameters[name].dtype)
                parameter = nn.Parameter(value)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or it would be re-initialised
                setattr(modules[module], attribute, parameter)
    return left, loaded


def _names(file: str, parameters: dict[str, nn.Parameter]) -> dict[str, str] | None:
    """Tensor name -> parameter name, for a file; None if any tensor is not an adapter's or has another shape."""
    names = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118  (no mapping)
            if parse_key(key) is None:
                return None
            name = key if key in parameters else key.removeprefix("model.")  # in a model without a head
            parameter = parameters.get(name)
            if parameter is None or list(parameter.shape) != opened.get_slice(key).get_shape():
                return None
            names[key] = name
    return names
