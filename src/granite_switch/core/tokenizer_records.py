"""Records for a tokenizer's files, checked by the rules of `border.py`."""

from typing import Annotated, Any

from pydantic import Field

from granite_switch.core.border import Name, Record, TokenId

Index = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class AddedToken(Record):
    """A token in tokenizer_config.json, with its settings."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False


class NamedTemplate(Record):
    """One of several chat templates; its name is also a file name."""

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
    extra_special_tokens: list[str | AddedToken] | dict[str, str | AddedToken] | None = None
    added_tokens_decoder: dict[Index, AddedToken] | None = None
    add_prefix_space: bool | None = None
    trim_offsets: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str | None = None
    chat_template: str | list[NamedTemplate] | dict[Name, str] | None = None


class TokenizerToken(Record):
    """One of `added_tokens` of tokenizer.json."""

    id: TokenId
    content: str
    special: bool = False


class Truncation(Record):
    """`truncation` of tokenizer.json."""

    direction: str


class Padding(Record):
    """`padding` of tokenizer.json."""

    direction: str
    pad_token: str


class TokenizerModel(Record):
    """`model` of tokenizer.json."""

    type: str | None = None
    merges: list[str | list[str]] | None = None
    byte_fallback: bool | None = None


class TokenizerData(Record):
    """tokenizer.json: the keys that the tokenizers library does not check."""

    added_tokens: list[TokenizerToken] = []
    model: TokenizerModel
    truncation: Truncation | None = None
    padding: Padding | None = None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


class ChatTemplate(Record):
    """chat_template.json."""

    chat_template: str
