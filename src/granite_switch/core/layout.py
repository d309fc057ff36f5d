"""Where a Granite decoder's projections stand: one row for each, its names in every format as columns.

A group is a set of projections with one input; each group's adapters live in one module beside the projections
(`model.layers.{i}.self_attn.qkv_lora`), so that their A products can be fused. A new base family is another table.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from granite_switch.core.checkpoint import Tensor


@dataclass(frozen=True)
class Projection:
    """One linear projection of a decoder layer."""

    name: str  # the module's name in transformers, PEFT and the checkpoint: `q_proj`
    block: str  # the submodule of the layer that holds it: `self_attn`
    group: str  # the module of the block that holds its adapters: `qkv_lora`
    inputs: str  # a width of `widths`
    outputs: str  # a width of `widths`
    vllm: str  # vLLM's (packed) linear
    gguf: str  # llama.cpp's tensor stem, for the adapters: `attn_q`

    @property
    def path(self) -> str:
        """The projection's module path below its decoder layer: `self_attn.q_proj`."""
        return f"{self.block}.{self.name}"


GRANITE = (
    Projection("q_proj", "self_attn", "qkv_lora", "hidden", "query", "qkv_proj", "attn_q"),
    Projection("k_proj", "self_attn", "qkv_lora", "hidden", "key", "qkv_proj", "attn_k"),
    Projection("v_proj", "self_attn", "qkv_lora", "hidden", "key", "qkv_proj", "attn_v"),
    Projection("o_proj", "self_attn", "o_lora", "query", "hidden", "o_proj", "attn_output"),
    Projection("gate_proj", "mlp", "gate_up_lora", "hidden", "mlp", "gate_up_proj", "ffn_gate"),
    Projection("up_proj", "mlp", "gate_up_lora", "hidden", "mlp", "gate_up_proj", "ffn_up"),
    Projection("down_proj", "mlp", "down_lora", "mlp", "hidden", "down_proj", "ffn_down"),
)
PROJECTIONS: Mapping[str, Projection] = {row.name: row for row in GRANITE}
MODEL_TYPES = ("granite",)  # values of `model_type` in config.json that this table describes

_TENSOR = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(\w+_lora)\.(.+)-(\w+)-([AB])")


@dataclass(frozen=True)
class AdapterTensor:
    """One A or B of one adapter, by where it belongs."""

    adapter: str
    layer: int
    projection: str
    matrix: str  # "A" or "B"

    @property
    def parameter(self) -> str:
        """The parameter's name in its module. Dots cannot stand in one, so they are written `%2E`."""
        return f"{escape(self.adapter)}-{self.projection}-{self.matrix}"

    @property
    def key(self) -> str:
        """The tensor's name in the checkpoint, which is its `state_dict` name."""
        row = PROJECTIONS[self.projection]
        return f"model.layers.{self.layer}.{row.block}.{row.group}.{self.parameter}"

    def order(self) -> tuple[int, str, str]:
        """Sorts an adapter's tensors as its file holds them."""
        return (self.layer, self.projection, self.matrix)


# what gains a row for each control token, and the file that holds it
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDINGS = "embeddings.safetensors"


def adapter_file(adapter: str) -> str:
    """The file of one adapter's tensors."""
    return f"adapter-{adapter}.safetensors"


def parse_key(key: str) -> AdapterTensor | None:
    """The adapter tensor that a checkpoint's tensor name stands for; None for a tensor of the base."""
    found = _TENSOR.fullmatch(key)
    if not found:
        return None
    layer, _, _, adapter, projection, matrix = found.groups()
    return AdapterTensor(unescape(adapter), int(layer), projection, matrix)


def digest(tensors: Mapping[AdapterTensor, Tensor]) -> str:
    """sha256 of an adapter's tensors, whatever file, names and order they stand in (docs/format.md)."""
    result = hashlib.sha256()
    for key in sorted(tensors, key=AdapterTensor.order):
        tensor = tensors[key]
        result.update(f"{key.layer} {key.projection} {key.matrix} {tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.read())
    return result.hexdigest()


def escape(adapter: str) -> str:
    return adapter.replace("%", "%25").replace(".", "%2E")


def unescape(adapter: str) -> str:
    return adapter.replace("%2E", ".").replace("%25", "%")


def widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Input and output sizes of the projections, from a Granite `config.json`."""
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "hidden": config["hidden_size"],
        "query": heads * head,
        "key": (config.get("num_key_value_heads") or heads) * head,
        "mlp": config["intermediate_size"],
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection."""
    sizes = widths(config)
    return {row.name: (sizes[row.outputs], sizes[row.inputs]) for row in GRANITE}


def groups() -> Iterator[tuple[str, str, tuple[Projection, ...]]]:
    """(block, group, its projections), in the order of the table."""
    seen = dict.fromkeys((row.block, row.group) for row in GRANITE)
    for block, group in seen:
        yield block, group, tuple(row for row in GRANITE if row.group == group)
