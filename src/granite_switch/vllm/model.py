"""Switch models for any decoder that vLLM serves with LoRA: subclasses of vLLM's classes, made on demand.

Control tokens determine the slot of each token and are replaced by their substitutes before embedding (`switch`); the
linears add the adapters' updates (`lora`); control tokens cannot be generated. Loading, packing, parallelism and
compilation are vLLM's.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models import supports_lora
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from granite_switch.core import legacy
from granite_switch.core.files import state_of
from granite_switch.core.layout import AdapterTensor, parse_key
from granite_switch.core.model import shape_problems
from granite_switch.core.records import read_config
from granite_switch.core.spec import AdapterSpec, SwitchSpec, architecture
from granite_switch.errors import CheckpointError, ServingError
from granite_switch.vllm import unlisted
from granite_switch.vllm.linears import Edges, Place, find
from granite_switch.vllm.lora import SwitchedLinear, make_router
from granite_switch.vllm.switch import Switch

logger = logging.getLogger("granite_switch")

_Decoder: Any = object  # in the made class, vLLM's class of the decoder takes its place


class Switched(_Decoder):
    """Mixin for vLLM's class of a decoder. Under pipeline parallelism the intermediate tensors include the slots."""

    supports_lora = False
    base_architecture: str  # vLLM's class, as the base's config names it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        with _as_base(config, self.base_architecture):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.spec = config.switch_spec
        self.load_format = vllm_config.load_config.load_format
        self.in_pieces = vllm_config.weight_transfer_config is not None  # a trainer may send one tensor per call
        text = config.get_text_config()
        self.router = make_router(self.spec, vllm_config)
        if get_pp_group().is_first_rank:
            name = maybe_prefix(prefix, f"switch.{text.num_hidden_layers}")
            self.switch = Switch(self.spec, text.vocab_size, vllm_config, name)
        forbidden = torch.tensor(self.spec.suppressed, dtype=torch.int64)
        self.register_buffer("forbidden", forbidden, persistent=False)
        self.linears: dict[str, SwitchedLinear] = {}  # by vLLM's paths
        self.finished = False  # set when the adapters are attached to the linears
        self.random = False  # set while the adapters have the random values of `--load-format dummy`
        self.pending: dict[AdapterTensor, Tensor] = {}  # the adapters' tensors, until the linears can take them
        self.kept: dict[AdapterTensor, Tensor] = {}  # the adapters' tensors, of which `in_pieces` replaces some
        self.edges: dict[str, Edges] = {}  # of the weights that adapters update, by their linears' paths
        self.base: set[str] = set()  # the base's parameters, as its loader names them
        self.replaced: set[str] = set()  # what new weights replaced since they last replaced the whole base
        make: Any = getattr(self, "make_empty_intermediate_tensors", None)
        if make is not None:
            self.make_empty_intermediate_tensors = _with_slots(make)

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().embed_input_ids(self.switch.substitute[input_ids], *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """As the base's forward: ids and positions [T] of a flattened batch to [T, hidden].

        Raises:
            ServingError: the loader did not call `process_weights_after_loading`, which attaches the adapters.
        """
        if not self.finished:
            raise _not_loaded(self.load_format)
        if get_pp_group().is_first_rank:
            slots = self.switch(input_ids, positions)
            input_ids = self.switch.substitute[input_ids]
        else:
            received = dict(intermediate_tensors.tensors)  # type: ignore[union-attr]
            slots = received.pop("slots")
            intermediate_tensors = IntermediateTensors(received)
        self.router.route(slots)
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if isinstance(output, IntermediateTensors):
            return IntermediateTensors({**output.tensors, "slots": slots})
        return output

    def compute_logits(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """[T, hidden] to [T, V]; control tokens at -inf unless `switch.generatable`."""
        logits = super().compute_logits(*args, **kwargs)
        return None if logits is None else logits.index_fill_(-1, self.forbidden, float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base with vLLM's loader, and keep the adapters until its linears can take them.

        When called again (vLLM reloads weights, or a trainer sends new ones), the adapters in `weights` are replaced.
        They must then be complete. With `--weight-transfer-config` some are enough, and a stream may have none.

        Raises:
            CheckpointError: adapter tensors are missing, unknown or of another shape than config.json says, or another
                command has replaced the folder, or the adapters have random values (`--load-format dummy`) and the
                new weights do not replace them.
        """
        stored = not self.finished or _are_stored(weights)
        before = state_of(self.folder)
        self.pending = {}
        loaded = super().load_weights(self._without_adapters(weights))
        if stored:
            self._check_state(before)
        new = loaded | {tensor.key for tensor in self.pending}
        if self.pending or stored:
            self._check_adapters(stored)
            self.random = False
        elif self.random:
            raise CheckpointError(
                "the adapters have random values, and the new weights do not include adapters",
                hint="start with --load-format auto, or send the adapters too",
            )
        if self.finished:
            self._warn_of_old_adapters(new)
            self._fill()
        else:
            self._check_order()
            self.base = loaded
        return new

    @property
    def folder(self) -> Path:
        """The model's folder, which changes when vLLM reloads weights from another one."""
        return Path(self.router.vllm_config.model_config.model)

    def _check_state(self, before: tuple[int, ...]) -> None:
        """Weights must be of one state of the folder, and of the config that vLLM read before."""
        path = self.folder / "config.json"
        now = read_config(path).get("switch") if path.is_file() else None
        if state_of(self.folder) != before or (now and _fixed(SwitchSpec.from_dict(now)) != _fixed(self.spec)):
            raise CheckpointError(
                f"{self.folder}: changed while it was being loaded, or has other adapters than the engine started with",
                hint="start the engine again when no other command is changing the folder",
            )

    def _check_order(self) -> None:
        """Each weight that adapters update must be in vLLM's linear as it is in the files."""
        changed = [
            p for p, e in self.edges.items() if not e.kept(self.get_submodule(self._places[p].module), self._places[p])
        ]
        self.edges = {}
        if changed:
            raise ServingError(
                "vLLM reorders or scales these weights of the base when it loads them, so adapters would not fit them",
                problems=changed,
                hint="use the transformers backend, or compose with adapters that leave these linears out",
            )

    def _warn_of_old_adapters(self, new: set[str]) -> None:
        """Warn when the whole base was replaced and no adapter: only the sender knows whether that is meant."""
        self.replaced |= new
        if not self._places or not self.base <= self.replaced:
            return
        if self.base == self.replaced:
            logger.warning(
                "new weights replaced the whole base and no adapter: the adapters are still those of the old base. If "
                "they were trained too, send them as well"
            )
        self.replaced = set()

    def _without_adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base's weights; moves the adapters' tensors to `pending`."""
        for name, tensor in self._as_format_1(weights):
            found = parse_key(name)
            if found is None:
                path, _, kind = name.rpartition(".")
                if not self.finished and kind in ("weight", "weight_packed") and path in self._places:
                    self.edges[path] = Edges.of(kind, tensor)
                yield name, tensor
            else:
                self.pending[found] = tensor.cpu()

    def _as_format_1(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Split the fused tensors of legacy formats 2 and 3, from the first name that only they have."""
        granite = self.config.model_type == "granite"  # other bases have such names in format 1 too
        weights = iter(weights)
        for name, tensor in weights:
            if granite and legacy.is_fused([name]):
                yield from legacy.split(chain([(name, tensor)], weights), self.config.to_dict())
            else:
                yield name, tensor

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The linears that adapters update and that are on this pipeline rank, by their paths in the base's files."""
        return find(self, dict.fromkeys(path for adapter in self.spec.adapters for path in adapter.ranks))

    @cached_property
    def _members(self) -> dict[str, list[str | None]]:
        """For each of vLLM's linears, the paths of those that it packs; None for those that no adapter updates."""
        result: dict[str, list[str | None]] = {}
        for path, place in self._places.items():
            result.setdefault(place.module, [None] * len(place.members))[place.index] = path
        return result

    def _expected(self) -> dict[AdapterTensor, tuple[int, ...]]:
        """Shapes of the adapters' tensors for the linears on this pipeline rank."""
        shapes = {path: place.shape for path, place in self._places.items()}
        return {t: shape for adapter in self.spec.adapters for t, shape in adapter.tensors(shapes).items()}

    def _check_adapters(self, stored: bool) -> None:
        expected = self._expected()
        elsewhere = {path for adapter in self.spec.adapters for path in adapter.ranks} - set(self._places)
        self.pending = {t: value for t, value in self.pending.items() if t.linear not in elsewhere}
        found = {t.key: tuple(value.shape) for t, value in self.pending.items()}
        partial = self.in_pieces and not stored and not self.random
        wanted = {t.key: shape for t, shape in expected.items() if t in self.pending or not partial}
        if problems := shape_problems(found, wanted):
            source = self.folder if stored else "new weights"
            raise CheckpointError(f"{source}: the adapters' tensors do not match config.json", problems=problems)

    def process_weights_after_loading(self) -> None:
        """Attach the adapters. vLLM calls this after loading, when quantised linears are repacked.

        Raises:
            ServingError: the loader did not deliver the adapters, or vLLM has no LoRA layer for a linear.
        """
        if hasattr(super(), "process_weights_after_loading"):
            super().process_weights_after_loading()
        if self.finished:
            return
        self.random = self.load_format == "dummy"
        if self.random:
            self.pending = {t: torch.randn(shape) * 1e-3 for t, shape in self._expected().items()}
            self.base = {name for name, _ in self.named_parameters()}
        elif self._places and not self.pending:
            raise _not_loaded(self.load_format)
        for module, members in {place.module: place.members for place in self._places.values()}.items():
            rank = max(a.ranks.get(path, 0) for a in self.spec.adapters for path in self._members[module] if path)
            self.linears[module] = self.router.attach(self.get_submodule(module), module, members, rank)
        self.finished = True
        self._fill()

    def _fill(self) -> None:
        """Move the pending adapters into the linears."""
        self.kept |= self.pending
        for module, name in dict.fromkeys((self._places[t.linear].module, t.adapter) for t in self.pending):
            pairs = [self._pair(self.spec.adapter(name), path) for path in self._members[module]]
            self.linears[module].set(self.spec.slot(name), *zip(*pairs, strict=True))
        self.pending = {}
        if not self.in_pieces:
            self.kept = {}

    def _pair(self, adapter: AdapterSpec, path: str | None) -> tuple[Tensor | None, Tensor | None]:
        """An adapter's A and scaled B for one linear; None if it does not update it."""
        if path is None or path not in adapter.ranks:
            return None, None
        a, b = (self.kept[AdapterTensor(adapter.name, path, matrix)] for matrix in "AB")
        return a, b.float() * adapter.scale_of(path)


def _are_stored(weights: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether weights come from a folder: vLLM passes on the generator of a loader's `get_all_weights`."""
    return getattr(weights, "__name__", "") == "get_all_weights"


def _fixed(spec: SwitchSpec) -> list[AdapterSpec]:
    """The adapters' records without what changes when only their values do."""
    return [replace(adapter, source="", sha256="", digest="", warnings=()) for adapter in spec.adapters]


def _not_loaded(load_format: str) -> ServingError:
    return ServingError(
        f"--load-format {load_format} does not pass the adapters to the model", hint="use --load-format auto"
    )


def _with_slots(make: Any) -> Any:
    def make_empty(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        slots = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return IntermediateTensors({**make(batch_size, dtype, device).tensors, "slots": slots})

    return make_empty


@contextmanager
def _as_base(config: Any, base: str) -> Iterator[None]:
    """Give a config the base's own class and architecture, by which vLLM's Transformers backend finds its parts."""
    own = type(config), config.architectures
    config.__class__, config.architectures = CONFIG_MAPPING[config.model_type], [base]
    try:
        yield
    finally:
        config.__class__, config.architectures = own


@cache
def switched(base: str) -> type[nn.Module]:
    """The switch model class of one of vLLM's architectures.

    Raises:
        ServingError: vLLM does not support LoRA for it.
    """
    listed = base if base in ModelRegistry.models else "TransformersForCausalLM"
    cls, name = ModelRegistry.models[listed].load_model_cls(), architecture(base)
    if not supports_lora(cls):
        raise ServingError(f"{base}: vLLM does not support LoRA for it, which adapters need")
    own = {"__module__": __name__, "__qualname__": name, "__doc__": cls.__doc__, "base_architecture": base}
    return type(name, (Switched, cls), own)


def __getattr__(name: str) -> type[nn.Module]:
    """Switch model classes by name, for vLLM's registry. The part after @ is the version, a key of vLLM's cache."""
    bases = {architecture(base): base for base in [*unlisted(), *ModelRegistry.get_supported_archs()]}
    try:
        return switched(bases[name.partition("@")[0]])
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
