"""Add control tokens to a tokenizer by editing its files, and remove them again.

Editing the JSON leaves everything else as in the base; a tokenizer library would rewrite the files in its own version's
form.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.tokenizer import BaseTokenizer, unused_token
from granite_switch.errors import BaseModelError


def extended(base: BaseTokenizer, tokens: Mapping[str, int], size: int) -> dict[str, Any]:
    """Return tokenizer.json with these special tokens added.

    The library numbers tokens by order, so ids between the tokenizer's end and the first new token (padding rows of the
    base's embedding) are filled with placeholders. So are the reserved ids after the last one, because some clients
    (Mellea's) expect as many tokens as the model has rows.

    Args:
        base: the base's tokenizer.
        tokens: text -> id, with ids ascending and without gaps.
        size: the vocabulary size.

    Raises:
        BaseModelError: the library assigns a token another id.
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
        raise BaseModelError("the tokenizer has gaps in its ids, so control tokens get other ids", problems=wrong)
    return data


def _placeholders(ids: range) -> dict[str, int]:
    return {unused_token(index): index for index in ids}


def extended_config(base: BaseTokenizer, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json for an extended tokenizer.json; chat templates are separate files."""
    config = {key: value for key, value in base.config.items() if key != "chat_template"}
    if "added_tokens_decoder" in config:  # written by transformers 4; repeats every added token
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in data["added_tokens"]
        }
    return config


def without(tokenizer: BaseTokenizer, first: int) -> BaseTokenizer:
    """Return a composed model's tokenizer without the tokens from id `first` on. Inverts `extended`."""
    added = [token for token in tokenizer.data.get("added_tokens", ()) if token["id"] < first]
    return replace(tokenizer, data={**tokenizer.data, "added_tokens": added})
