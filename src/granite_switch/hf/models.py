"""Switch models: subclasses made from any `...ForCausalLM` of transformers and from its decoder.

The decoder's forward reads the slots from the token ids, replaces control tokens with their substitutes and calls the
base's forward with all other arguments unchanged; its linears add the updates (`hf.updates`). The class with a head
handles logits and labels. Classes are made on demand, and looked up by name when they are unpickled.
"""

import os
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.masking_utils import create_masks_for_generate

from granite_switch.config import config_class, renewed
from granite_switch.core.files import steady
from granite_switch.core.spec import SwitchSpec, architecture
from granite_switch.errors import CheckpointError, RoutingError
from granite_switch.hf.arguments import Arguments, with_signature
from granite_switch.hf.cache import add_slots, cache_of, cached_positions, find_slots
from granite_switch.hf.layers import wrap_layers
from granite_switch.hf.legacy import Hiding, masked, state_dict_of
from granite_switch.hf.loading import load_adapters
from granite_switch.hf.parallel import add_plans
from granite_switch.hf.releases import (
    accepted_arguments,
    cache_name,
    parameter_names,
    record_outputs,
    share_conversions,
)
from granite_switch.hf.routing import Scope, Switch, route, sequence_starts
from granite_switch.hf.saving import save_switch_model
from granite_switch.hf.suppress import Suppress, ranges
from granite_switch.hf.updates import Site, Updates, add_updates

_MARGIN = 128.0  # below another token's logit: exp(-128) is 0 in float32, and no arithmetic on logits overflows

if TYPE_CHECKING:  # the base's classes follow these in the subclasses' MRO

    class _Model(PreTrainedModel):
        pass

    class _CausalModel(PreTrainedModel, GenerationMixin):
        pass

else:
    _Model = _CausalModel = object


