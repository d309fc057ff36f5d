"""Tiny models of every dialect that `export gguf` takes, made by transformers, with adapters made by PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artefacts import GRANITE_TEMPLATE, ROLES, tokenizer_file
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from granite_switch import compose
from granite_switch.core.border import read_json
from granite_switch.core.spec import SwitchSpec

INVOCATION = "<rewrite>"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = {"granitemoehybrid": ("input_linear", "output_linear")}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
_HYBRID: dict[str, Any] = {
    **_GRANITE,
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "intermediate_size": 40,
    "mamba_n_heads": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
DIALECTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", _GRANITE),
    "hybrid": ("granitemoehybrid", {**_HYBRID, "position_embedding_type": "rope"}),
    "hybrid without positions": ("granitemoehybrid", {**_HYBRID, "position_embedding_type": "nope"}),
    "hybrid, full_attention": (
        "granitemoehybrid",
        {**_HYBRID, "position_embedding_type": "rope", "layer_types": ["full_attention"] * 2, "rope_parameters": YARN},
    ),
    "llama": ("llama", {}),
    "llama, wide heads, tied": ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
}


def make_dialect(folder: Path, model_type: str, **config: Any) -> Path:
    """A composed model of a dialect: a LoRA (`check`) and an aLoRA (`cite`) on all linears, an aLoRA on one.

    Its base and adapters are kept next to it, in `base` and `adapters`.
    """
    words = tokenizer_file()
    settings: dict[str, Any] = {
        "vocab_size": words.get_vocab_size() + 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **config}))
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    made.float().save_pretrained(folder / "base")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=ROLES[0], eos_token=ROLES[0])
    tokenizer.chat_template = GRANITE_TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    invocation = words.encode(INVOCATION, add_special_tokens=False).ids
    mlp = _MLP.get(model_type, ("gate_proj", "up_proj", "down_proj"))
    make_peft(folder, "check", [*_ATTENTION, *mlp], seed=1, r=8, lora_alpha=8)
    make_peft(folder, "cite", [*_ATTENTION, *mlp], invocation, seed=2, r=3, lora_alpha=8, use_rslora=True)
    make_peft(folder, "first", [mlp[0]], invocation, seed=3, r=2, lora_alpha=9)
    compose(folder / "base", [folder / "adapters"], folder / "model")
    return folder / "model"


def make_peft(
    folder: Path, name: str, targets: Sequence[str], invocation: Sequence[int] = (), seed: int = 0, **config: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    settings = LoraConfig(
        target_modules=list(targets), alora_invocation_tokens=list(invocation) or None, task_type="CAUSAL_LM", **config
    )
    model = get_peft_model(base, settings)
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "adapters" / name)


class Reference:
    """The oracle: the base in transformers' own class with PEFT's adapter, without any code of this project."""

    def __init__(self, model: Path) -> None:
        self.folder = model.parent
        self.spec = SwitchSpec.from_dict(read_json(model / "config.json")["switch"])
        self.vocabulary = min(self.spec.control_slots)

    def tokens(self, name: str, length: int = 48) -> list[int]:
        """Random tokens as the base sees them, including an aLoRA's invocation."""
        result = [int(i) for i in np.random.default_rng(5).integers(6, self.vocabulary - 40, length)]
        if name:
            invocation = self.spec.adapter(name).invocation_tokens
            result[20 : 20 + len(invocation)] = invocation
        return result

    def switched(self, name: str) -> list[int]:
        """The same tokens with the control token placed."""
        result = self.tokens(name)
        if name:
            adapter = self.spec.adapter(name)
            result[20 if adapter.invocation_tokens else 0] = adapter.token_id
        return result

    def logits(self, name: str) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)
        tokens = self.tokens(name)
        if name:
            adapter = self.spec.adapter(name)
            if not adapter.invocation_tokens:
                tokens[0] = adapter.substitute_token_id
            assert tokens[20] == adapter.substitute_token_id or not adapter.invocation_tokens
            model = PeftModel.from_pretrained(model, self.folder / "adapters" / name)
        with torch.no_grad():
            return model.eval()(torch.tensor([tokens])).logits[0].numpy()[:, : self.vocabulary]
