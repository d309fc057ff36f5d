"""Compare a composed model with PEFT: for each adapter, all logits of built-in prompts, from the source's weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from granite_switch.core.chat import render
from granite_switch.core.model import read_model
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import SwitchError

# largest allowed difference of a logit, relative to the largest logit
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

_CHATS: Sequence[Sequence[Mapping[str, str]]] = (
    [{"role": "user", "content": "Name three rivers and the seas in which they end."}],
    [
        {"role": "user", "content": "Who wrote the letter?"},
        {"role": "assistant", "content": "It is not signed; the hand is a clerk's."},
        {"role": "user", "content": "And when was it sent? Answer in one sentence."},
    ],
    [{"role": "user", "content": '{"title": "Ledger, 1871", "items": [4, 15, 1600], "sum": null}\n' * 4}],
)


@dataclass(frozen=True)
class Comparison:
    """One adapter, composed against PEFT; "base" compares the switch model without an adapter with the plain base."""

    name: str
    difference: float  # the largest of any logit
    largest: float  # the largest absolute logit
    effect: float  # the largest change of a logit that PEFT's adapter causes; not 0 if it does anything
    within: bool  # whether the difference is within the dtype's tolerance


def compare(
    model: Path, adapters: Mapping[str, Path], base: Path | None = None, dtype: str = "float32"
) -> list[Comparison]:
    """Compare adapters of a composed model with PEFT; the first result is the base.

    Args:
        model: the composed model's folder.
        adapters: name -> PEFT adapter folder.
        base: the base model's folder; the composed model's own base weights by default.
        dtype: to compute in: float32, bfloat16 or float16.

    Raises:
        SwitchError: peft is missing, or the model has no chat template to render prompts with.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise SwitchError("comparing with PEFT needs peft", hint="pip install peft") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        switch = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="auto").eval()
        spec: SwitchSpec = switch.config.switch_spec
        size = min(spec.control_slots)  # the base may have no rows for control tokens
        wanted = {name: _prompts(model, spec, spec.adapter(name)) for name in adapters}
        plain = _prompts(model, spec, None)
        composed = {name: [_logits(switch, ids) for ids in prompts] for name, prompts in wanted.items()}
        composed["base"] = [_logits(switch, ids) for ids in plain]
        del switch
        reference = _base(model, base, dtype)
        result = [_compare("base", composed["base"], [_logits(reference, ids) for ids in plain], None, dtype, size)]
        for name, folder in adapters.items():
            substituted = [[spec.substitutes.get(i, i) for i in ids] for ids in wanted[name]]
            without = [_logits(reference, ids) for ids in substituted]
            peft = PeftModel.from_pretrained(reference, folder).eval()
            expected = [_logits(peft, ids) for ids in substituted]
            reference = peft.unload()
            result.append(_compare(name, composed[name], expected, without, dtype, size))
        return result
    finally:
        logging.set_verbosity(verbosity)


def _prompts(model: Path, spec: SwitchSpec, adapter: AdapterSpec | None) -> list[list[int]]:
    """The built-in prompts as token ids, with the adapter's control token."""
    tokenizer = read_tokenizer(model)
    template = tokenizer.templates.get("default")
    if template is None:
        raise SwitchError(f"{model} has no chat template to render prompts with")
    library: Tokenizer = tokenizer.library
    result = []
    for chat in _CHATS:
        messages = [dict(message) for message in chat]
        variables: dict[str, Any] = {**tokenizer.special_tokens, "add_generation_prompt": True}
        text = render(template, messages, **variables)
        if adapter:
            if adapter.invocation_text not in text:
                messages[-1]["content"] += adapter.invocation_text
            text = render(template, messages, adapter_name=adapter.name, **variables)
        result.append(library.encode(text, add_special_tokens=False).ids)
    return result


def _base(model: Path, base: Path | None, dtype: str) -> Any:
    """The plain base, loaded from its own folder or from the composed model's tensors."""
    if base:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="auto").eval()
    config, spec = read_model(model)
    settings = {k: v for k, v in config.items() if k not in ("switch", "model_type")}
    plain = CONFIG_MAPPING[spec.base_model_type](**{**settings, "architectures": [spec.base_architecture]})
    return AutoModelForCausalLM.from_pretrained(model, config=plain, dtype=dtype, device_map="auto").eval()


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits of one prompt: [T, V] float32 on the CPU."""
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def _compare(
    name: str,
    composed: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    without: Sequence[torch.Tensor] | None,
    dtype: str,
    size: int,
) -> Comparison:
    pairs = [(c[:, :size], e[:, :size]) for c, e in zip(composed, expected, strict=True)]
    difference = max(float((c - e).abs().max()) for c, e in pairs)
    largest = max(float(e.abs().max()) for _, e in pairs)
    effect = 0.0
    if without:
        effect = max(float((e - w).abs().max()) for e, w in zip(expected, without, strict=True))
    return Comparison(name, difference, largest, effect, difference <= TOLERANCE[dtype] * largest)
