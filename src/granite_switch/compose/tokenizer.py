"""Add control tokens to a tokenizer by editing its files, and take them out again.

Editing JSON keeps everything else as the base has it; a tokenizer library that loads and saves would rewrite it in its
own version's way.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.tokenizer import BaseTokenizer, unused_token
from granite_switch.errors import BaseModelError


def extended(base: BaseTokenizer, tokens: Mapping[str, int], size: int) -> dict[str, Any]:
    """tokenizer.json with these special tokens added.

    Token ids follow from order in the library, so ids between the tokenizer's end and the first new token (rows that
    pad the base's embedding) are filled with placeholders; so are those after the last, which are in reserve, since
    some clients (Mellea's) want as many tokens as the model has rows.

    Args:
        base: the base's tokenizer.
        tokens: text -> id, ids ascending and without a gap.
        size: of the vocabulary.

    Raises:
        BaseModelError: the library gives a token another id.
    """
    before, after = range(base.size, min(tokens.values())), range(max(tokens.values()) + 1, size)
    new = {**_placeholders(before), **tokens, **_placeholders(after)}
    added = [*base.data.get("added_tokens", ())]
    for text, index in new.items():
        record = {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        added.append({**record, "normalized": False, "special": True})
    data = {**base.data, "added_tokens": added}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    wrong = [
        f"{text}: {tokenizer.token_to_id(text)}, not {i}" for text, i in new.items() if tokenizer.token_to_id(text) != i
    ]
    if wrong:
        raise BaseModelError("the tokenizer has gaps in its ids, so control tokens get others", problems=wrong)
    return data


def _placeholders(ids: range) -> dict[str, int]:
    return {unused_token(index): index for index in ids}


def extended_config(base: BaseTokenizer, data: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json to go with an extended tokenizer.json; chat templates go into files of their own."""
    config = {key: value for key, value in base.config.items() if key != "chat_template"}
    if "added_tokens_decoder" in config:  # as transformers 4 wrote it: lists every added token again
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in data["added_tokens"]
        }
    return config


def without(tokenizer: BaseTokenizer, first: int) -> BaseTokenizer:
    """A composed model's tokenizer without the tokens from id `first` on: the inverse of `extended`."""
    added = [token for token in tokenizer.data.get("added_tokens", ()) if token["id"] < first]
    return replace(tokenizer, data={**tokenizer.data, "added_tokens": added})
