"""Records for files that others wrote, checked by the rules of `border.py`; they list the keys in use."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from granite_switch.core.border import Count, FileName, Name, Record, TokenId, checked, read, read_json
from granite_switch.core.files import inside
from granite_switch.errors import CheckpointError, SwitchError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # names of the same key of config.json


class Provenance(Record):
    """granite_switch.json beside an extracted adapter: its original source."""

    source: str
    sha256: str
    digest: str


class ShardIndex(Record):
    """model.safetensors.index.json."""

    weight_map: dict[str, FileName]
    metadata: dict[str, Any] | None = None


class ManifestEntry(Record, extra="forbid"):
    """An adapter in a YAML manifest."""

    path: Annotated[str, Field(min_length=1)]
    name: Name | None = None
    revision: str | None = None
    invocation_placement: Literal["", "prefix", "suffix"] = ""
    subfolder: str | None = None  # of the path; the name is that of PEFT and huggingface_hub
    type: Literal["lora", "alora"] | None = None  # in manifests of older releases; adapter_config.json decides
    retired: Literal[False] | None = None


class RetiredEntry(Record, extra="forbid"):
    """A removed adapter in a YAML manifest."""

    name: Name
    retired: Literal[True]
    substitute_token_id: TokenId | None = None


class IoConfig(Record):
    """io.yaml: how clients such as Mellea call an adapter. They require these keys, which may be null."""

    model: Any
    response_format: Any
    transformations: Any


class IndexedAdapter(Record):
    """One of `adapters` in adapter_index.json."""

    adapter_name: str
    technology: Literal["lora", "alora", ""] = ""
    io_config: str | None = None


class ModelInfo(Record):
    """`model_info` of adapter_index.json."""

    base_model: str = ""


class AdapterIndex(Record):
    """adapter_index.json, including that of older checkpoints."""

    model_info: ModelInfo = ModelInfo()
    adapters: list[IndexedAdapter] = []


def read_adapter_index(folder: Path) -> AdapterIndex:
    """Read a model's adapter_index.json; empty if it is missing."""
    path = inside(folder, "adapter_index.json")
    return read(path, AdapterIndex) if path.is_file() else AdapterIndex()


class GenerationConfig(Record):
    """generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None


class QuantisedWeights(Record):
    """`weights` of one of compressed-tensors' `config_groups`."""

    num_bits: Annotated[int, Field(gt=0, le=32)] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None


class QuantisedGroup(Record):
    """One of compressed-tensors' `config_groups`."""

    weights: QuantisedWeights | None = None
    format: str | None = None


class Quantisation(Record):
    """`quantization_config` of config.json."""

    quant_method: str | None = None
    bits: Annotated[int, Field(gt=0, le=32)] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    weight_block_size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    config_groups: dict[str, QuantisedGroup] | None = None
    sparsity_config: dict[str, Any] | None = None


class DecoderConfig(Record):
    """The decoder's part of config.json: the keys that its users share."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000, validation_alias=AliasChoices(*LAYER_COUNTS))]
    vocab_size: Count
    layer_types: list[str] | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    max_position_embeddings: Count | None = None


class DenseConfig(DecoderConfig):
    """The decoder's part of config.json for known families. In others, sizes may differ between layers."""

    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None


class ModelConfig(Record):
    """config.json of a base or a composed model: the keys that composing uses, outside the decoder's part."""

    model_type: str
    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: Quantisation | None = None
    is_encoder_decoder: bool | None = None
    tie_word_embeddings: bool | None = None


def read_config(path: Path, error: type[SwitchError] = CheckpointError, hint: str = "") -> dict[str, Any]:
    """Read a model's config.json; the keys in use are checked, the others are kept unchanged."""
    config = read_json(path, error, hint)
    checked(ModelConfig, config, path, error, hint)
    inner = config.get("text_config")
    nested = isinstance(inner, dict) and "vocab_size" in inner
    checked(DecoderConfig, inner if nested else config, f"{path}: text_config" if nested else path, error, hint)
    return dict(config)


class LegacyConfig(DenseConfig):
    """config.json of the legacy formats."""

    hidden_size: Count
    num_attention_heads: Count
    shared_intermediate_size: Count | None = None
    projection_head_dim: Count | None = None
    num_local_experts: int | None = None
    num_adapters: Annotated[int, Field(ge=0, le=10_000)] | None = None
    adapter_names: list[Name] | None = None
    adapter_kinds: list[str] | None = None
    adapter_ranks: list[Count] | None = None
    adapter_token_ids: list[TokenId] | None = None
    adapter_substitute_token_ids: list[TokenId] | None = None
    lora_target_modules: list[str] | None = None
    hiding_groups: dict[str, list[str]] | None = None
    hiding_policy: dict[str, list[str]] | None = None
