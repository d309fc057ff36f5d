"""Granite with adapters inside: transformers' Granite classes, and only what differs from them.

Differences: control tokens give way to their substitutes before embedding; each block adds the adapters' updates to
its projections; control tokens cannot be generated. Everything else is inherited.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.granite.modeling_granite import (
    GraniteAttention,
    GraniteForCausalLM,
    GraniteMLP,
    GraniteModel,
    GranitePreTrainedModel,
    GraniteRMSNorm,
    GraniteRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from granite_switch.config import GraniteSwitchConfig
from granite_switch.core import layout
from granite_switch.errors import RoutingError
from granite_switch.hf.cache import slot_layer
from granite_switch.hf.generations import Hiding, masked, state_dict_of
from granite_switch.hf.loading import load_adapters
from granite_switch.hf.lora import SwitchedLora
from granite_switch.hf.parallel import PLAN
from granite_switch.hf.routing import Routing, Switch, route
from granite_switch.hf.saving import save_switch_model


class GraniteSwitchAttention(GraniteAttention):
    """Granite's attention, with the adapters' updates on q, k, v and o."""

    def __init__(self, config: GraniteSwitchConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        _add_adapters(self, config, layer_idx, "self_attn")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        routing: Routing,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        projected = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        if routing.switched:
            projected = self.qkv_lora(hidden_states, projected, routing)
        query, key, value = (p.view(*input_shape, -1, self.head_dim).transpose(1, 2) for p in projected)

        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )

        mixed = mixed.reshape(*input_shape, -1).contiguous()
        output = self.o_proj(mixed)
        if routing.switched:
            (output,) = self.o_lora(mixed, [output], routing)
        return output, weights


class GraniteSwitchMLP(GraniteMLP):
    """Granite's MLP, with the adapters' updates on gate, up and down."""

    def __init__(self, config: GraniteSwitchConfig, layer_idx: int) -> None:
        super().__init__(config)
        _add_adapters(self, config, layer_idx, "mlp")

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if routing.switched:
            gate, up = self.gate_up_lora(x, [gate, up], routing)
        hidden = self.act_fn(gate) * up
        output = self.down_proj(hidden)
        if routing.switched:
            (output,) = self.down_lora(hidden, [output], routing)
        return output


def _add_adapters(block: nn.Module, config: GraniteSwitchConfig, layer_idx: int, name: str) -> None:
    """Give a block its modules of adapters, one for each group of projections with one input."""
    shapes = layout.shapes(config.to_dict())
    for owner, group, projections in layout.groups():
        if owner == name:
            setattr(block, group, SwitchedLora(config.switch_spec, layer_idx, projections, shapes))


class GraniteSwitchDecoderLayer(GradientCheckpointingLayer):
    """Granite's decoder layer; the routing goes to both blocks."""

    def __init__(self, config: GraniteSwitchConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GraniteSwitchAttention(config, layer_idx)
        self.mlp = GraniteSwitchMLP(config, layer_idx)
        self.input_layernorm = GraniteRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GraniteRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def forward(self, hidden_states: Tensor, routing: Routing, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), routing=routing, **kwargs)
        hidden_states = residual + hidden_states * self.residual_multiplier

        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states), routing)
        return residual + hidden_states * self.residual_multiplier


class GraniteSwitchPreTrainedModel(GranitePreTrainedModel):
    """What all switch models share: names for loading and placing, initialisation, saving."""

    config: GraniteSwitchConfig
    config_class = GraniteSwitchConfig
    _no_split_modules: ClassVar = ["GraniteSwitchDecoderLayer"]
    _can_record_outputs: ClassVar = {"hidden_states": GraniteSwitchDecoderLayer, "attentions": GraniteSwitchAttention}
    # older checkpoints hold them; here they are derived from the config
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"(^|\.)adapter_token_ids$",
        r"(^|\.)token_to_group_mask$",
        r"(^|\.)adapter_hiding_matrix$",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SwitchedLora):
            module.reset_parameters()
        elif isinstance(module, (Switch, Hiding)):
            module.fill()

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers'; an older generation's tensors go by format 1's names, and adapters' files are read here."""
        state_dict = state_dict_of(model.config, state_dict, checkpoint_files)
        loaded: set[str] = set()
        if state_dict is None and checkpoint_files:
            checkpoint_files, loaded = load_adapters(model, checkpoint_files, load_config)
        info, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        info.missing_keys -= loaded
        return info, offloaded

    def pack_adapters(self) -> None:
        """Store every module's adapters in one piece, so that compiled graphs need not join them in every step.

        `generate` does it by itself where the model is on an accelerator; before your own `torch.compile`, call it.
        """
        for module in self.modules():
            if isinstance(module, SwitchedLora) and module.updates:
                module.pack()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the model as a format-1 checkpoint; as `PreTrainedModel.save_pretrained`."""
        save_switch_model(self, save_directory, super().save_pretrained, **kwargs)


