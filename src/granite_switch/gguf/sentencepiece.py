"""BPE with byte fallback (Llama 2, Mistral) as llama.cpp's tokenizer `llama`.

That tokenizer has no merges: it joins any two neighbours whose text is a token, the token with the highest score first.
This is equivalent if every such pair is a merge and the merges that make one token are consecutive; a token's score is
then minus its index. Both conditions are checked here, and how the tokenizer writes spaces.
"""

from collections.abc import Iterator, Mapping
from typing import Any

SPACE = "▁"
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def is_sentencepiece(data: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is BPE with byte fallback."""
    return bool(data["model"].get("type") == "BPE" and data["model"].get("byte_fallback"))


def scores(data: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """The score of each token; 0 for tokens that no merge makes."""
    places = {left + right: i for i, level in enumerate(_levels(data)) for left, right in level}
    return [-float(places.get(text, 0)) for text in tokens]


def prefix(data: Mapping[str, Any]) -> tuple[bool, list[str]] | None:
    """Whether a space is prepended to each text between special tokens, and warnings; None if it is unknown."""
    normalizer, splitter = data.get("normalizer"), data.get("pre_tokenizer")
    if normalizer and not splitter:
        steps = normalizer.get("normalizers", [normalizer])
        return {1: (False, []), 2: (True, [])}[len(steps)] if steps in ([_TO_SPACE], [_PREPEND, _TO_SPACE]) else None
    if normalizer or not splitter or splitter.get("type") != "Metaspace" or splitter.get("replacement") != SPACE:
        return None
    scheme = splitter.get("prepend_scheme")
    if splitter.get("split", True) or scheme not in ("never", "first"):
        return None
    return False, [] if scheme == "never" else [
        "llama.cpp puts no space before a prompt that begins with text, but the tokenizer does (prepend_scheme "
        "'first'); prompts that begin with a special token, as chat prompts do, are tokenised alike"
    ]


def problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Properties of the tokenizer that llama.cpp cannot reproduce."""
    model = data["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            yield f"tokenizer.json: {key} {model[key]!r}: llama.cpp's tokenizer `llama` does not support it"
    if missing := [text for text in byte_tokens() if text not in model["vocab"]]:
        yield f"tokenizer.json: byte_fallback, but {len(missing)} bytes have no token, such as {missing[0]}"
    if prefix(data) is None:
        steps = [(data.get(key) or {}).get("type") for key in ("normalizer", "pre_tokenizer")]
        scheme = (data.get("pre_tokenizer") or {}).get("prepend_scheme")
        yield (
            f"tokenizer.json: llama.cpp's tokenizer `llama` cannot write spaces as normalizer {steps[0]} with "
            f"pre_tokenizer {steps[1]} (prepend_scheme {scheme!r}) does"
        )
    if data.get("normalizer"):
        for token in data.get("added_tokens", ()):
            if token.get("normalized"):
                yield f"tokenizer.json: {token['content']!r} is `normalized`, but llama.cpp matches it in plain text"
    yield from list(_merge_problems(data))[:3]


def byte_tokens() -> list[str]:
    """The texts of the 256 byte tokens, in order."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _merge_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Pairs that llama.cpp joins but the tokenizer does not, or in another order."""
    levels = _levels(data)
    for level in levels:
        made = list(dict.fromkeys(left + right for left, right in level))
        longest_first = sorted(level, key=lambda pair: (-len(pair[0]), -len(pair[1])))
        if len(made) > 1 and (len({*"".join(made)}) > 1 or level != longest_first):
            yield f"tokenizer.json: merges of {made[0]!r} and {made[1]!r} alternate, but llama.cpp ranks tokens"
    vocab = data["model"]["vocab"]
    pairs = {pair for level in levels for pair in level}
    added = {token["content"] for token in data.get("added_tokens", ())}
    for text in vocab:
        for at in range(1, len(text) if text not in added else 0):
            left, right = text[:at], text[at:]
            formed = all(part in vocab or len(part) == 1 for part in (left, right))
            if formed and (left, right) not in pairs:
                yield f"tokenizer.json: {left!r} and {right!r} are not a merge, but llama.cpp joins them to {text!r}"


def _levels(data: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """The merges, grouped by the token they make; tokens whose merges alternate share a group.

    Llama 2 has such a group, its runs of spaces, all of equal score. There merges with the longest left part come
    first, so that the leftmost run grows, as in llama.cpp with tokens of equal score.
    """
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in data["model"].get("merges", ())]
    last = {left + right: i for i, (left, right) in enumerate(merges)}
    levels: list[list[tuple[str, str]]] = []
    end = -1
    for i, (left, right) in enumerate(merges):
        if i > end:
            levels.append([])
        levels[-1].append((left, right))
        end = max(end, last[left + right])
    return levels
