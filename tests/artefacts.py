"""Tiny bases and adapters made by the real libraries: transformers, tokenizers, PEFT.

Weights are larger than by default, so that attention is sharp and a wrong position is noticed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data next to the checkout, if there is any
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
ROLES = ["<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>", "<tool_call>", "</tool_call>"]
CHATML = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

GRANITE_TEMPLATE = """\
{%- set head = '' %}
{%- if documents %}
    {%- set lines = namespace(text='Use these documents:') %}
    {%- for document in documents %}
        {%- set lines.text = lines.text + '\\n' + (document | tojson) %}
    {%- endfor %}
    {%- set head = lines.text %}
{%- endif %}
{%- if tools %}
    {%- set head = head + '\\nTools: ' + (tools | tojson) %}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' and head %}
        {{- '<|start_of_role|>system<|end_of_role|>' + head + '<|end_of_text|>\\n' }}
    {%- endif %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}
    {%- if loop.first and message.role == 'system' and head %}
        {{- '\\n' + head }}
    {%- endif %}
    {{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""

CHATML_TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}{% endgeneration %}
{% else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{% endfor %}
{% if documents %}{{ '<|im_start|>system\\n' + (documents | tojson) + '<|im_end|>\\n' }}{% endif %}
{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}
"""

_CORPUS = [
    "the river ends in the sea and the road begins at the mill",
    "Where does Anna live? Anna lives in Oslo, near the old harbour.",
    "answer briefly; use these documents, rewrite the question, cite the sentence",
    '{"doc_id": "1", "text": "a red house stands on the hill"}',
    "user assistant system tool 0123456789 <rewrite> <guardian>",
]


def tokenizer_file(specials: Sequence[str] = ROLES, vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer like Granite's, trained on a few lines."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    return tokenizer


def make_base(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    mlp: int = 96,
    pad_vocab: int = 0,
    template: str | None = GRANITE_TEMPLATE,
    specials: Sequence[str] = ROLES,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Write a small random Granite with its tokenizer.

    Args:
        pad_vocab: rows of the embedding beyond the tokenizer's end.
        template: chat template; None for a base without one.
        tied: whether lm_head is the embedding.
        config: more of GraniteConfig.
    """
    tokenizer = tokenizer_file(specials)
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size() + pad_vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
        "embedding_multiplier": 6.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    model = GraniteForCausalLM(GraniteConfig(**{**settings, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder, tokenizer, specials, template)
    return folder


def save_tokenizer(folder: Path, tokenizer: Tokenizer, specials: Sequence[str], template: str | None) -> None:
    """Write a tokenizer as transformers does; the first special token is BOS and EOS, the second pads."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=specials[1],
        additional_special_tokens=list(specials[2:]),
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def make_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: float = 16,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    invocation: str | Sequence[int] | None = None,
    strength: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a PEFT adapter with random A and B.

    Args:
        invocation: an aLoRA's invocation, as text or ids; None for a LoRA.
        strength: standard deviation of A and B.
        config: more of LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    if isinstance(invocation, str):
        tokens = Tokenizer.from_file(str(base / "tokenizer.json")).encode(invocation, add_special_tokens=False).ids
    else:
        tokens = list(invocation) if invocation else None
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=tokens,
        **config,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=strength)
    model.to(dtype)
    model.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is None else data.update({key: value})
    path.write_text(json.dumps(data))
