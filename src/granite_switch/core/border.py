"""Read files that others wrote, as checked records.

A reader checks the type and range of every key in use and raises one error that names the file and every wrong key;
unused keys pass through. Nothing is checked again later. `Record` sets the rules, `read` and `checked` apply them;
`records.py` has the records.
"""

import json
import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import regex
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from granite_switch.errors import AdapterError, CheckpointError, SwitchError, printable

LIMIT = 2**31
_UNALIKE = re.compile(r"\[\[|\{[^\d,]")  # syntax that the `regex` package reads differently from `re`
_SHORT = reprlib.Repr()
_SHORT.maxstring = 240
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _pattern(key: str) -> str:
    try:
        re.compile(rf"(.*\.)?({key})$")
        regex.compile(rf"(.*\.)?({key})$")
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(key)} is not a regular expression ({error})") from None
    if len(key) > 1000 or _UNALIKE.search(key):
        raise ValueError(f"{shown(key)} is not a pattern of module paths")
    return key


def _name(name: str) -> str:
    try:
        check_name(name)
    except AdapterError as error:
        raise ValueError(error.message) from None
    return name


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.safetensors", name):
        raise ValueError(f"{shown(name)} is not the bare name of a safetensors file")
    return name


Count = Annotated[int, Field(gt=0, lt=LIMIT)]
Natural = Annotated[int, Field(ge=0, lt=LIMIT)]
TokenId = Natural
Number = Annotated[int | float, Field(gt=0, lt=LIMIT, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Name = Annotated[str, AfterValidator(_name)]
FileName = Annotated[str, AfterValidator(_file_name)]

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Part of a file. Values are not converted: "4" is not a number, 1 is not true, 4.0 is not an integer."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def read(path: Path, kind: type[R], error: type[SwitchError] = CheckpointError, hint: str = "") -> R:
    """Read a JSON file as a record.

    Raises:
        SwitchError: of class `error`; the file is missing, is not JSON, or has wrong keys.
    """
    return checked(kind, read_json(path, error, hint), path, error, hint)


def checked(
    kind: type[R], data: Any, where: Path | str, error: type[SwitchError] = CheckpointError, hint: str = ""
) -> R:
    """Validate parsed data and return it as a record.

    Args:
        kind: the record's class.
        data: the parsed file.
        where: the file's name in the error.
        error: the error's class.
        hint: the error's hint.
    """
    with explained(where, error, hint):
        return kind.model_validate(data)


@contextmanager
def explained(where: Path | str, error: type[SwitchError] = CheckpointError, hint: str = "") -> Iterator[None]:
    """Turn pydantic's error into one of class `error`, as in `checked`."""
    try:
        yield
    except ValidationError as found:
        problems = list(dict.fromkeys(_problem(item) for item in found.errors(include_url=False)))
        if len(problems) == 1:
            raise error(f"{where}: {problems[0]}", hint=hint) from None
        raise error(f"{where}: {len(problems)} keys are wrong", problems=problems, hint=hint) from None


def _problem(item: Mapping[str, Any]) -> str:
    """Describe one validation error in a line: the key, the rule and the value."""
    if not item["loc"]:
        return "is not an object with keys" if item["type"].endswith("_type") else item["msg"]
    key = _key(item["loc"])
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}"
    if item["type"] == "value_error":
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    if item["type"] in ("int_type", "float_type"):
        return f"{key} must be a number; it is {shown(item['input'])}"
    return f"{key} {item['msg'].replace('Input should', 'must')}; it is {shown(item['input'])}"


# names of a union's members, which pydantic puts into the location of an error
_MEMBERS = re.compile(r"int|float|str|bool|\[key\]|list\[.*|dict\[.*|constrained-\w+|[A-Z]\w+|function-.*")


def _key(location: tuple[str | int, ...]) -> str:
    """Format an error's location: `adapters[0].rank`, `rank_pattern['q.*']`."""
    result = ""
    for part in location:
        if isinstance(part, str) and _MEMBERS.fullmatch(part):
            continue
        words = part.split(".") if isinstance(part, str) and not result else [str(part)]
        plain = isinstance(part, str) and all(map(str.isidentifier, words)) and len(part) < 60
        result += (f".{part}" if result else str(part)) if plain else f"[{shown(part)}]"
    return result


def shown(value: Any) -> str:
    """Return a short representation of any value for an error message; null and booleans as in JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return printable(_SHORT.repr(value))


def read_json(path: Path, error: type[SwitchError] = CheckpointError, hint: str = "") -> Any:
    """Parse a JSON file.

    Raises:
        SwitchError: of class `error`; the file is missing or not JSON.
    """
    try:
        text = _text(path)
        value = json.loads(text)
        _check_size(value)
        if _SURROGATE.search(text):  # a lone surrogate can be read but not written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise error(f"{path}: no such file", hint=hint) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON ({shown(str(problem))})", hint=hint) from None


def read_text(path: Path) -> str:
    """Read a text file; newlines are kept."""
    try:
        return _text(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({shown(str(error))})") from None


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")  # reading a pipe would block
    return path.read_bytes().decode("utf-8")


def _check_size(value: Any, most: int = LIMIT) -> None:
    """Refuse deep nesting, which can be read but not written, and what YAML's aliases multiply."""
    level = [value]
    for _ in range(100):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
        if len(level) > most:
            raise ValueError(f"it has more than {most:,} values on one level")
    raise ValueError("it is nested more than 100 levels deep")


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file without running code in it.

    Raises:
        AdapterError: the file is missing or not YAML.
    """
    try:
        value = yaml.safe_load(_text(path))
        _check_size(value, 100_000)
        return value
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError, AttributeError, LookupError) as error:
        raise AdapterError(f"{path}: cannot be read as YAML ({str(error)[:300]})") from None


def check_name(name: str) -> None:
    """Refuse an adapter name that cannot be part of a file name, a token or a template."""
    reason = ""
    if not name or name.strip() != name:
        reason = "is empty or has spaces around it"
    elif name == "base":
        reason = "is reserved for the base model"
    elif "/" in name or "\\" in name or ".." in name or name.startswith("."):
        reason = "must not contain a slash or '..', or begin with a dot"
    elif any(unicodedata.category(c).startswith(("C", "Z")) for c in name):
        reason = "must not contain spaces or control characters"
    elif any(c in "<>|{}%:*?\"'" for c in name):
        reason = "must not contain any of < > | { } % : * ? or quotes"
    elif len(name.encode()) > 100:
        reason = "is longer than 100 bytes"
    if reason:
        raise AdapterError(f"adapter name {shown(name)} {reason}", hint="give it another name in a YAML manifest")
