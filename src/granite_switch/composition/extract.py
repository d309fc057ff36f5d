"""Extract an adapter from a composed model as a PEFT adapter folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter
from granite_switch.composition.composed import VERIFY, Composed, read_composed
from granite_switch.composition.names import PEFT
from granite_switch.composition.sources import PROVENANCE, Source, model_folder
from granite_switch.core.border import write_json
from granite_switch.core.checkpoint import copy_of, write
from granite_switch.core.layout import digest
from granite_switch.core.spec import AdapterSpec
from granite_switch.core.staging import check_target, held, staged
from granite_switch.errors import CheckpointError


def extract(model: Source, name: str, output: Source, *, force: bool = False) -> Path:
    """Write one adapter of a composed model as a PEFT adapter folder, and return the folder.

    Composing from that folder gives the same bytes again: besides PEFT's two files and io.yaml it contains
    `granite_switch.json` with the adapter's original source.

    Args:
        model: a composed model, local folder or hub id.
        name: the adapter's name.
        output: the folder to create.
        force: replace an existing folder.

    Raises:
        SwitchError: there is no such adapter, or its weights differ from those that were composed.
    """
    folder, target = model_folder(model), Path(output)
    check_target(target, force=force)
    with held(folder.resolve()):
        composed = read_composed(folder)
        spec = composed.spec.adapter(name)
        adapter = composed.adapters[name]
        contents = digest(adapter.tensors)
        if spec.digest and contents != spec.digest:
            raise CheckpointError(
                f"{adapter.file}: its weights differ from those that were composed", hint=f"{VERIFY} --deep {folder}"
            )
        with staged(target, force=force) as partial:
            _write(adapter, composed, partial)
            record = {"source": spec.source, "sha256": spec.sha256, "digest": contents}
            write_json(partial / PROVENANCE, record)
    return target


def _write(adapter: Adapter, composed: Composed, folder: Path) -> None:
    tensors = {f"{PEFT}{key.linear}.lora_{key.matrix}.weight": tensor for key, tensor in adapter.tensors.items()}
    entries = [copy_of(tensors[name], name) for name in sorted(tensors)]
    write(folder / "adapter_model.safetensors", entries, aligned=8)  # byte for byte what PEFT writes
    config = _peft_config(adapter.spec, composed.spec.base_model, composed.base.linears)
    write_json(folder / "adapter_config.json", config)
    if adapter.io_yaml:
        (folder / "io.yaml").write_bytes(adapter.io_yaml.read_bytes())


def _peft_config(spec: AdapterSpec, base_model: str, linears: Iterable[str]) -> dict[str, Any]:
    """Return adapter_config.json (PEFT `LoraConfig`); targets are module names if these suffice, otherwise paths."""
    names = set(spec.modules)
    short = {linear for linear in linears if linear.rpartition(".")[2] in names} == set(spec.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": spec.use_rslora,
        "target_modules": list(spec.modules if short else spec.targets),
        "rank_pattern": _pattern(spec.rank_pattern, spec),
        "alpha_pattern": _pattern(spec.alpha_pattern, spec),
        **({"alora_invocation_tokens": list(spec.invocation_tokens)} if spec.invocation_tokens else {}),
    }


def _pattern(values: Mapping[str, Any], spec: AdapterSpec) -> dict[str, Any]:
    """Return values as a PEFT pattern: by module name if all modules of that name agree, otherwise by path."""
    result: dict[str, Any] = {}
    for linear, value in values.items():
        name = linear.rpartition(".")[2]
        alike = [values.get(other) for other in spec.targets if other.rpartition(".")[2] == name]
        result[name if set(alike) == {value} else linear.replace(".", r"\.")] = value
    return result
