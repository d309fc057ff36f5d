"""The border: files that others wrote are read here, and come back as checked records.

A reader checks the type and range of every key that is used and raises one error that names the file and all keys that
are wrong; keys that are not used pass through. Behind it nothing is checked again. `Record` is the rule, `read` and
`checked` apply it; the records of the files that compose reads are below.
"""

import json
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import regex
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from granite_switch.errors import AdapterError, CheckpointError, SwitchError

_LIMIT = 2**31
_SECONDS = 0.25  # for one pattern on one module's path; microseconds are usual
_UNALIKE = re.compile(r"\[\[|\{[^\d,]")  # what the `regex` package reads otherwise than `re`
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


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.safetensors", name):
        raise ValueError(f"{shown(name)} is not the bare name of a safetensors file")
    return name


Count = Annotated[int, Field(gt=0, lt=_LIMIT)]
Index = Annotated[int, Field(ge=0, lt=_LIMIT)]
TokenId = Index
Number = Annotated[int | float, Field(gt=0, lt=_LIMIT, allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_pattern)]
FileName = Annotated[str, AfterValidator(_file_name)]

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Part of a file. Nothing is converted: "4" is no number, 1 is not true, 4.0 is no count."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


def read(path: Path, kind: type[R], error: type[SwitchError] = CheckpointError, hint: str = "") -> R:
    """Read a JSON file as a record.

    Raises:
        SwitchError: of the given class; the file is not there, is no JSON, or has keys that are wrong.
    """
    try:
        data = read_json(path)
    except CheckpointError as problem:
        raise error(problem.message, hint=hint) from None
    return checked(kind, data, path, error, hint)


def checked(
    kind: type[R], data: Any, where: Path | str, error: type[SwitchError] = CheckpointError, hint: str = ""
) -> R:
    """What was parsed, as a record.

    Args:
        kind: the record's class.
        data: what the file holds.
        where: the file, for the error.
        error: class of the error.
        hint: for the error.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as found:
        problems = list(dict.fromkeys(_problem(item) for item in found.errors(include_url=False)))
    if len(problems) == 1:
        raise error(f"{where}: {problems[0]}", hint=hint)
    raise error(f"{where}: {len(problems)} keys are wrong", problems=problems, hint=hint)


def _problem(item: Mapping[str, Any]) -> str:
    """One line: the key, what it must be, what it is."""
    if not item["loc"]:
        return "is not an object with keys" if item["type"].endswith("_type") else item["msg"]
    parts = [part for part in item["loc"][1:] if part not in _MEMBERS and not str(part).startswith(("list[", "dict["))]
    key = str(item["loc"][0]) + "".join(f"[{shown(part)}]" for part in parts)
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "value_error":
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    if item["type"] in ("int_type", "float_type"):
        return f"{key} must be a number; it is {shown(item['input'])}"
    return f"{key} {item['msg'].replace('Input should', 'must')}; it is {shown(item['input'])}"


_MEMBERS = ("int", "float", "str", "bool", "[key]")  # as pydantic calls a union's members


def shown(value: Any) -> str:
    """A value of unknown size and kind for an error, as JSON spells it, cut short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return reprlib.repr(value).encode("utf-8", "backslashreplace").decode()


def read_json(path: Path) -> Any:
    """Parse a JSON file, or say which file is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        _check_depth(value)
        if _SURROGATE.search(text):  # half a character can be read but not written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({shown(str(error))})") from None


def _check_depth(value: Any) -> None:
    """What is nested more deeply can be read but not written."""
    level = [value]
    for _ in range(100):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise ValueError("nested more than 100 deep")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_yaml(path: Path) -> Any:
    """Parse a YAML file without running anything in it, or say which file is not one."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError, AttributeError, LookupError) as error:
        raise AdapterError(f"{path}: cannot be read as YAML ({str(error)[:300]})") from None


def check_name(name: str) -> None:
    """Refuse an adapter's name that cannot stand in a file name, a token or a template."""
    reason = ""
    if not name or name.strip() != name:
        reason = "is empty or has spaces around it"
    elif name == "base":
        reason = "is what the base model itself is called"
    elif "/" in name or "\\" in name or ".." in name or name.startswith("."):
        reason = "must not hold a slash or '..', or begin with a dot"
    elif any(unicodedata.category(c).startswith(("C", "Z")) for c in name):
        reason = "must not hold spaces or control characters"
    elif any(c in "<>|{}%:*?\"'" for c in name):
        reason = "must not hold any of < > | { } % : * ? or quotes"
    elif len(name.encode()) > 100:
        reason = "is longer than 100 bytes"
    if reason:
        raise AdapterError(f"adapter name {shown(name)} {reason}", hint="give it another name in a YAML manifest")


