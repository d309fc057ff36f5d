"""The slot of every token, read back out of vLLM's KV cache by one attention head without weights.

vLLM flattens a batch and keeps no state of a request but its KV cache. So a control token writes its position into
the key and its slot into the value, and every query asks for the largest position: softmax gives the latest control
token all the weight. It is causal, so chunked prefill, cached prefixes, preemption and batching are right by
construction. `core.routing` is the definition.
"""

import copy

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from granite_switch.core.spec import SwitchSpec

# Digits in base 8 are exact in every type a cache may have: float8_e5m2 counts to 8. The powers of 8 are shared out
# between queries, which float16 must hold, and the softmax scale, which CPU kernels for float8_e4m3 multiply by 2^120.
# Scores are whole numbers of gains, and float32 holds them exactly.
BITS = 3
POSITION_DIGITS = 7
SLOT_DIGITS = 4
POSITIONS = 1 << BITS * POSITION_DIGITS
SLOTS = 1 << BITS * SLOT_DIGITS
_GAIN = 8  # score by which the latest control token leads: the next one's weight is e^-8
_SHIFT = 3  # queries are scaled down by 2^_SHIFT, which the softmax scale gives back


class Switch(nn.Module):
    """Tokens of a flattened batch to their slots and their substitutes.

    The layer has the decoder's numbers of query and key-value heads and its head size, so that caches, kernels and
    graphs that are made for the decoder's layers are right for it; head 0 is read. It never has a sliding window.

    Args:
        spec: the adapters and their tokens.
        vocab_size: rows of the embedding.
        vllm_config: vLLM's.
        prefix: name of the attention layer; it must hold exactly one integer, and not one of a decoder layer.
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
            # a process must ask for AMX before its first use; oneDNN does so at its first matmul, which comes later
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
        query[POSITION_DIGITS] = -8.0  # where any other token's key is 1: a weight of e^-512
        plain[POSITION_DIGITS] = 1.0
        digits = torch.full((kv_heads * head_size,), 63)  # shifts everything out
        digits[:POSITION_DIGITS] = BITS * torch.arange(POSITION_DIGITS)
        values = torch.zeros(self.adapters + 2, kv_heads * head_size)  # of each slot, and of tokens that switch to none
        values[:-1, :SLOT_DIGITS] = _digits(torch.arange(self.adapters + 1), digits[:SLOT_DIGITS]).float()
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        for name, table in [("query", query), ("plain", plain), ("values", values)]:
            self.register_buffer(name, table.to(device, dtype), persistent=False)
        for name, table in [("slot_of_token", slots), ("substitute", substitutes), ("digits", digits)]:
            self.register_buffer(name, table.to(device), persistent=False)
        self.register_buffer("slot_digits", digits[:SLOT_DIGITS].to(device, torch.int32), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The slot of each token.

        Args:
            input_ids: [T] ids of a flattened batch.
            positions: [T] int64, of each token in its own sequence.

        Returns:
            [T] int32. Arbitrary but in range where attention has no metadata (vLLM's warm-up).
        """
        slots = self.slot_of_token[input_ids]
        written = _digits(positions, self.digits).to(self.query.dtype)
        key = torch.where((slots >= 0)[:, None], written, self.plain)
        query = self.query.expand(input_ids.size(0), -1).contiguous()
        found = self.attn(query, key, self.values[slots])[:, :SLOT_DIGITS].round().to(torch.int32)
        return (found << self.slot_digits).sum(1, dtype=torch.int32).clamp(0, self.adapters)


def _digits(numbers: Tensor, shifts: Tensor) -> Tensor:
    """[T] whole numbers to [T, digits], the lowest first."""
    return (numbers[:, None] >> shifts) & (1 << BITS) - 1
