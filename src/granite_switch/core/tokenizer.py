"""Read a tokenizer's files, to render and tokenise without transformers.

The files are kept as parsed JSON. `tokenizer.json` is required; every Granite since 3.0 has it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from granite_switch.core.border import checked, read, read_json, read_text, shown
from granite_switch.core.files import inside
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer_records import ChatTemplate, TokenizerConfig, TokenizerData
from granite_switch.errors import BaseModelError, CheckpointError

UNUSED = "<|unused_"
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class BaseTokenizer:
    """A tokenizer: its parsed files, and a `tokenizers.Tokenizer` made from them."""

    data: Mapping[str, Any]  # tokenizer.json
    config: Mapping[str, Any]  # tokenizer_config.json
    templates: Mapping[str, str]  # chat templates by name; "default" is the one in use
    special_tokens: Mapping[str, str]  # bos_token and so on, as templates see them

    @cached_property
    def library(self) -> Tokenizer:
        """The `tokenizers` library's object.

        The file's truncation and padding are ignored: they are left over from training, and truncation would drop
        control tokens without an error.
        """
        return Tokenizer.from_str(json.dumps({**self.data, "truncation": None, "padding": None}))

    @cached_property
    def tokens(self) -> dict[str, int]:
        return self.library.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """The largest token id plus one."""
        return max(self.tokens.values()) + 1


def unused_token(index: int) -> str:
    """Return the text of a placeholder token, for a padding row or a reserved row."""
    return f"{UNUSED}{index}|>"


def added_texts(spec: SwitchSpec, tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token that composing added; users' text must not contain any of them.

    There can be hundreds of placeholder tokens; their common prefix represents them, unless one of the base's own
    tokens starts with it.
    """
    controls = [spec.base_token, *(adapter.token for adapter in spec.adapters)]
    added = tokenizer.get_added_tokens_decoder()
    unused = [token.content for index, token in sorted(added.items()) if token.content == unused_token(index)]
    own = {token.content for token in added.values()} - {*unused, *controls}
    return [*controls, *(unused if any(UNUSED in text for text in own) else [UNUSED])]


def read_tokenizer(folder: Path) -> BaseTokenizer:
    """Read a model's tokenizer files.

    Raises:
        BaseModelError: tokenizer.json is missing or invalid.
    """
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(f"{folder}: has no tokenizer.json", hint=_conversion(folder))
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
        tokenizer.library.decode(tokenizer.library.encode("Ada, 1815\n").ids)  # fails if the file is invalid
    except BaseException as error:  # the library raises bare Exception, and a panic is only a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BaseModelError(f"{folder / 'tokenizer.json'}: is not a tokenizer ({shown(str(error))})") from None
    return tokenizer


def _conversion(folder: Path) -> str:
    """Return the hint that says how to create a tokenizer.json from the folder's files."""
    script = f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained('NEW')"
    needs = " (with sentencepiece and protobuf installed)" if any(folder.glob("*.model")) else ""
    return f'create one{needs} and copy the contents of NEW into the folder: python -c "{script}"'


def token_text(token: Any) -> str:
    """Return the text of a special token in a config, which is a string or a record."""
    return token["content"] if isinstance(token, dict) else str(token)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return chat templates by name, from all the places where transformers looks; separate files win."""
    inside_config = config.get("chat_template") or {}
    if isinstance(inside_config, str):
        inside_config = {"default": inside_config}
    elif isinstance(inside_config, list):
        inside_config = {record["name"]: record["template"] for record in inside_config}
    templates = dict(inside_config)
    if (folder / "chat_template.json").is_file() and not templates:
        templates["default"] = read(inside(folder, "chat_template.json"), ChatTemplate).chat_template
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(inside(folder, "chat_template.jinja"))
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = read_text(inside(folder, f"additional_chat_templates/{file.name}"))
    return templates
