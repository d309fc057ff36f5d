"""A tokenizer's files as checked records, by the rule of `border.py`."""

from typing import Any

from granite_switch.core.border import Name, Record, TokenId


class AddedToken(Record):
    """A token in tokenizer_config.json, with its settings."""

    content: str


class NamedTemplate(Record):
    """One of several chat templates; its name is that of a file, too."""

    name: Name
    template: str


Token = str | AddedToken | None


class TokenizerConfig(Record):
    """tokenizer_config.json: special tokens and chat templates."""

    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    sep_token: Token = None
    cls_token: Token = None
    mask_token: Token = None
    additional_special_tokens: list[str | AddedToken] | None = None
    extra_special_tokens: list[str | AddedToken] | dict[str, Any] | None = None
    added_tokens_decoder: dict[str, Any] | None = None
    chat_template: str | list[NamedTemplate] | dict[Name, str] | None = None


class TokenizerToken(Record):
    """One of `added_tokens` of tokenizer.json."""

    id: TokenId
    content: str
    special: bool = False


class TokenizerModel(Record):
    """`model` of tokenizer.json."""

    type: str | None = None
    merges: list[str | list[str]] | None = None
    byte_fallback: bool | None = None


class TokenizerData(Record):
    """tokenizer.json, as far as the tokenizers library is not left to check it."""

    added_tokens: list[TokenizerToken] = []
    model: TokenizerModel
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


class ChatTemplate(Record):
    """chat_template.json."""

    chat_template: str
