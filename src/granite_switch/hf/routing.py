"""Which adapter acts on which token, worked out once per forward; the layers receive the finished plan.

`core.routing` is the definition; here it is a cumulative maximum on tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from granite_switch.batched import Grouper, Groups, group
from granite_switch.core.spec import SwitchSpec


class Switch(nn.Module):
    """Reads control tokens and exchanges them.

    Its tables are derived from the config and so are no part of a checkpoint: no loader has to fill them. They stand
    in a module of their own because accelerate plans no place for the buffers of a module that it splits.

    Args:
        spec: the adapters and their tokens.
        vocab_size: V.
    """

    def __init__(self, spec: SwitchSpec, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.grouped = Grouper()
        for name, size in [
            ("adapter_token_ids", len(spec.adapters)),
            ("control_to_slot", vocab_size),
            ("control_to_substitute", vocab_size),
        ]:
            self.register_buffer(name, torch.empty(size, dtype=torch.int64), persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Write what the config says into the tables; models are built on the meta device, which leaves them empty."""
        self.adapter_token_ids.copy_(torch.tensor([adapter.token_id for adapter in self.spec.adapters]))
        self.control_to_slot.fill_(-1)
        self.control_to_substitute.copy_(torch.arange(len(self.control_to_substitute)))
        for token, slot in self.spec.control_slots.items():
            self.control_to_slot[token] = slot
            self.control_to_substitute[token] = self.spec.substitutes[token]

    def forward(self, input_ids: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots and embedded tokens.

        Args:
            input_ids: [B, S] int64.
            initial: [B] int64, the slots in force before; None for 0.

        Returns:
            The slot of each token, [B, S] int64, and the tokens with substitutes in the place of control tokens.
        """
        return slots_of(input_ids, self.control_to_slot, initial), self.control_to_substitute[input_ids]


@dataclass(frozen=True)
class Routing:
    """The slots of a batch and, outside of compiled graphs, its tokens grouped by slot.

    accelerate moves it from device to device along with the hidden states, by `to`.
    """

    slots: Tensor  # [B, S] int64
    groups: Groups | None  # None: not known on the host

    @property
    def switched(self) -> bool:
        """Whether any token may be an adapter's: the base alone calls no module of adapters."""
        return self.groups is None or bool(self.groups.groups)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Routing":
        slots = self.slots.to(device, non_blocking=non_blocking)
        if slots is self.slots:
            return self
        return Routing(slots, None if self.groups is None else self.groups.to(slots.device, non_blocking))


def slots_of(input_ids: Tensor, control_to_slot: Tensor, initial: Tensor | None) -> Tensor:
    """The slot of each token: that of the latest control token at or before it.

    Args:
        input_ids: [B, S] int64.
        control_to_slot: [V] int64, the slot that a token switches to, -1 where it is no control token.
        initial: [B] int64, the slots in force before; None for 0.

    Returns:
        [B, S] int64.
    """
    switches = control_to_slot[input_ids]
    if input_ids.shape[1] == 1:
        return torch.where(switches >= 0, switches, 0 if initial is None else initial[:, None])
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    latest = torch.where(switches >= 0, positions, 0).cummax(dim=1).values
    slots = switches.gather(1, (latest - 1).clamp(min=0))
    before = torch.zeros_like(slots) if initial is None else initial[:, None].expand_as(slots)
    return torch.where(latest > 0, slots, before)


def route(slots: Tensor, grouped: Callable[[Tensor], Groups] = group) -> Routing:
    """Group a batch's tokens by slot. One transfer to the host; none inside a compiled graph."""
    return Routing(slots, None if torch.compiler.is_compiling() else grouped(slots.flatten()))