class SwitchPreTrainedModel(_Model):
    """Common to all switch models: initialisation, loading, saving."""

    # older checkpoints store these; here they are derived from the config
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)adapter_token_ids$",
        r"(^|\.)token_to_group_mask$",
        r"(^|\.)adapter_hiding_matrix$",
    ]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers converts checkpoints only for its own models, and the base is one."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Updates):
            module.reset_parameters()
        elif isinstance(module, (Switch, Hiding)):
            module.fill()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`. A folder that another command replaces meanwhile is loaded again."""
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        folder = Path(name) if isinstance(name, str | PathLike) and os.path.isdir(name) else None

        def load() -> Any:
            config = {"config": renewed(kwargs["config"], folder)} if folder and "config" in kwargs else {}
            return super(SwitchPreTrainedModel, cls).from_pretrained(*args, **{**kwargs, **config})

        loaded = steady(folder, load, (Exception,)) if folder else load()
        decoder_of(loaded[0] if isinstance(loaded, tuple) else loaded).attach_adapters()
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', with a legacy format's tensors renamed to format 1, and adapter files read directly."""
        state_dict = state_dict_of(model.config, state_dict, checkpoint_files)
        loaded: set[str] = set()
        if state_dict is None and checkpoint_files:
            checkpoint_files, loaded = load_adapters(model, checkpoint_files, load_config)
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        info.missing_keys -= loaded
        missing = sorted(info.missing_keys - set(model.all_tied_weights_keys))
        if missing and not (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, which would be random",
                problems=missing[:10],
                hint="check the files: granite-switch verify",
            )
        return info, offloaded

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a format 1 checkpoint. Arguments as for `PreTrainedModel.save_pretrained`."""
        save_switch_model(self, save_directory, super().save_pretrained, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; also resizes the switch's tables.

        Raises:
            CheckpointError: `new_num_tokens` is less than the rows that control tokens need.
        """
        spec: SwitchSpec = self.config.switch_spec
        if new_num_tokens is not None and new_num_tokens < spec.rows:
            raise CheckpointError(
                f"resize_token_embeddings({new_num_tokens}): control tokens need {spec.rows} rows",
                hint="to remove adapters: granite-switch remove",
            )
        embedding: Any = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows = embedding.weight.shape[0]
        for module in self.modules():
            if isinstance(module, (Switch, Hiding)):
                module.resize(rows, embedding.weight.device)
        return embedding


class SwitchDecoder(Arguments, _Model):
    """A decoder that routes its input and adds updates to its linears."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._install(f"{self.base_model_prefix}.")

    def _install(self, prefix: str) -> None:
        """Add the switch and the updates to the decoder.

        Args:
            prefix: prefix of the checkpoint's paths that the decoder's own paths lack.
        """
        spec = self.config.switch_spec
        size = self.config.get_text_config().vocab_size
        self.switch = Switch(spec, size)
        self.hiding = Hiding(spec, size) if spec.hiding else None
        self.switch_scope = Scope()
        self.switch_sites: list[Site] = add_updates(self, spec, prefix, self.switch_scope)
        wrap_layers(self, self.switch_sites)
        add_plans(self, self.switch_sites)
        record_outputs(self)
        self._accepted = accepted_arguments(self)
        self.attach_adapters()

    def attach_adapters(self) -> None:
        """Attach the current linears. Every forward does this; call it yourself before `torch.compile`."""
        for site in self.switch_sites:
            site.attach()

    def forward(self, *args: Any, base_only: bool = False, **kwargs: Any) -> Any:
        kwargs = self._arguments(args, kwargs)
        for site in self.switch_sites:
            if site.stale():
                site.attach()
        embeds: Any = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids")
        if ids is None and (embeds is None or not base_only):
            raise _no_ids(embeds is not None)
        past = kwargs.get(self._cache_name)
        layer = find_slots(past)
        if ids is None:
            ids = slots = torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        else:
            starts = sequence_starts(kwargs, ids) if past is None else None
            slots, kwargs["input_ids"] = self.switch(ids, layer.last() if layer else None, starts)
        before = 0 if past is None or layer is not None else cached_positions(past)
        layers = self.config.get_text_config().num_hidden_layers
        if self.hiding is not None:
            if past is not None:
                layer = layer or add_slots(past, layers, len(slots), before, slots.device)
            self._hide(self.hiding, ids, slots, layer, kwargs)
        linears = ((id(site.updates), site.updates.pair) for site in self.switch_sites)
        token = self.switch_scope.enter(route(slots, layer, linears))
        try:
            outputs = super().forward(**kwargs)
        finally:
            self.switch_scope.leave(token)
        cache = past if past is not None else cache_of(outputs, self._cache_name)
        if cache is not None:
            layer = layer or add_slots(cache, layers, len(slots), before, slots.device)
            layer.append(slots, ids)
        return outputs

    def _hide(self, hiding: Hiding, ids: Tensor, slots: Tensor, layer: Any, kwargs: dict[str, Any]) -> None:
        """Legacy format 1: mask the keys that adapters hide, and close the gaps they leave in the positions."""
        cache = kwargs.get(self._cache_name)
        past = 0 if cache is None else cache.get_seq_length()
        new = torch.arange(slots.shape[1], device=slots.device) + past
        suppressed, members, gaps = hiding(layer.with_new(ids, new) if layer else ids, new, slots)
        if hiding.rules.groups:
            like = torch.empty((*slots.shape, 0), dtype=self.dtype, device=slots.device)
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            kwargs["attention_mask"] = masked(
                self.config,
                suppressed,
                members,
                new,
                mask,
                {self._cache_name: cache, "inputs_embeds": like, "position_ids": positions},
            )
        positions = kwargs.get("position_ids")
        kwargs["position_ids"] = ((new[None] if positions is None else positions) - gaps).clamp(min=0)


class SwitchForCausalLM(Arguments, _CausalModel):
    """A language model with adapters that control tokens switch."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        spec: SwitchSpec = config.switch_spec
        decoder, prefix = _innermost(self.base_model, f"{self.base_model_prefix}.")
        if not isinstance(decoder, SwitchDecoder):
            decoder.__class__ = decoder_class(type(decoder))
            decoder._install(prefix)
        add_plans(self, decoder.switch_sites, prefix)
        record_outputs(self)
        self._accepted = accepted_arguments(self)
        decoder._accepted |= self._accepted  # the base's forward passes arguments through to the decoder
        self.substitutes = spec.substitutes
        self.suppressed = tuple(ranges(spec.suppressed))
        self.reference = next(i for i in range(len(spec.suppressed) + 1) if i not in spec.suppressed)

    @property
    def loss_function(self) -> Any:
        """The base's loss function, applied to logits with control tokens suppressed."""
        base = super().loss_function

        def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._loss_seen = True
            return base(self._suppress(logits), *args, **kwargs)

        return loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._arguments(args, kwargs)
        for name in ("labels", "shift_labels"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = self._substituted(kwargs[name])
        if not kwargs.get("base_only", True):
            del kwargs["base_only"]
        with_loss = kwargs.get("labels") is not None
        if with_loss:
            self._loss_seen = False
        outputs = super().forward(**kwargs)
        if with_loss and not self._loss_seen:
            raise RoutingError(
                f"{type(self).__name__} computes its own loss, which includes the logits of control tokens",
                hint="pass no labels and compute the loss from the logits",
            )
        if not with_loss:
            self._suppress(outputs[0] if isinstance(outputs, tuple) else outputs.logits)
        return outputs

    def _suppress(self, logits: Tensor) -> Tensor:
        """Set control tokens' logits, in place, so far below the base's first token's that their probability is 0.

        Not -inf: guidance, label smoothing and distillation do arithmetic on all logits.
        """
        if self.suppressed:
            floor = logits.detach()[..., self.reference, None] - _MARGIN
            for tokens in self.suppressed:
                logits[..., tokens] = floor
        return logits

    def _substituted(self, labels: Tensor) -> Tensor:
        """Labels with control tokens replaced by their substitutes, which the model should predict there."""
        substituted = labels
        for token, substitute in self.substitutes.items():
            substituted = substituted.masked_fill(labels == token, substitute)
        return substituted

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As transformers', with `Suppress` first, or second after guidance, which needs finite logits."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        if self.suppressed:
            guided = bool(processors) and type(processors[0]).__name__.startswith("UnbatchedClassifierFreeGuidance")
            processors.insert(int(guided), Suppress(self.suppressed))
        return processors

    def create_masks_for_generate(self, attention_mask: Any, **kwargs: Any) -> Any:
        """As transformers', which builds a static cache's masks in advance. In legacy format 1 `forward` does."""
        if decoder_of(self).hiding is not None:
            return attention_mask
        base = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return base(attention_mask=attention_mask, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Entry point of `generate_batch`, which is not supported.

        Raises:
            RoutingError: always. A paged cache cannot store the slots of cached positions.
        """
        raise RoutingError(
            "`generate_batch` uses a paged cache, which cannot store the adapter of each cached position",
            hint="use `generate`, which takes mixed batches, or serve the model with vLLM (docs/serving.md)",
        )


def decoder_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The switch model of a decoder without a head: `GraniteSwitchModel` of `GraniteModel`."""
    return _made(base, SwitchDecoder, ())  # type: ignore[arg-type]


def causal_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The switch model of a language model: `GraniteSwitchForCausalLM` of `GraniteForCausalLM`."""
    return _made(base, SwitchForCausalLM, (GenerationMixin,))  # type: ignore[arg-type]


@cache
def pretrained_class(base: type[Any]) -> type[PreTrainedModel]:
    """`GraniteSwitchPreTrainedModel` of `GranitePreTrainedModel`."""
    name = architecture(base.__name__)
    return type(name, (SwitchPreTrainedModel, base), {"__module__": __name__, "__qualname__": name})


@cache
def _made(base: type[Any], part: type[Any], more: tuple[type, ...]) -> type[PreTrainedModel]:
    name, parameters = architecture(base.__name__), parameter_names(base.forward)
    root = next(c for c in base.__mro__ if PreTrainedModel in c.__bases__)
    body: dict[str, Any] = {"__module__": __name__, "__qualname__": name}
    body["__doc__"] = f"`{base.__name__}` with adapters that control tokens switch."
    body |= {"_parameters_of_base": parameters, "_cache_name": cache_name(parameters)}
    body |= {"forward": with_signature(part.forward, base.forward)}
    body["config_class"] = config_class(base.config_class.model_type)
    made = type(name, (part, pretrained_class(root), base, *more), body)
    share_conversions(base, made)
    return made


def register(config: type[Any]) -> None:
    """Register the models of a config class from `granite_switch.config` with the Auto classes."""
    base = next(c for c in config.__mro__ if c.__module__.startswith("transformers.models"))
    for auto, make in ((AutoModel, decoder_class), (AutoModelForCausalLM, causal_class)):
        if base in auto._model_mapping:
            model: Any = auto._model_mapping[base]
            made: Any = make(model[0] if isinstance(model, tuple) else model)
            auto._model_mapping.register(config, made, exist_ok=True)  # some bases use another base's classes


def __getattr__(name: str) -> Any:
    """Switch models by class name, for imports and unpickling."""
    base = getattr(transformers, name.replace("Switch", "", 1), None) if "Switch" in name else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("PreTrainedModel"):
        return pretrained_class(base)  # type: ignore[arg-type]
    return causal_class(base) if issubclass(base, GenerationMixin) else decoder_class(base)


def decoder_of(model: Any) -> Any:
    """The decoder of a switch model; the model itself if it has no head."""
    return next(module for module in model.modules() if isinstance(module, SwitchDecoder))


def _innermost(decoder: Any, prefix: str) -> tuple[Any, str]:
    """The decoder inside a module that only wraps it, as in OPT, whose class with a head calls it; and its prefix."""
    children = list(decoder.named_children())
    while len(children) == 1 and isinstance(children[0][1], PreTrainedModel):
        name, decoder = children[0]
        prefix += f"{name}."
        children = list(decoder.named_children())
    return decoder, prefix


def _no_ids(embeds: bool) -> RoutingError:
    if not embeds:
        return RoutingError("neither input_ids nor inputs_embeds were given", hint="pass input_ids")
    return RoutingError(
        "control tokens are read from `input_ids`, but this forward got only `inputs_embeds` (`generate` with both "
        "passes no ids in its first step, and prompt tuning passes none)",
        hint="pass input_ids alone, or base_only=True to run all of inputs_embeds on the base model",
    )