# adapter_config.json: what changes the arithmetic beyond a pair of matrices, and why it cannot be composed
_OFF: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base's weights",
    "use_qalora": "QALoRA pools the adapter's input",
    "lora_bias": "biases are not part of the update",
    "modules_to_save": "whole modules replace the base's",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "target_parameters": "updates of bare parameters",
    "trainable_token_indices": "retrained embeddings replace the base's",
    "layer_replication": "the base's layers are repeated",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router over several adapters",
    "kasa_config": "the base's weights are truncated",
    "monteclora_config": "sampled matrices",
}
# what says where the adapter came from and how it was trained, and changes nothing when it runs
_NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_INIT = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base's weights as they are


class AdapterConfig(Record):
    """adapter_config.json of a LoRA or aLoRA adapter (PEFT's `LoraConfig`), with features that can be composed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    r: Count = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    rank_pattern: dict[Pattern, Count] | None = None
    alpha_pattern: dict[Pattern, Number] | None = None
    target_modules: str | list[str] | None = None
    alora_invocation_tokens: list[TokenId] | None = None
    invocation_string: str | None = None  # older aLoRA trainers'
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True
    bias: str = "none"

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module, by its path (`model.layers.0.self_attn.q_proj`)."""
        return _matched(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module, by its path."""
        return _matched(self.alpha_pattern, module, self.lora_alpha)


V = TypeVar("V")


def _matched(patterns: Mapping[str, V] | None, path: str, default: V) -> V:
    """PEFT `get_pattern_key`: of the first pattern that matches the end of the path, its value."""
    for key, value in (patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({key})$", path, timeout=_SECONDS):
                return value
        except TimeoutError:
            raise AdapterError(
                f"adapter_config.json: the pattern {shown(key)} takes for ever on {path}",
                hint="write it without nested *",
            ) from None
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: with every key that is wrong, or that asks for what cannot be composed. Keys that are unknown
            must be off (null, false or empty): the next release of PEFT may compute otherwise with them.
    """
    path = folder / "adapter_config.json"
    hint = "a PEFT adapter folder holds adapter_config.json"
    try:
        data = read_json(path)
    except CheckpointError as error:
        raise AdapterError(error.message, hint=hint) from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: is not a JSON object", hint=hint)
    if data.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: peft_type {shown(data.get('peft_type'))} cannot be composed", hint="LoRA and activated LoRA can"
        )
    config = checked(AdapterConfig, data, path, AdapterError, "train or save it again, or correct the file")
    _refuse_features(path, config)
    return config


def _refuse_features(path: Path, config: AdapterConfig) -> None:
    extra = {key: value for key, value in (config.model_extra or {}).items() if key not in (*_NEUTRAL, "peft_type")}
    asked = {key: value for key, value in extra.items() if value not in (None, False, {}, [])}
    problems = [f"{key}: {_OFF[key]}" for key in asked if key in _OFF]
    problems += [f"{key}={shown(asked[key])}: is not known here" for key in asked if key not in _OFF]
    if config.bias != "none":
        problems.append(f"bias={shown(config.bias)}: the base's biases are retrained")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _INIT:
        problems.append(f"init_lora_weights={shown(init)}: it changes the base's weights")
    if problems:
        raise AdapterError(
            f"{path.parent}: uses PEFT features that cannot be composed",
            problems=problems,
            hint="train it again without them, or convert it to plain LoRA with PEFT; a key that changes nothing when "
            "the adapter runs can be taken out of adapter_config.json",
        )


class Provenance(Record):
    """granite_switch.json beside an extracted adapter: where it first came from."""

    source: str
    sha256: str
    digest: str


class ShardIndex(Record):
    """model.safetensors.index.json."""

    weight_map: dict[str, FileName]
    metadata: dict[str, Any] | None = None


class IoConfig(Record):
    """io.yaml: how clients such as Mellea call an adapter. They want these keys, null or not."""

    model: Any
    response_format: Any
    transformations: Any


class IndexedAdapter(Record):
    """A record of adapter_index.json."""

    adapter_name: str
    technology: str = ""
    io_config: str | None = None


class ModelInfo(Record):
    """`model_info` of adapter_index.json."""

    base_model: str = ""


class AdapterIndex(Record):
    """adapter_index.json, of older checkpoints too."""

    model_info: ModelInfo = ModelInfo()
    adapters: list[IndexedAdapter] = []


class GenerationConfig(Record):
    """generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None
