"""The slot of every token, read from vLLM's KV cache by an attention head without weights.

vLLM flattens a batch, and the KV cache is the only state it keeps of a request for the model. So a control token writes
its position to the key and its slot to the value, and every query scores keys by position: softmax gives the latest
control token all the weight. Attention is causal, so chunked prefill, prefix caching, preemption and batching are
correct by construction. `core.routing` is the definition.
"""

import copy

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from granite_switch.core.spec import SwitchSpec

# Digits in base 8 are exact in every cache dtype: float8_e5m2 has all integers up to 8. The powers of 8 are split
# between the queries, which must fit float16, and the softmax scale, which CPU kernels for float8_e4m3 multiply by
# 2^120. Scores are integer multiples of the gain, which float32 represents exactly.
BITS = 3
POSITION_DIGITS = 7
SLOT_DIGITS = 4
POSITIONS = 1 << BITS * POSITION_DIGITS
SLOTS = 1 << BITS * SLOT_DIGITS
_GAIN = 8  # score by which the latest control token leads the one before, whose weight is at most e^-8
_SHIFT = 3  # queries are scaled by 2^-_SHIFT, and the softmax scale by 2^_SHIFT


class Switch(nn.Module):
    """Maps the tokens of a flattened batch to their slots and substitutes.

    The attention layer has the decoder's head counts and head size, so that caches, kernels and graphs made for the
    decoder's layers fit it; only head 0 is read. It never has a sliding window.

    Args:
        spec: the adapters and their tokens.
        vocab_size: rows of the embedding.
        vllm_config: vLLM's.
        prefix: prefix of the attention layer's name; contains exactly one integer, which no decoder layer has.
    """

    slot_of_token: Tensor
    substitute: Tensor
    digits: Tensor
    slot_digits: Tensor
    query: Tensor
    plain: Tensor
    values: Tensor

    def __init__(self, spec: SwitchSpec, vocab_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        if current_platform.is_cpu():
            # a process must request AMX before using it; oneDNN does so at its first matmul, which is too late here
            torch.cpu._init_amx()
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        head_size = model.get_head_size()
        cache = copy.copy(vllm_config.cache_config)
        cache.sliding_window = None
        self.adapters = len(spec.adapters)
        self.attn = Attention(
            heads, head_size, float(_GAIN << _SHIFT), num_kv_heads=kv_heads, cache_config=cache, prefix=f"{prefix}.attn"
        )
        slots = torch.full((vocab_size,), -1, dtype=torch.int32)
        substitutes = torch.arange(vocab_size)
        for token, slot in spec.control_slots.items():
            slots[token], substitutes[token] = slot, spec.substitutes[token]
        query, plain = torch.zeros(heads * head_size), torch.zeros(kv_heads * head_size)
        query[:POSITION_DIGITS] = 2.0 ** (BITS * torch.arange(POSITION_DIGITS) - _SHIFT)
        query[POSITION_DIGITS] = -8.0  # times 1 in the key of any other token: a weight of e^-512
        plain[POSITION_DIGITS] = 1.0
        digits = torch.full((kv_heads * head_size,), 63)  # a shift by 63 leaves 0
        digits[:POSITION_DIGITS] = BITS * torch.arange(POSITION_DIGITS)
        values = torch.zeros(self.adapters + 2, kv_heads * head_size)  # one row per slot; the last for other tokens
        values[:-1, :SLOT_DIGITS] = _digits(torch.arange(self.adapters + 1), digits[:SLOT_DIGITS]).float()
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        for name, table in [("query", query), ("plain", plain), ("values", values)]:
            self.register_buffer(name, table.to(device, dtype), persistent=False)
        for name, table in [("slot_of_token", slots), ("substitute", substitutes), ("digits", digits)]:
            self.register_buffer(name, table.to(device), persistent=False)
        self.register_buffer("slot_digits", digits[:SLOT_DIGITS].to(device, torch.int32), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The slot of each token, [T] int32. In range but arbitrary in vLLM's warm-up, which has no attention metadata.

        Args:
            input_ids: [T] ids of a flattened batch.
            positions: [T] int64, the position of each token in its own sequence.
        """
        slots = self.slot_of_token[input_ids]
        written = _digits(positions, self.digits).to(self.query.dtype)
        key = torch.where((slots >= 0)[:, None], written, self.plain)
        query = self.query.expand(input_ids.size(0), -1).contiguous()
        found = self.attn(query, key, self.values[slots])[:, :SLOT_DIGITS].round().to(torch.int32)
        return (found << self.slot_digits).sum(1, dtype=torch.int32).clamp(0, self.adapters)


def _digits(numbers: Tensor, shifts: Tensor) -> Tensor:
    """The base-8 digits of [T] integers: [T, digits], lowest first."""
    return (numbers[:, None] >> shifts) & (1 << BITS) - 1