class GraniteSwitchModel(GraniteSwitchPreTrainedModel, GraniteModel):
    """Granite's decoder with a switch in front."""

    _tp_plan: ClassVar = PLAN

    def __init__(self, config: GraniteSwitchConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GraniteSwitchDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GraniteRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GraniteRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.embedding_multiplier = config.embedding_multiplier
        spec = config.switch_spec
        self.switch = Switch(spec, config.vocab_size)
        self.hiding = Hiding(spec, config.vocab_size) if spec.hiding else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        base_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Granite's.

        Args:
            base_only: with `inputs_embeds`, which no control token can be read from: all tokens are the base's.

        Raises:
            RoutingError: `inputs_embeds` alone, without `base_only`.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        slots, seen, embedded = self._switched(input_ids, inputs_embeds, past_key_values, base_only)
        if self.hiding is not None:
            attention_mask, position_ids = self._hide(slots, seen, attention_mask, past_key_values, position_ids)
        return GraniteModel.forward(
            self,
            input_ids=embedded,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=route(slots, self.switch.grouped),
            **kwargs,
        )

    def _switched(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Cache | None, base_only: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The slot of each new token, [B, S], and the tokens seen so far, [B, K], both noted in the cache.

        And the tokens to embed, [B, S], if they are not embedded yet.
        """
        layer = None if cache is None else slot_layer(cache, self.config.num_hidden_layers)
        embedded = None
        if input_ids is not None:
            slots, embedded = self.switch(input_ids, layer.last() if layer else None)
        elif inputs_embeds is not None and base_only:
            slots = input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
        else:
            raise RoutingError(
                "control tokens are read from `input_ids`, and there are none",
                hint="pass input_ids, or base_only=True with inputs_embeds if every token is meant for the base model",
            )
        return slots, input_ids if layer is None else layer.append(slots, input_ids), embedded

    def _hide(
        self, slots: Tensor, seen: Tensor, attention_mask: Any, cache: Cache | None, position_ids: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Generation 1: the attention mask without the keys that adapters hide, and positions without their gaps."""
        past = 0 if cache is None else cache.get_seq_length()
        new = torch.arange(slots.shape[1], device=slots.device) + past
        suppressed, members, gaps = self.hiding(seen, new, slots)
        if self.config.switch_spec.hiding.groups:
            like = torch.empty((*slots.shape, 0), dtype=self.dtype, device=slots.device)
            attention_mask = masked(
                self.config,
                suppressed,
                members,
                new,
                attention_mask,
                cache,
                inputs_embeds=like,
                position_ids=position_ids,
            )
        positions = new[None] if position_ids is None else position_ids
        return attention_mask, (positions - gaps).clamp(min=0)


class GraniteSwitchForCausalLM(GraniteSwitchPreTrainedModel, GraniteForCausalLM):
    """Granite with a language-model head, and adapters that control tokens switch."""

    def __init__(self, config: GraniteSwitchConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = GraniteSwitchModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        spec = config.switch_spec
        self.substitutes = spec.substitutes
        self.forbidden = tuple(_ranges(spec.silent))
        self.post_init()

    def create_masks_for_generate(self, attention_mask: Any, **kwargs: Any) -> Any:
        """As transformers', which makes a static cache's masks ahead; where tokens are hidden, `forward` makes them."""
        if self.model.hiding is not None:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        if self.device.type not in ("cpu", "meta"):
            self.pack_adapters()
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate_batch` starts with.

        Raises:
            RoutingError: always. Its paged cache has no place for the slots of what is cached.
        """
        raise RoutingError(
            "`generate_batch` keeps a paged cache, which has no place for the adapters that are on",
            hint="use `generate`, which takes batches of any mix, or serve the model with vLLM (docs/serving.md)",
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        base_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As Granite's, with the logits of control tokens at -inf unless `switch.generatable`.

        Args:
            labels: [B, S]; a control token counts as its substitute, which is what the model is to predict there.
            base_only: with `inputs_embeds`: all tokens are the base's.
        """
        outputs = GraniteForCausalLM.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            base_only=base_only,
            **kwargs,
        )
        logits = outputs[0]
        for control in self.forbidden:
            logits[..., control] = float("-inf")
        if labels is None:
            return outputs
        exchanged = labels
        for token, substitute in self.substitutes.items():
            exchanged = exchanged.masked_fill(labels == token, substitute)
        loss = self.loss_function(logits=logits, labels=exchanged, vocab_size=self.config.vocab_size, **kwargs)
        if isinstance(outputs, tuple):
            return (loss, *outputs)
        outputs["loss"] = loss
        return outputs


def _ranges(tokens: Iterable[int]) -> Iterator[slice]:
    """Token ids as slices; control tokens are nearly always one."""
    start = last = None
    for token in sorted(tokens):
        if last is None or token != last + 1:
            if start is not None:
                yield slice(start, last + 1)
            start = token
        last = token
    if start is not None:
        yield slice(start, last + 1)
