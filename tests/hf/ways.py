"""Compare two ways of loading a checkpoint: by logits, and by each adapter's effect on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)


@dataclass(frozen=True)
class Seen:
    """How a way of loading compares with the plain load."""

    difference: float  # largest, relative to the largest logit
    effects: dict[str, float]  # adapter -> its change of the base's logits, relative to that change in the plain load


@dataclass(frozen=True)
class Conversation:
    """The prompts for an adapter."""

    messages: Sequence[Mapping[str, str]]
    documents: Sequence[Mapping[str, str]] | None = None


class Reference:
    """The plain load of a checkpoint: float32, on the CPU, eager execution.

    Args:
        folder: a composed checkpoint.
        conversations: those of each adapter, over which its effect is summed; one for all adapters by default.
    """

    def __init__(self, folder: Path, conversations: Mapping[str, Sequence[Conversation]] | Conversation) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.spec = self.model.config.switch_spec
        self.prompts: dict[str | None, Tensor] = {}
        self.asked: dict[str, list[tuple[str, str | None]]] = {}  # adapter -> prompts, with and without its token
        if isinstance(conversations, Conversation):
            self.prompts[None] = self.render(conversations)
            for name in self.spec.names:
                self.prompts[name] = self.render(conversations, name)
                self.asked[name] = [(name, None)]
        else:
            for name in self.spec.names:
                self.asked[name] = [(f"{name} {i}", f"{name} {i}, off") for i in range(len(conversations[name]))]
                for (on, off), conversation in zip(self.asked[name], conversations[name], strict=True):
                    self.prompts[off], self.prompts[on] = self.render(conversation), self.render(conversation, name)
        self.logits = {name: self.of(self.model, ids) for name, ids in self.prompts.items()}

    def render(self, conversation: Conversation, adapter: str | None = None) -> Tensor:
        """A prompt's ids, [1, S]."""
        rendered = self.tokenizer.apply_chat_template(
            conversation.messages,
            documents=conversation.documents,
            adapter_name=adapter,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        return rendered["input_ids"]

    def batch(self) -> tuple[Tensor, Tensor]:
        """All prompts of different lengths, padded on the left: ids and attention mask, [B, S]."""
        rows = [ids[0, cut:] if name is None else ids[0] for cut, (name, ids) in enumerate(self.prompts.items(), 3)]
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=1) for row in rows])
        mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
        return ids, mask

    @staticmethod
    @torch.no_grad()
    def of(model: Any, ids: Tensor) -> Tensor:
        """A model's logits in float32, [1, S, V]."""
        device = model.get_input_embeddings().weight.device
        return model(ids if device.type == "meta" else ids.to(device)).logits.float().cpu()

    def seen(self, model: Any) -> Seen:
        """Compare with a model that was loaded from the same checkpoint in another way."""
        return self.compare({name: self.of(model, ids) for name, ids in self.prompts.items()})

    def compare(self, logits: dict[str | None, Tensor]) -> Seen:
        """Compare logits of the prompts with this model's."""
        differences = []
        for name, expected in self.logits.items():
            finite = expected.isfinite()
            largest = (logits[name] - expected)[finite].abs().nan_to_num(nan=float("inf")).max()
            differences.append(largest / expected[finite].abs().max())
        effects = {
            name: sum(self.change(logits, *pair) for pair in pairs)
            / sum(self.change(self.logits, *pair) for pair in pairs)
            for name, pairs in self.asked.items()
        }
        return Seen(float(max(differences)), effects)

    def change(self, logits: dict[str | None, Tensor], adapter: str, off: str | None) -> float:
        """Euclidean norm of an adapter's change to the logits after its control token."""
        ids, plain = self.prompts[adapter][0].tolist(), self.prompts[off][0].tolist()
        ends = enumerate(zip(reversed(ids), reversed(plain), strict=False))
        shared = next((i for i, (own, other) in ends if own != other), min(len(ids), len(plain)))
        base, adapted = logits[off][0, -shared:], logits[adapter][0, -shared:]
        kept = adapted.isfinite()
        return float((adapted - base)[kept].norm())
