"""Add control tokens to a tokenizer by editing its files.

The files are JSON, and editing them keeps everything else as the base has it; a tokenizer library that loads and saves
would rewrite it in its own version's way. Needs `tokenizer.json`, the format of every Granite since 3.0.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.checkpoint import read_json
from granite_switch.errors import BaseModelError, CheckpointError

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class BaseTokenizer:
    """A base's tokenizer: its files parsed, and the library's own object to tokenise with."""

    data: Mapping[str, Any]  # tokenizer.json
    config: Mapping[str, Any]  # tokenizer_config.json
    templates: Mapping[str, str]  # chat templates by name; "default" is the one that is used
    special_tokens: Mapping[str, str]  # bos_token and the like, as templates see them

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokens.values()) + 1

    @property
    def tokens(self) -> dict[str, int]:
        tokenizer = Tokenizer.from_str(json.dumps(self.data))
        return tokenizer.get_vocab(with_added_tokens=True)


def read_tokenizer(folder: Path) -> BaseTokenizer:
    """Read a base's tokenizer files.

    Raises:
        BaseModelError: there is no tokenizer.json, or it cannot be used.
    """
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            f"{folder}: there is no tokenizer.json",
            hint="load the tokenizer with transformers and save_pretrained it to get one",
        )
    try:
        data = read_json(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        Tokenizer.from_str(json.dumps(data))
    except CheckpointError as error:
        raise BaseModelError(error.message) from None
    except Exception as error:  # the library raises bare Exception
        raise BaseModelError(f"{folder / 'tokenizer.json'}: is not a tokenizer ({error})") from None
    specials = {key: _text(config[key]) for key in _SPECIALS if config.get(key)}
    return BaseTokenizer(data, config, _templates(folder, config), specials)


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from whichever of the places transformers knows; files win."""
    inside = config.get("chat_template") or {}
    if isinstance(inside, str):
        inside = {"default": inside}
    elif isinstance(inside, list):
        inside = {record["name"]: record["template"] for record in inside}
    templates = dict(inside)
    if (folder / "chat_template.json").is_file() and not templates:
        templates["default"] = read_json(folder / "chat_template.json")["chat_template"]
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read(folder / "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = _read(file)
    return templates


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # newlines as they are


def extended(base: BaseTokenizer, tokens: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json with these special tokens added.

    Token ids follow from order in the library, so ids between the tokenizer's end and the first new token (rows that
    pad the base's embedding) are filled with placeholders.

    Args:
        base: the base's tokenizer.
        tokens: text -> id, ids ascending and without a gap.

    Raises:
        BaseModelError: the library gives a token another id.
    """
    start, first = base.size, min(tokens.values())
    fill = {f"<|unused_{index}|>": index for index in range(start, first)}
    added = [*base.data.get("added_tokens", ())]
    for text, index in {**fill, **tokens}.items():
        record = {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        added.append({**record, "normalized": False, "special": True})
    data = {**base.data, "added_tokens": added}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    wrong = [
        f"{text}: {tokenizer.token_to_id(text)}, not {i}"
        for text, i in tokens.items()
        if tokenizer.token_to_id(text) != i
    ]
    if wrong:
        raise BaseModelError("the tokenizer has gaps in its ids, so control tokens get others", problems=wrong)
    return data


def extended_config(base: BaseTokenizer, data: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json to go with an extended tokenizer.json; chat templates go into files of their own."""
    config = {key: value for key, value in base.config.items() if key != "chat_template"}
    if "added_tokens_decoder" in config:  # as transformers 4 wrote it: lists every added token again
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in data["added_tokens"]
        }
    return config
