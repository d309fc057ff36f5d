"""Convert the tokenizer to llama.cpp's: token texts and types, merges or scores, and special ids."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from granite_switch.core.chat import render
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.errors import TemplateError
from granite_switch.gguf import sentencepiece

_NO_BOS = "the chat template writes {}, so llama.cpp is told not to add it; other prompts must begin with it"

# bytes that no UTF-8 text has, as byte-level BPE writes them
_NEVER = {chr(i) for i in (0xC0, 0xC1, *range(0xF5, 0x100))}


@dataclass(frozen=True)
class Vocabulary:
    """The `tokenizer.*` keys."""

    model: str  # llama.cpp's name of the algorithm: gpt2 (byte-level BPE) or llama (BPE with byte fallback)
    tokens: Sequence[str]  # by id
    types: Sequence[int]  # `gguf.TokenType`, by id
    merges: Sequence[str]  # gpt2 only
    scores: Sequence[float]  # llama only, by id
    space_prefix: bool
    special: Mapping[str, int]  # bos, eos, eot, ... -> id
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]


def vocabulary(
    tokenizer: BaseTokenizer, size: int, spec: SwitchSpec, end_tokens: Sequence[int] = ()
) -> tuple[Vocabulary, list[str], list[str]]:
    """llama.cpp's vocabulary for a tokenizer, reasons why it cannot be exported, and warnings.

    Args:
        tokenizer: the composed model's.
        size: of the vocabulary, including rows without a token.
        spec: its control tokens get the type CONTROL.
        end_tokens: further ids that end an answer.
    """
    data, known = tokenizer.data, tokenizer.tokens
    problems = list(_problems(tokenizer, known, size, spec))
    pieces = sentencepiece.is_sentencepiece(data)
    problems += sentencepiece.problems(data) if pieces else ()
    kinds = _kinds(data) if pieces else {}
    added = {token["id"]: token for token in data.get("added_tokens", ())}
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for text, index in known.items():
        if index < size:
            tokens[index] = text
            types[index] = kinds.get(text) or _kind(added.get(index))
    for index in spec.control_slots:
        if 0 <= index < size:
            types[index] = int(TokenType.CONTROL)
    problems += [f"two tokens have the text {text!r}" for text, count in Counter(tokens).items() if count > 1]
    texts = {key.removesuffix("_token"): text for key, text in tokenizer.special_tokens.items()}
    special = {name: known[text] for name, text in texts.items() if name != "cls" and known.get(text, size) < size}
    problems += [f"eos_token_id {i} is not in the vocabulary of {size}" for i in end_tokens if i >= size]
    ends = dict.fromkeys([*_one(special.get("eos")), *end_tokens])
    special |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    add_bos, add_eos, warnings = _added_around(data, special)
    if add_bos and _template_writes(tokenizer, tokens[special["bos"]]):
        # llama.cpp would also add it before a LoRA's control token, which replaces it
        add_bos = False
        warnings.append(_NO_BOS.format(tokens[special["bos"]]))
    space_prefix, more = (sentencepiece.prefix(data) if pieces else None) or (False, [])
    warnings += more
    warnings += _read_otherwise(data, known, pieces)
    made = Vocabulary(
        model="llama" if pieces else "gpt2",
        tokens=tokens,
        types=types,
        merges=[] if pieces else [_merge(pair) for pair in data["model"].get("merges", ())],
        scores=sentencepiece.scores(data, tokens) if pieces else [],
        space_prefix=space_prefix,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        templates=dict(tokenizer.templates),
    )
    return made, problems, warnings


def _problems(tokenizer: BaseTokenizer, known: Mapping[str, int], size: int, spec: SwitchSpec) -> Iterator[str]:
    kind = tokenizer.data["model"].get("type")
    decoder = (tokenizer.data.get("decoder") or {}).get("type")
    if not sentencepiece.is_sentencepiece(tokenizer.data) and (kind != "BPE" or decoder != "ByteLevel"):
        yield (
            f"the tokenizer is {kind} with decoder {decoder}; only byte-level BPE and BPE with byte fallback can be "
            "exported"
        )
    if known and max(known.values()) >= size:
        yield f"the tokenizer has ids up to {max(known.values())}, but the embedding has {size} rows"
    for adapter in spec.active:
        if (found := known.get(adapter.token)) != adapter.token_id:
            yield f"{adapter.token!r} is token {found} in the tokenizer, but {adapter.token_id} in config.json"


def _read_otherwise(data: Mapping[str, Any], known: Mapping[str, int], pieces: bool) -> Iterator[str]:
    """Warnings about texts that llama.cpp tokenises otherwise."""
    if not pieces and any(char not in known for char in {*ByteLevel.alphabet()} - _NEVER):
        yield (
            "the vocabulary lacks some bytes, of control characters for example: the tokenizer drops them and joins "
            "what is around them, and llama.cpp does not join it"
        )
    if data.get("normalizer") and not pieces:
        yield f"llama.cpp does not normalise text ({data['normalizer'].get('type')}): some may tokenise differently"
    for token in data.get("added_tokens", ()):
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            yield f"{token['content']!r}: llama.cpp ignores lstrip, rstrip and single_word"


def _kinds(data: Mapping[str, Any]) -> dict[str, int]:
    """Token types that only BPE with byte fallback has, by text."""
    kinds = dict.fromkeys(sentencepiece.byte_tokens(), int(TokenType.BYTE))
    unknown = data["model"].get("unk_token")
    return {**kinds, unknown: int(TokenType.UNKNOWN)} if unknown else kinds


def _kind(added: Mapping[str, Any] | None) -> int:
    if added is None:
        return int(TokenType.NORMAL)
    return int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)


def _merge(pair: str | Sequence[str]) -> str:
    """A merge as text. llama.cpp splits it at the first space, so other spaces are written as in byte-level BPE."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _added_around(data: Mapping[str, Any], special: Mapping[str, int]) -> tuple[bool, bool, list[str]]:
    """Whether the tokenizer adds its bos and its eos token to a text, found by encoding one; and warnings."""
    tokenizer = Tokenizer.from_str(json.dumps(data))
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for add_bos in (False, True):
        for add_eos in (False, True):
            around = [*_one(special.get("bos") if add_bos else None), *inner]
            if whole == [*around, *_one(special.get("eos") if add_eos else None)]:
                return add_bos, add_eos, []
    return False, False, ["the tokenizer adds special tokens to a text that llama.cpp cannot add"]


def _template_writes(tokenizer: BaseTokenizer, text: str) -> bool:
    """Whether rendered prompts begin with a token's text."""
    if "default" not in tokenizer.templates:
        return False
    try:
        messages = [{"role": "user", "content": "a"}]
        return render(tokenizer.templates["default"], messages, **tokenizer.special_tokens).startswith(text)
    except TemplateError:
        return False


def _one(value: int | None) -> list[int]:
    return [] if value is None else [value]
