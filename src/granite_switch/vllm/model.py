"""Granite with adapters inside, for vLLM: its Granite classes, and only what differs from them.

Differences: control tokens are exchanged before embedding and give each token its slot (`switch`); the linears carry
every adapter (`lora`); control tokens cannot be generated. The base's weights load through vLLM's own loader.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.granite import GraniteForCausalLM, GraniteModel
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix
from vllm.sequence import IntermediateTensors

from granite_switch.core import layout, legacy
from granite_switch.core.layout import parse_key
from granite_switch.errors import CheckpointError
from granite_switch.vllm.lora import make_router, wrap_linears
from granite_switch.vllm.switch import Switch


@support_torch_compile
class GraniteSwitchModel(GraniteModel):
    """Granite's decoder with a switch in front. In a pipeline the slots travel with the hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        self.router = make_router(config.switch_spec, vllm_config)
        if get_pp_group().is_first_rank:
            head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            name = f"{prefix}.switch.{config.num_hidden_layers}"
            self.switch = Switch(config.switch_spec, config.vocab_size, head_size, vllm_config.cache_config, name)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(self.switch.substitute[input_ids])

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """As Granite's: [T] ids and positions of a flattened batch to [T, hidden]."""
        if get_pp_group().is_first_rank:
            slots = self.switch(input_ids, positions)
        else:
            slots = intermediate_tensors["slots"]
        self.router.route(slots)
        output = GraniteModel.forward(self, input_ids, positions, intermediate_tensors, inputs_embeds)
        if isinstance(output, IntermediateTensors):
            return IntermediateTensors({"hidden_states": output["hidden_states"], "slots": slots})
        return output


class GraniteSwitchForCausalLM(GraniteForCausalLM):
    """Granite with a language-model head, and adapters that control tokens switch."""

    supports_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.spec = config.switch_spec
        self.model = GraniteSwitchModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            self.logits_processor = LogitsProcessor(config.vocab_size, scale=1 / config.logits_scaling)
            self.register_buffer("forbidden", torch.tensor(self.spec.silent, dtype=torch.int64), persistent=False)
        else:
            self.lm_head = PPMissingLayer()
        self.adapter_tensors: dict[str, Tensor] = {}
        self.loaded = self.wrapped = False

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, hidden] to [T, V]; control tokens at -inf unless `switch.generatable`."""
        logits = super().compute_logits(hidden_states)
        return None if logits is None else logits.index_fill_(-1, self.forbidden, float("-inf"))

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        hidden = torch.zeros(batch_size, self.config.hidden_size, dtype=dtype, device=device)
        slots = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return IntermediateTensors({"hidden_states": hidden, "slots": slots})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base through vLLM's Granite loader and keep the adapters for when its linears are finished.

        Raises:
            CheckpointError: adapter tensors are missing, unknown or of another shape than the config says.
        """
        self.loaded = True
        loaded = super().load_weights(self._set_adapters_aside(weights))
        self._check_adapters()
        return loaded | set(self.adapter_tensors)

    def _set_adapters_aside(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._as_format_1(weights):
            found = parse_key(name)
            if found is None:
                yield name, tensor
            elif self.model.start_layer <= found.layer < self.model.end_layer:
                self.adapter_tensors[name] = tensor.cpu()

    def _as_format_1(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Take generations 2 and 3 apart as they stream by; what comes before their first own name is in both."""
        weights = iter(weights)
        for name, tensor in weights:
            if legacy.is_fused([name]):
                yield from legacy.split(chain([(name, tensor)], weights), self.config.to_dict())
            else:
                yield name, tensor

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapters' tensors in this process's layers."""
        shapes = layout.shapes(self.config.to_dict())
        return {
            tensor.key: shape
            for adapter in self.spec.adapters
            for tensor, shape in adapter.tensors(self.config.num_hidden_layers, shapes).items()
            if self.model.start_layer <= tensor.layer < self.model.end_layer
        }

    def _check_adapters(self) -> None:
        expected = self._expected()
        found = {name: tuple(tensor.shape) for name, tensor in self.adapter_tensors.items()}
        problems = [f"missing: {name}" for name in expected if name not in found]
        problems += [f"not in config.json: {name}" for name in found if name not in expected]
        problems += [
            f"{name}: {list(found[name])} where config.json says {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if problems:
            raise CheckpointError("the adapters' tensors are not those of config.json", problems=problems)

    def process_weights_after_loading(self) -> None:
        """vLLM's hook for when the linears are finished, quantised ones repacked: now they can be wrapped."""
        if self.wrapped:
            return
        self.wrapped = True
        if not self.loaded:  # load_format dummy: no checkpoint was read
            self.adapter_tensors = {name: torch.randn(shape) * 1e-3 for name, shape in self._expected().items()}
        if self.adapter_tensors:
            for layer in range(self.model.start_layer, self.model.end_layer):
                wrap_linears(self.model, layer, self.spec, self.adapter_tensors, self.model.router)
        self.adapter_tensors.clear()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        self.process_weights_after_loading()  # for releases of vLLM that do not call it
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
