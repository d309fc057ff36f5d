"""Tokenizer folders of bases as they are published, and their composed folders, without weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from granite_switch.composition.reading import UNREGISTERED, read_as_base
from granite_switch.composition.tokenizer import extended, extended_config
from granite_switch.core.border import write_json
from granite_switch.core.spec import MODEL_TYPE, AdapterSpec, SwitchSpec

_CORPUS = [
    "the river ends in the sea and the road begins at the mill; it's the harbour's, they'll say we've 1871 reasons",
    "Where does Anna live? Anna lives in Oslo, near the old harbour. 0123456789 12 345 6789",
    "naïve café Ελληνικά кириллица 日本語 中文  \n\n\n\t\tdef f(x):\n    return {'a': 1}\n\n-- \"It's\" 'I'VE'",
]
_GRANITE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Case:
    """One way in which a base's tokenizer is published."""

    model_type: str
    tokenizer_class: str | None
    kind: str  # kind of tokenizer.json: bytes, metaspace, gemma
    config: dict[str, Any] = field(default_factory=dict)  # further keys of tokenizer_config.json
    file: dict[str, Any] = field(default_factory=dict)  # further keys of tokenizer.json
    specials_map: dict[str, Any] | None = None

    def __str__(self) -> str:
        more = [*self.config, *self.file, *(["special_tokens_map"] if self.specials_map else [])]
        return "-".join([self.model_type, str(self.tokenizer_class), self.kind, *more])


def tokenizer_of(kind: str) -> Tokenizer:
    """A small tokenizer of a kind: byte-level, sentencepiece-like with byte fallback, or Gemma's."""
    if kind == "bytes":
        specials = ["<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>"]
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_GRANITE_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bos = specials[0]
    else:
        specials = ["<pad>", "</s>", "<s>", "<unk>", "<mask>", "<bos>", "<eos>"]
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        alphabet = []
        bos = "<s>" if kind == "metaspace" else "<bos>"
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    if kind == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if kind != "bytes":
        fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(fallback)
        index = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, index)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("\n\n\n", normalized=False)])
    return tokenizer


def write_base(folder: Path, case: Case) -> Path:
    """Write a base's tokenizer files, and the part of config.json that determines how they are read."""
    folder.mkdir(parents=True)
    data = json.loads(tokenizer_of(case.kind).to_str())
    if case.kind != "bytes":  # byte tokens are ordinary vocabulary entries
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    write_json(folder / "tokenizer.json", {**data, **case.file})
    named = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    if case.kind != "bytes":
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if case.kind == "gemma":
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    config = {**named, "model_max_length": 4096, "tokenizer_class": case.tokenizer_class, **case.config}
    write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if k != "tokenizer_class" or v})
    write_json(folder / "config.json", {"model_type": case.model_type})
    if case.specials_map:
        write_json(folder / "special_tokens_map.json", case.specials_map)
    return folder


def write_composed(folder: Path, base: Path) -> Path:
    """Write the composed version of those files."""
    folder.mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    tokenizer = read_as_base(base, config)
    first = tokenizer.size + 5
    spec = SwitchSpec(
        adapters=tuple(
            AdapterSpec(name, "lora", f"<|switch:{name}|>", first + 1 + i, 0, 4, 8, ())
            for i, name in enumerate(("answer", "cite", "guardian-core"))
        ),
        base_token="<|switch:base|>",
        base_token_id=first,
        base_substitute_token_id=0,
        base_model="base",
        base_model_type=config["model_type"],
    )
    tokens = {spec.base_token: first, **{a.token: a.token_id for a in spec.adapters}}
    data = extended(tokenizer, tokens, first + 20)
    write_json(folder / "tokenizer.json", data)
    write_json(folder / "tokenizer_config.json", extended_config(tokenizer, data))
    config |= {"model_type": MODEL_TYPE, **UNREGISTERED, "switch": spec.to_dict()}
    write_json(folder / "config.json", {"num_hidden_layers": 1, "vocab_size": first + 20, **config})
    return folder


