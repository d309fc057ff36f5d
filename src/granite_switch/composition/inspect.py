"""Describe a composed model, and measure how strongly each adapter changes each linear."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from granite_switch.composition.composed import Composed, read_composed
from granite_switch.composition.effect import update_norm
from granite_switch.composition.sources import model_folder
from granite_switch.core.checkpoint import Checkpoint
from granite_switch.core.files import steady
from granite_switch.core.layout import at_layer, decoder_config
from granite_switch.core.packed import FLOATS
from granite_switch.core.spec import AdapterSpec
from granite_switch.errors import SwitchError


@dataclass(frozen=True)
class AdapterReport:
    """One adapter of a composed model."""

    slot: int
    name: str
    technology: str
    rank: int
    ranks: tuple[int, int]  # smallest and largest
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    parameters: int
    nbytes: int
    share: float  # of the model's bytes
    token: str
    token_id: int
    substitute: str
    substitute_token_id: int
    invocation_text: str  # the text from which an aLoRA acts; "" for a LoRA
    source: str
    sha256: str
    io_config: bool


@dataclass(frozen=True)
class Report:
    """A composed model."""

    model: str
    format_version: int
    base_model: str
    base_model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    dtypes: tuple[str, ...]  # of the base's tensors
    parameters: int  # the base's
    nbytes: int  # the base's
    return_to_base: str
    return_to_base_id: int
    generatable: bool
    adapters: tuple[AdapterReport, ...]
    retired: tuple[str, ...]  # names of removed adapters, whose slots stay reserved

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return asdict(self)


def inspect(model: str | PathLike[str]) -> Report:
    """Describe a composed model. Only headers and small files are read.

    Args:
        model: local folder or hub id.

    Raises:
        CheckpointError: it is not in format 1, or its files contradict each other.
    """
    folder = model_folder(model)
    composed = steady(folder, lambda: read_composed(folder))
    spec, base = composed.spec, composed.base
    tensors = base.checkpoint.tensors.values()
    total = base.checkpoint.nbytes + sum(adapter.nbytes for adapter in composed.adapters.values())
    adapters = (_adapter(slot, a, composed, total) for slot, a in enumerate(spec.adapters, 1) if not a.retired)
    return Report(
        model=str(model),
        format_version=spec.format_version,
        base_model=spec.base_model,
        base_model_type=spec.base_model_type,
        layers=base.layers,
        hidden_size=base.checkpoint[base.vocabulary.embedding].shape[1],
        vocab_size=decoder_config(composed.config)["vocab_size"],
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        nbytes=base.checkpoint.nbytes,
        return_to_base=spec.base_token,
        return_to_base_id=spec.base_token_id,
        generatable=spec.generatable,
        adapters=tuple(adapters),
        retired=tuple(a.name for a in spec.adapters if a.retired),
    )


def _adapter(slot: int, spec: AdapterSpec, composed: Composed, total: int) -> AdapterReport:
    adapter = composed.adapters[spec.name]
    ranks = [t.shape[0] for key, t in adapter.tensors.items() if key.matrix == "A"]
    return AdapterReport(
        slot=slot,
        name=spec.name,
        technology=spec.technology,
        rank=spec.rank,
        ranks=(min(ranks), max(ranks)),
        alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        target_modules=spec.modules,
        parameters=sum(math.prod(tensor.shape) for tensor in adapter.tensors.values()),
        nbytes=adapter.nbytes,
        share=adapter.nbytes / total,
        token=spec.token,
        token_id=spec.token_id,
        substitute=composed.base.tokenizer.library.id_to_token(spec.substitute_token_id) or "",
        substitute_token_id=spec.substitute_token_id,
        invocation_text=spec.invocation_text,
        source=spec.source,
        sha256=spec.sha256,
        io_config=adapter.io_yaml is not None,
    )


@dataclass(frozen=True)
class Strengths:
    """The Frobenius norm of s B A divided by that of W, for each adapter, module and layer."""

    modules: tuple[str, ...]  # paths relative to a layer: `self_attn.q_proj`
    values: Mapping[str, npt.NDArray[np.float64]]  # adapter -> [modules, layers]; 0: no update, NaN: W is quantised


def strengths(model: str | PathLike[str]) -> Strengths:
    """Measure how strongly each adapter changes each linear.

    Args:
        model: local folder or hub id.
    """
    folder = model_folder(model)
    return steady(folder, lambda: _strengths(read_composed(folder)))


def _strengths(composed: Composed) -> Strengths:
    places = {linear: at_layer(linear) for spec in composed.spec.active for linear in spec.targets}
    modules = tuple(dict.fromkeys(module for _, _, module in places.values()))
    layers = 1 + max((int(layer) for _, layer, _ in places.values()), default=0)
    values = {name: np.zeros((len(modules), layers)) for name in composed.adapters}
    for linear, (_, layer, module) in places.items():
        of_base = _base_norm(composed.base.checkpoint, linear)
        for name, adapter in composed.adapters.items():
            if linear in adapter.spec.ranks:
                norm = update_norm(adapter.spec, adapter.tensors, linear)
                values[name][modules.index(module), int(layer)] = norm / of_base
    return Strengths(modules, values)


def _base_norm(checkpoint: Checkpoint, linear: str) -> float:
    weight = checkpoint.tensors.get(f"{linear}.weight")
    return float(np.linalg.norm(weight.float32())) if weight and weight.dtype in FLOATS else math.nan


def plot(strengths: Strengths, path: Path) -> None:
    """Plot `strengths` as heat maps: one panel for each adapter, layers along x, one colour scale for all.

    Raises:
        SwitchError: matplotlib is not installed, or cannot write this type of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SwitchError("a plot needs matplotlib", hint="pip install 'granite-switch[plot]'") from None
    values, modules = strengths.values, strengths.modules
    columns = min(3, len(values)) or 1
    rows = math.ceil(len(values) / columns) or 1
    figure = Figure(figsize=(1.5 + 4.2 * columns, 0.8 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    largest = max((float(np.nanmax(v)) for v in values.values() if not np.isnan(v).all()), default=0.0) or 1.0
    image = None
    for panel, (name, grid) in zip(panels, values.items(), strict=False):
        image = panel.imshow(np.where(grid == 0, np.nan, grid), aspect="auto", vmin=0, vmax=largest, cmap="viridis")
        panel.set_facecolor("0.92")
        panel.set_title(name, fontsize=10)
        panel.set_yticks(
            range(len(modules)), [name.rpartition(".")[2].removesuffix("_proj") for name in modules], fontsize=8
        )
        panel.set_xlabel("layer", fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(values) :]:
        panel.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="|s B A| / |W|")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SwitchError(f"{path}: cannot be written ({error})") from None
