"""Which adapter acts on which token, computed once per forward and passed to the layers as a `Routing`.

`core.routing` is the definition; here it is a cumulative maximum over positions.
"""

from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from granite_switch.core.spec import SwitchSpec
from granite_switch.eager import Groups, Pairs, group


class Switch(nn.Module):
    """Lookup tables: token id to slot, and token id to substitute.

    The tables are derived from the config, so they are not in the checkpoint. They have a module of their own because
    accelerate assigns no device to the buffers of a module that it splits.

    Args:
        spec: the adapters and their tokens.
        vocab_size: V, at least `spec.rows`.
    """

    adapter_token_ids: Tensor
    control_to_slot: Tensor
    control_to_substitute: Tensor

    def __init__(self, spec: SwitchSpec, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.resize(vocab_size, None)

    def resize(self, vocab_size: int, device: torch.device | None) -> None:
        """Rebuild the tables for another vocabulary size."""
        for name, size in [
            ("adapter_token_ids", len(self.spec.adapters)),
            ("control_to_slot", vocab_size),
            ("control_to_substitute", vocab_size),
        ]:
            self.register_buffer(name, torch.empty(size, dtype=torch.int64, device=device), persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the tables from the config; a model built on the meta device has them empty."""
        self.adapter_token_ids.copy_(torch.tensor([adapter.token_id for adapter in self.spec.adapters]))
        self.control_to_slot.fill_(-1)
        self.control_to_substitute.copy_(torch.arange(len(self.control_to_substitute)))
        for token, slot in self.spec.control_slots.items():
            self.control_to_slot[token] = slot
            self.control_to_substitute[token] = self.spec.substitutes[token]

    def forward(self, input_ids: Tensor, initial: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slot of each token, and the tokens with control tokens substituted; both [B, S] int64.

        Arguments as for `slots_of`.
        """
        return slots_of(input_ids, self.control_to_slot, initial, starts), self.control_to_substitute[input_ids]


def slots_of(
    input_ids: Tensor, control_to_slot: Tensor, initial: Tensor | None, starts: Tensor | None = None
) -> Tensor:
    """The slot of each token, [B, S] int64: that of the latest control token at or before it in its sequence.

    Args:
        input_ids: [B, S] int64.
        control_to_slot: [V] int64, the slot that a token switches to; -1 if it is not a control token.
        initial: [B] int64, the slot in force before the first token; None for 0.
        starts: [B, S] bool, true where a packed sequence begins, in slot 0; None if there are none.
    """
    switches = control_to_slot[input_ids]
    if starts is not None:
        switches = torch.where(starts & (switches < 0), 0, switches)
    if input_ids.shape[1] == 1:
        return torch.where(switches >= 0, switches, 0 if initial is None else initial[:, None])
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    latest = torch.where(switches >= 0, positions, 0).cummax(dim=1).values
    slots = switches.gather(1, (latest - 1).clamp(min=0))
    before = torch.zeros_like(slots) if initial is None else initial[:, None].expand_as(slots)
    return torch.where(latest > 0, slots, before)


def sequence_starts(kwargs: dict[str, Any], like: Tensor) -> Tensor | None:
    """Where packed sequences begin, [B, S] bool, in a forward without a cache; None if the input is not packed.

    Args:
        kwargs: the forward's arguments. A sequence begins where `position_ids` do not increase by one, and at the
            offsets in `cu_seq_lens_q`. An input with an attention mask is not packed.
        like: [B, S], the input.
    """
    if kwargs.get("attention_mask") is not None or like.shape[1] < 2:
        return None
    starts = None
    positions, lengths = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    if isinstance(positions, Tensor) and positions.ndim == 2:
        steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        starts = steps.to(like.device).expand(like.shape)
    if isinstance(lengths, Tensor):
        edges = torch.arange(like.shape[1], device=like.device)[:, None] == lengths.to(like.device)[None, 1:-1]
        edges = edges.any(1).expand(like.shape)
        starts = edges if starts is None else starts | edges
    return starts


@dataclass(frozen=True)
class Routing:
    """The slots of a batch and, outside compiled graphs, its tokens grouped by slot.

    accelerate calls `to` to move it between devices with the hidden states.
    """

    slots: Tensor  # [B, S] int64
    groups: Groups | None  # None in compiled graphs, where the host does not know the slots
    decode: bool = False  # a decode step; its grouping is reused while the slots stay the same
    called: set[str] = field(default_factory=set)  # paths of the linears that were called
    past: Any = None  # the cache's slot layer
    known: list["Routing"] = field(default_factory=list)  # memo of `whole`

    def whole(self) -> "Routing":
        """The routing of all cached positions and the batch's tokens, for linears whose inputs are cached."""
        if not hasattr(self.past, "slots_with"):
            return self
        if not self.known:
            slots = self.past.slots_with(self.slots)
            self.known.append(Routing(slots, None if is_compiling() else group(slots.flatten())))
        return self.known[0]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Routing":
        slots = self.slots.to(device, non_blocking=non_blocking)
        if slots is self.slots:
            return self
        groups = None if self.groups is None else self.groups.to(slots.device)
        return Routing(slots, groups, called=self.called, past=self.past)


def route(slots: Tensor, past: Any = None, linears: Iterable[tuple[int, Pairs]] = ()) -> Routing:
    """Group a batch's tokens by slot. Copies slots to the host, except in a compiled or traced graph.

    Args:
        slots: [B, S] int64.
        past: the cache's slot layer, which memoises the grouping of decode steps.
        linears: as for `Groups.check`.
    """
    if is_compiling() or torch.jit.is_tracing():
        return Routing(slots, None, past=past)
    if past is not None and slots.shape[1] == 1 and not torch.is_grad_enabled():
        groups = past.groups(slots[:, 0])
        if groups.padded:
            groups.check(linears)
        return Routing(slots, groups, decode=True, past=past)
    if past is not None:
        past.decode = None
    return Routing(slots, group(slots.flatten()), past=past)


class Scope:
    """Passes the routing of the current forward to layers and linears.

    It is a context variable, so that threads do not interfere, and an attribute inside compiled graphs, where
    `torch.compile` cannot trace a context variable. Where a part alone is compiled, or a part is not (there are limits
    on recompiling), the part that calls it entered the other one.
    """

    _current: ContextVar[Routing | None] = ContextVar("granite_switch_routing", default=None)

    def __init__(self) -> None:
        self.traced: Routing | None = None

    def get(self) -> Routing | None:
        if is_compiling():
            return _entered() if self.traced is None else self.traced
        return self._current.get() or self.traced

    def enter(self, routing: Routing | None) -> Any:
        """Set the routing; returns the argument for `leave`."""
        if is_compiling():
            before, self.traced = self.traced, routing
            return before
        return self._current.set(routing)

    def leave(self, token: Any) -> None:
        if isinstance(token, Token):
            self._current.reset(token)
        else:  # entered in a compiled graph, which may have broken since
            self.traced = token


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _entered() -> Routing | None:
    """The routing that was entered outside the compiled graph, which breaks here."""
    return Scope._current.get()
