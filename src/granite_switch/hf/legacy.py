"""Checkpoints in legacy formats in transformers: their tensors by format 1's names, and legacy format 1's hiding.

Loading hands transformers a state dict of lazy slices, so that to quantisers, device maps and tensor parallelism an old
checkpoint is one of format 1. Converters of transformers' own would give them q, k and v in one piece, and some
quantisers take only the first.
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
    """Legacy format 1: which keys a query does not see, and the positions that hidden tokens do not count for.

    Its tables follow from the config: non-persistent, as `Switch`'s.

    Args:
        spec: with `hiding`.
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
        """Make the table of tokens anew for another size of the vocabulary."""
        table = torch.zeros(vocab_size, len(self.rules.groups), dtype=torch.bool, device=device)
        self.register_buffer("token_to_group_mask", table, persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Write what the config says into the tables."""
        self.token_to_group_mask.zero_()
        self.adapter_hiding_matrix.zero_()
        for group, tokens in enumerate(self.rules.groups):
            for token in tokens:
                self.token_to_group_mask[token, group] = True
        for slot, hidden in enumerate(self.rules.policy):
            for group in hidden:
                self.adapter_hiding_matrix[slot, group] = True

    def forward(self, seen: Tensor, new: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is hidden from whom.

        Args:
            seen: [B, K] int64, the tokens of every cached position, the new ones among them.
            new: [S] int64, the indices of the new ones.
            slots: [B, S] int64, of the new ones.

        Returns:
            Groups as bits, [B, K] int64: those that each new token's adapter hides and it is itself not in (a query
            always sees its own group), and those that each token is in. And [B, S] int64, what each new token's
            position is to be less by: the tokens that its adapter hides, and one where an adapter is on in any case,
            as the program that made these checkpoints has it.
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
    """The causal mask without the hidden keys, as the attention in use takes it.

    Args:
        config: names the attention.
        suppressed: [B, K] int64, the groups that a query does not see, as bits.
        members: [B, K] int64, the groups that a key is in, as bits.
        new: [S] int64, the positions of the queries.
        attention_mask: of padding [B, K], or one that is finished [B, 1, S, K].
        kwargs: more of `create_causal_mask`: the cache, without the new tokens, `inputs_embeds`, `position_ids`.

    Raises:
        CheckpointError: the attention in use takes no mask.
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
    """A state dict under format 1's names, where the checkpoint is in a legacy format.

    Args:
        config: the model's.
        state_dict: as given to `from_pretrained`, or None.
        files: the checkpoint's, or None.

    Returns:
        Lazy slices of its tensors; `state_dict` itself where there is nothing to convert.
    """
    if config.switch_spec.base_model_type != "granite":  # all that legacy formats hold
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
    """A tensor in a file; what is sliced from it is read later."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> "_Slice":
        return _Slice(self.file, self.name, index or ...)


class _Slice:
    """A part of a tensor in a file, read when it is indexed, as safetensors' own slices are."""

    def __init__(self, file: Any, name: str, part: Any) -> None:
        self.file, self.name, self.part = file, name, part

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.get_slice(self.name)[self.part][index].contiguous()

    def get_shape(self) -> list[int]:
        whole = torch.empty(self.file.get_slice(self.name).get_shape(), device="meta")
        return list(whole[self.part].shape)

    def get_dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()
