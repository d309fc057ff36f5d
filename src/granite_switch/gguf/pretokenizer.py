"""Find llama.cpp's pre-tokenizer that splits text as a tokenizer.json does.

A GGUF file contains no regular expressions: `tokenizer.ggml.pre` names a set of them in src/llama-vocab.cpp. A name is
returned only if its expressions equal the tokenizer's; the tests compare each row with the engine. For all others the
user has to pass `--pre`.
"""

from collections.abc import Mapping
from typing import Any

from granite_switch.gguf.sentencepiece import is_sentencepiece

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = _WORDS + r"|\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"|\p{N}" + _REST

# (expressions, ignore_merges) -> name
KNOWN: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "refact",
    ((CL100K,), False): "dbrx",
    ((CL100K,), True): "llama-bpe",
    ((QWEN2,), False): "qwen2",
}

# equivalent spellings: possessive quantifiers that never backtrack, one `[\r\n]` after a greedy `\s*`
_SUFFIXES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_POSSESSIVE = r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_GPT2_REST = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPELLINGS: Mapping[str, str] = {
    r"'(?i:[sdmt]|ll|ve|re)" + _POSSESSIVE: CL100K,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _POSSESSIVE: CL100K,
    _SUFFIXES + r"|\p{N}{1,3}" + _REST: CL100K,
    _SUFFIXES + r"|\p{N}" + _REST: QWEN2,
    r"'(?:[sdmt]|ll|ve|re)" + _GPT2_REST: GPT2,
    r"(?:'s|'t|'re|'ve|'m|'ll|'d)" + _GPT2_REST: GPT2,
}

# values of `--pre`: the byte-level BPE pre-tokenizers of llama.cpp 0c1e57098
NAMES = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
deepseek-llm deepseek-r1-qwen deepseek-v3 exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gigachat glm4
glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais
jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo
laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2
modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe seed-coder smaug-bpe smollm solar-open
spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking youtu
""".split()  # noqa: SIM905


def detect(tokenizer: Mapping[str, Any]) -> str | None:
    """The pre-tokenizer's name in llama.cpp; None if no known one is equivalent.

    Args:
        tokenizer: tokenizer.json.
    """
    if is_sentencepiece(tokenizer):
        return "default"  # llama.cpp's tokenizer `llama` splits nothing
    expressions = splits(tokenizer.get("pre_tokenizer") or {})
    normalizer = tokenizer.get("normalizer")
    if expressions is None or (normalizer and normalizer != {"type": "NFC"}):
        return None
    return KNOWN.get((expressions, bool(tokenizer["model"].get("ignore_merges"))))


def splits(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The expressions that split text in turn, before the byte-level mapping; None for any other structure."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    expressions = [_expression(step) for step in before]
    if last.get("use_regex", True):
        expressions.append(GPT2)
    if None in expressions:
        return None
    return tuple(SPELLINGS.get(text, text) for text in expressions if text)


def _expression(step: Mapping[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step.get("type") != "Split" or "Regex" not in step.get("pattern", {}):
        return None
    # each match is a piece; or the text between matches is dropped, of which there is none
    kept = (step.get("behavior"), bool(step.get("invert")))
    return str(step["pattern"]["Regex"]) if kept in (("Isolated", False), ("Removed", True)) else None
