"""Check that transformers tokenises with a composed folder as its tokenizer.json and its base's tokenizer do.

compose and verify, which do not import transformers, run this in a subprocess, where `granite_switch` is not registered
and memory is freed at the end. Prints the differences as a JSON list.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.model import read_model
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import SPECIALS

_TEXTS: Sequence[str] = (
    "",
    " ",
    "Ada said:\n\n\"It's 1871!\"\n- see (Tarn), x=12345;\n\n\tHugo's harp",
    "We'LL see: I'VE 1,234,567.89 reasons (12345678901) — “quoted”, 'single', `code`…",
    "  two  spaces   three\t\ttabs \t mixed \r\n\r\n\n\n lines \u00a0\u2003\u3000 end  ",
    "naïve café e\u0301 ﬁ Ⅻ ½ ²³ straße İstanbul",
    "Ελληνικά кириллица עברית العربية हिन्दी ไทย 日本語テキスト 中文没有空格 한국어 👩‍👩‍👧 🇳🇴",
    "def f(x):\n    return {'a': [1, 2.5e-3, None], \"b\": x!=y}  # note\n\n\nclass A(B): ...",
    "<|start|> <unk> <s> </s> [INST] <pad> <|endoftext|> ▁low▁line ĠByte",
    "word " * 700,
)
_ATTRIBUTES = ("padding_side", "truncation_side", "model_max_length", "model_input_names")


def differences(folder: Path, base: Path | None = None) -> list[str]:
    """Differences between the tokenizer that transformers loads from a composed folder and the right one, a line each.

    Args:
        folder: a composed model's folder; needs only config.json and the tokenizer's files.
        base: the base's folder.
    """
    _, spec = read_model(folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = _load(base) if base else None
    problems: list[str] = []
    for kind in ("", spec.base_model_type):  # without and with `granite_switch` registered
        composed = _load(folder, kind)
        problems += _control_problems(spec, composed)
        for text in [*_TEXTS, *_specials(composed)]:
            for add in (True, False):
                ids = composed.encode(text, add_special_tokens=add)
                problems += _difference("its tokenizer.json", text, ids, file.encode(text, add_special_tokens=add).ids)
        problems += _base_problems(composed, reference) if reference else ()
    return list(dict.fromkeys(problems))


def _load(folder: Path, kind: str | None = None) -> Any:
    """Load a tokenizer, with a config of the given `model_type` in memory, if any."""
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        options: dict[str, Any] = {}
        if kind is not None:
            options["config"] = PreTrainedConfig()
            options["config"].model_type = kind
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    finally:
        logging.set_verbosity(verbosity)


def _base_problems(composed: Any, base: Any) -> Iterator[str]:
    for text in [*_TEXTS, *_specials(base)]:
        for add in (True, False):
            ids = composed.encode(text, add_special_tokens=add)
            yield from _difference("the base's tokenizer", text, ids, base.encode(text, add_special_tokens=add))
            for skip in (True, False):
                ours, theirs = (t.decode(ids, skip_special_tokens=skip) for t in (composed, base))
                if ours != theirs:
                    yield f"the ids of {_short(text)} decode to {_short(ours)}, with the base to {_short(theirs)}"
    for name in _ATTRIBUTES:
        if getattr(composed, name) != getattr(base, name):
            yield f"{name} is {getattr(composed, name)}; the base has {getattr(base, name)}"
    for name in SPECIALS:
        ours, theirs = ((getattr(t, name), getattr(t, f"{name}_id")) for t in (composed, base))
        if ours != theirs:
            yield f"{name} is {ours}; the base has {theirs}"


def _control_problems(spec: SwitchSpec, composed: Any) -> Iterator[str]:
    """Control tokens that are not encoded as one special token in every position."""
    tokens = {spec.base_token: spec.base_token_id, **{a.token: a.token_id for a in spec.adapters}}
    added = composed.added_tokens_decoder  # rebuilt on every access
    for text, index in tokens.items():
        for around in (text, f"a{text}b", f" {text} {text}\n"):
            found = composed.encode(around, add_special_tokens=False).count(index)
            if found != around.count(text):
                yield f"{around!r} has {text} {around.count(text)} times, but its ids have it {found} times"
        if not added[index].special:
            yield f"{text} is not a special token"


def _specials(tokenizer: Any) -> list[str]:
    """Texts made of the tokenizer's added tokens, alone and between words."""
    tokens = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())][:300]
    return [" ".join(tokens), "x".join(tokens), *(f"Say{text}it {text} twice\n{text}" for text in tokens[:40])]


def _difference(where: str, text: str, ids: Sequence[int], expected: Sequence[int]) -> list[str]:
    if list(ids) == list(expected):
        return []
    at = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(expected))
    return [f"{_short(text)} gives {len(ids)} ids, and {len(expected)} with {where}; they differ from index {at} on"]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def main() -> None:
    """Import transformers, then read the composed folder and its base's from stdin and print their differences."""
    from transformers import AutoTokenizer  # noqa: F401  (takes seconds, during which the caller reads its adapters)

    if line := sys.stdin.readline():
        print(json.dumps(differences(*map(Path, json.loads(line)))))


if __name__ == "__main__":
    main()
