"""Legacy formats in transformers: tensors under format 1's names, and the token hiding of legacy format 1.

Loading passes transformers a state dict of lazy slices, so that quantisers, device maps and tensor parallelism see a
format 1 checkpoint. transformers' own weight converters would pass q, k and v to quantisers together, and some use only
the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from granite_switch.core import legacy
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import CheckpointError


class Hiding(nn.Module):
    """Legacy format 1: which keys each query cannot see, and positions that skip hidden tokens.

    The tables are derived from the config and non-persistent, as in `Switch`.

    Args:
        spec: one with `hiding`.
        vocab_size: V.
    """

    adapter_hiding_matrix: Tensor
    token_to_group_mask: Tensor

    def __init__(self, spec: SwitchSpec, vocab_size: int) -> None:
        super().__init__()
        assert spec.hiding is not None
        self.rules = spec.hiding
        matrix = torch.zeros(len(spec.adapters) + 1, len(self.rules.groups), dtype=torch.bool)
        self.register_buffer("adapter_hiding_matrix", matrix, persistent=False)
        self.resize(vocab_size, None)

    def resize(self, vocab_size: int, device: torch.device | None) -> None:
        """Rebuild the token table for another vocabulary size."""
        table = torch.zeros(vocab_size, len(self.rules.groups), dtype=torch.bool, device=device)
        self.register_buffer("token_to_group_mask", table, persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the tables from the config."""
        self.token_to_group_mask.zero_()
        self.adapter_hiding_matrix.zero_()
        for group, tokens in enumerate(self.rules.groups):
            for token in tokens:
                self.token_to_group_mask[token, group] = True
        for slot, hidden in enumerate(self.rules.policy):
            for group in hidden:
                self.adapter_hiding_matrix[slot, group] = True

    def forward(self, seen: Tensor, new: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which groups of tokens are hidden from each query, and by how much to shift positions.

        Args:
            seen: [B, K] int64, the token at every cached position, new tokens included.
            new: [S] int64, the indices of the new tokens.
            slots: [B, S] int64, of the new tokens.

        Returns:
            suppressed: [B, K] int64, bits of the groups that each new token's adapter hides, without the token's own
                groups, which a query always sees.
            members: [B, K] int64, bits of the groups that each token is in.
            gaps: [B, S] int64, to subtract from each new token's position: the number of tokens its adapter hides so
                far, and at least 1 in an adapter's slot, as in the program that made these checkpoints.
        """
        bits = 1 << torch.arange(self.token_to_group_mask.shape[1], device=seen.device)
        members = (self.token_to_group_mask[seen] * bits).sum(-1)
        policy = (self.adapter_hiding_matrix * bits).sum(-1)
        suppressed = torch.zeros_like(seen)
        suppressed[:, new] = policy[slots] & ~members[:, new]
        counts = (members[:, None] & policy[:, None] != 0).cumsum(-1)[:, :, new]  # [B, slots, S]
        gaps = counts.gather(1, slots[:, None])[:, 0]
        return suppressed, members, torch.maximum(gaps, (slots > 0).long())


def masked(
    config: Any,
    suppressed: Tensor,
    members: Tensor,
    new: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> Any:
    """The causal mask without hidden keys, in the form that the attention implementation takes.

    Args:
        config: names the attention implementation.
        suppressed: [B, K] int64, bits of the groups that a query does not see.
        members: [B, K] int64, bits of the groups that a key is in.
        new: [S] int64, the positions of the queries.
        attention_mask: a padding mask [B, K], or a complete one [B, 1, S, K].
        kwargs: for `create_causal_mask`: the cache, without the new tokens, `inputs_embeds`, `position_ids`.

    Raises:
        CheckpointError: the attention implementation takes no mask.
    """
    if "flash" in config._attn_implementation:
        raise CheckpointError(
            f"attention {config._attn_implementation!r} cannot hide control tokens, which legacy format 1 needs",
            hint=f"attn_implementation='sdpa', or {legacy.UPGRADE}",
        )
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        hidden = (suppressed[:, new, None] & members[:, None, : attention_mask.shape[-1]] != 0)[:, None]
        if attention_mask.dtype == torch.bool:
            return attention_mask & ~hidden
        return attention_mask.masked_fill(hidden, torch.finfo(attention_mask.dtype).min)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return suppressed[batch, query] & members[batch, key] == 0

    return create_causal_mask(config, attention_mask=attention_mask, and_mask_function=visible, **kwargs)


def state_dict_of(
    config: Any, state_dict: Mapping[str, Any] | None, files: Sequence[str] | None
) -> Mapping[str, Any] | None:
    """Lazy slices of a legacy checkpoint's tensors under format 1's names; `state_dict` if there is nothing to convert.

    Args:
        config: the model's.
        state_dict: as passed to `from_pretrained`, or None.
        files: the checkpoint's, or None.
    """
    if config.switch_spec.base_model_type != "granite":  # legacy formats hold no other base
        return state_dict
    if state_dict is None:
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            return None
        opened = [safe_open(file, framework="pt") for file in files]
        named = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (no mapping)
        if not legacy.is_fused(named):
            return None
        tensors = {name: _Source(file, name) for name, file in named.items()}
        return dict(legacy.split(tensors.items(), config.to_dict()))
    if not legacy.is_fused(state_dict):
        return state_dict
    return dict(legacy.split(state_dict.items(), config.to_dict()))


class _Source:
    """A tensor in a file; slicing it reads nothing."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> "_Slice":
        return _Slice(self.file, self.name, index or ...)


class _Slice:
    """A part of a tensor in a file; indexing reads it, as with safetensors' own slices."""

    def __init__(self, file: Any, name: str, part: Any) -> None:
        self.file, self.name, self.part = file, name, part

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.get_slice(self.name)[self.part][index].contiguous()

    def get_shape(self) -> list[int]:
        whole = torch.empty(self.file.get_slice(self.name).get_shape(), device="meta")
        return list(whole[self.part].shape)

    def get_dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()
