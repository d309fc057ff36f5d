"""Read a tokenizer's files: what every part that renders or tokenises without transformers needs.

The files are JSON and are kept as parsed. Needs `tokenizer.json`, the format of every Granite since 3.0.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.border import checked, read, read_json, shown
from granite_switch.core.files import inside
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer_records import ChatTemplate, TokenizerConfig, TokenizerData
from granite_switch.errors import BaseModelError, CheckpointError

UNUSED = "<|unused_"
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer: its files parsed, and the library's own object to tokenise with."""

    data: Mapping[str, Any]  # tokenizer.json
    config: Mapping[str, Any]  # tokenizer_config.json
    templates: Mapping[str, str]  # chat templates by name; "default" is the one that is used
    special_tokens: Mapping[str, str]  # bos_token and the like, as templates see them

    @cached_property
    def library(self) -> Tokenizer:
        """The object to tokenise with; it gives every id of a text.

        The file's truncation and padding are ignored: they are left from training, and truncation would drop control
        tokens without an error.
        """
        return Tokenizer.from_str(json.dumps({**self.data, "truncation": None, "padding": None}))

    @cached_property
    def tokens(self) -> dict[str, int]:
        return self.library.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokens.values()) + 1


def unused_token(index: int) -> str:
    """The text of a token that means nothing: a padding row's, or one in reserve."""
    return f"{UNUSED}{index}|>"


def added_texts(spec: SwitchSpec, tokenizer: Tokenizer) -> list[str]:
    """What may not occur in the part of a prompt that users write: the text of every token that composing added.

    Tokens in reserve and of padding rows can be hundreds; their common prefix represents them, unless a token of
    the base's own begins alike.
    """
    controls = [spec.base_token, *(adapter.token for adapter in spec.adapters)]
    added = tokenizer.get_added_tokens_decoder()
    unused = [token.content for index, token in sorted(added.items()) if token.content == unused_token(index)]
    own = {token.content for token in added.values()} - {*unused, *controls}
    return [*controls, *(unused if any(UNUSED in text for text in own) else [UNUSED])]


def read_tokenizer(folder: Path) -> BaseTokenizer:
    """Read a model's tokenizer files.

    Raises:
        BaseModelError: there is no tokenizer.json, or it cannot be used.
    """
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            f"{folder}: there is no tokenizer.json",
            hint=_conversion(folder),
        )
    try:
        data = read_json(inside(folder, "tokenizer.json"))
        checked(TokenizerData, data, folder / "tokenizer.json", BaseModelError)
        path = inside(folder, "tokenizer_config.json")
        config = read_json(path) if path.is_file() else {}
        checked(TokenizerConfig, config, path, BaseModelError)
        specials = {key: token_text(config[key]) for key in SPECIALS if config.get(key)}
        tokenizer = BaseTokenizer(data, config, _templates(folder, config), specials)
    except CheckpointError as error:
        raise BaseModelError(error.message, problems=error.problems, hint=error.hint) from None
    try:
        tokenizer.library.decode(tokenizer.library.encode("Ada, 1815\n").ids)  # what is bad is an error here
    except BaseException as error:  # the library raises bare Exception, and panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BaseModelError(
            f"{folder / 'tokenizer.json'}: is not a tokenizer ({shown(str(error))})",
        ) from None
    return tokenizer


def _conversion(folder: Path) -> str:
    """How to get a tokenizer.json from what there is."""
    script = f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained('NEW')"
    needs = " (with sentencepiece and protobuf installed)" if any(folder.glob("*.model")) else ""
    return f'make one{needs} and copy what is in NEW into the folder: python -c "{script}"'


def token_text(token: Any) -> str:
    """The text of a special token as a config holds it: a string or a record."""
    return token["content"] if isinstance(token, dict) else str(token)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from whichever of the places transformers knows; files win."""
    inside_config = config.get("chat_template") or {}
    if isinstance(inside_config, str):
        inside_config = {"default": inside_config}
    elif isinstance(inside_config, list):
        inside_config = {record["name"]: record["template"] for record in inside_config}
    templates = dict(inside_config)
    if (folder / "chat_template.json").is_file() and not templates:
        templates["default"] = read(inside(folder, "chat_template.json"), ChatTemplate).chat_template
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read(folder, "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = _read(folder, f"additional_chat_templates/{file.name}")
    return templates


def _read(folder: Path, name: str) -> str:
    path = inside(folder, name)
    try:
        return path.read_bytes().decode("utf-8")  # newlines as they are
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from None