_LEFT = {"direction": "Left", "strategy": "LongestFirst", "stride": 0}
_TRUNCATION = {"truncation": {"max_length": 16, **_LEFT}}
_PADDING = {
    "padding": {
        "strategy": {"Fixed": 24},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
}
_THINK = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
_DECODER = {
    "added_tokens_decoder": {
        "0": {"content": "<|end_of_text|>", **_THINK, "lstrip": False, "rstrip": False},
        "2": {"content": "<|start_of_role|>", **_THINK},
        "3": {"content": "<|end_of_role|>", **_THINK, "special": False},
    }
}
_EXTRA = {"extra_special_tokens": ["<|start_of_role|>", "<tool>", "<mill>"]}
_EXTRA_NAMED = {"extra_special_tokens": {"image_token": "<image>", "end_token": "<|end_of_role|>"}}
_ADDITIONAL = {"additional_special_tokens": ["<tool>", {"__type": "AddedToken", "content": "mill", **_THINK}]}
_MAP = {"bos_token": {"content": "<begin>", **_THINK}, "additional_special_tokens": ["<extra>"]}

CASES: Sequence[Case] = (
    *(Case("granite", name, "bytes") for name in (None, "GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer")),
    *(Case("granitemoehybrid", name, "bytes") for name in ("GPT2Tokenizer", "TokenizersBackend", "GPT2TokenizerFast")),
    *(Case("granite_swa", name, "bytes") for name in (None, "GPT2Tokenizer", "PreTrainedTokenizerFast")),
    *(Case("qwen3", name, "bytes") for name in (None, "Qwen2TokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")),
    *(Case("qwen3", name, "bytes") for name in ("PreTrainedTokenizerFast", "TokenizersBackend")),
    *(Case("qwen2", name, "bytes") for name in (None, "Qwen2Tokenizer", "GPT2Tokenizer", "TokenizersBackend")),
    *(Case("qwen3_5_text", name, "bytes") for name in (None, "Qwen2Tokenizer", "TokenizersBackend")),
    *(Case("llama", name, "bytes") for name in (None, "PreTrainedTokenizerFast", "GPT2Tokenizer", "TokenizersBackend")),
    *(Case("llama", name, "metaspace") for name in (None, "LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend")),
    Case("llama", "LlamaTokenizerFast", "bytes"),
    Case("llama", "LlamaTokenizer", "metaspace", {"legacy": True}),
    Case("llama", "LlamaTokenizer", "metaspace", {"add_prefix_space": False, "add_bos_token": False}),
    Case("llama", "LlamaTokenizer", "metaspace", {"unk_token": {"__type": "AddedToken", "content": "<unk>", **_THINK}}),
    *(Case("mistral", name, "metaspace") for name in (None, "LlamaTokenizer", "LlamaTokenizerFast")),
    *(Case("phi3", name, "metaspace") for name in ("LlamaTokenizer", "LlamaTokenizerFast")),
    *(Case("gemma3_text", name, "gemma") for name in (None, "GemmaTokenizer", "GemmaTokenizerFast")),
    *(Case("gemma2", name, "gemma") for name in ("TokenizersBackend", "LlamaTokenizer", "PreTrainedTokenizerFast")),
    *(Case("olmo2", name, "bytes") for name in (None, "GPT2Tokenizer", "GPTNeoXTokenizerFast")),
    *(Case("olmoe", name, "bytes") for name in (None, "GPTNeoXTokenizer")),
    Case("smollm3", "PreTrainedTokenizerFast", "bytes", {"padding_side": "left"}),
    Case("deepseek_v3", "LlamaTokenizerFast", "bytes"),
    *(Case("llama", "GPT2Tokenizer", "bytes", more) for more in (_DECODER, _EXTRA, _EXTRA_NAMED, _ADDITIONAL)),
    *(Case("granite", "GPT2Tokenizer", "bytes", more) for more in (_DECODER, _EXTRA, _EXTRA_NAMED, _ADDITIONAL)),
    *(Case("qwen3", "Qwen2Tokenizer", "bytes", more) for more in (_DECODER, _EXTRA, _ADDITIONAL)),
    *(Case(kind, "GPT2Tokenizer", "bytes", {}, _TRUNCATION | _PADDING) for kind in ("granite", "llama")),
    Case("granite", "PreTrainedTokenizerFast", "bytes", {"pad_token": None, "add_prefix_space": True}, _PADDING),
    Case("llama", "GPT2Tokenizer", "bytes", {"add_prefix_space": True}),
    *(Case(kind, "GPT2Tokenizer", "bytes", {}, {}, _MAP) for kind in ("granite", "llama")),
    Case("llama", "GPT2Tokenizer", "bytes", _DECODER, {}, _MAP),
)
