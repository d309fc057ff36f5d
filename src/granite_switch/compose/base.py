"""Read a base model and check that it can carry adapters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from granite_switch.compose.reading import read_as_base
from granite_switch.core.border import shown
from granite_switch.core.checkpoint import Checkpoint
from granite_switch.core.files import inside
from granite_switch.core.layout import Vocabulary, decoder_config, natural, vocabulary
from granite_switch.core.linears import linears
from granite_switch.core.packed import WAY_OUT, Shape, plain_name, refused
from granite_switch.core.records import read_config
from granite_switch.core.spec import MODEL_TYPE
from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.errors import BaseModelError, CheckpointError

_MOST_MISSING_ROWS = 65536  # tokens without a row in the embedding; they get one
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass(frozen=True)
class Base:
    """A base model that can carry adapters, read and checked."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    tokenizer: BaseTokenizer

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """(out, in) of what adapters can target, by path."""
        try:
            return linears(self.checkpoint.tensors, self.config)
        except CheckpointError as error:
            raise BaseModelError(f"{self.folder}: {error.message}", problems=error.problems, hint=error.hint) from None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The names of the tensors with a row for each token."""
        found = vocabulary(self.checkpoint.tensors, self.vocab_size)
        if not found:
            raise BaseModelError(f"{self.folder}: no token embedding of {self.vocab_size} rows among its weights")
        return found

    @property
    def vocab_size(self) -> int:
        return int(decoder_config(self.config)["vocab_size"])

    @property
    def layers(self) -> int:
        return int(decoder_config(self.config)["num_hidden_layers"])

    @property
    def architecture(self) -> str:
        """The class that transformers and vLLM run it with."""
        return str(self.config["architectures"][0])

    @property
    def size(self) -> int:
        """The first token id that nothing of the base can mean: padding rows count as taken."""
        rows = self.checkpoint[self.vocabulary.embedding].shape[0]
        return max(self.tokenizer.size, rows, self.vocab_size)


def read_base(folder: Path) -> Base:
    """Read a base model and check that it can carry adapters.

    Raises:
        BaseModelError: with all that it lacks.
    """
    config = read_base_config(folder)
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError as error:
        raise BaseModelError(error.message, problems=error.problems, hint=error.hint) from None
    base = Base(folder, config, checkpoint, read_as_base(folder, config))
    check_base(base)
    return base


def read_base_config(folder: Path) -> dict[str, Any]:
    """The base's config.json, if it is a decoder that can carry adapters."""
    where = inside(folder, "config.json")
    config = read_config(where, BaseModelError, "a base is a model that transformers loads, with its config.json")
    if config["model_type"] == MODEL_TYPE:
        raise BaseModelError(
            f"{where}: model_type {MODEL_TYPE!r} cannot carry adapters",
            hint="it is composed already; `granite-switch add` takes more adapters",
        )
    if config.get("is_encoder_decoder"):
        raise BaseModelError(f"{where}: is_encoder_decoder: an encoder-decoder cannot carry a switch; decoders can")
    names = config.get("architectures")
    if not names or not names[0].endswith(_CAUSAL):
        raise BaseModelError(
            f"{where}: architectures {shown(names)} name no language model",
            hint=f"the class must end in {', '.join(_CAUSAL)}; save the model with its language-model head",
        )
    if quantisation := refused(config):
        raise BaseModelError(f"{where}: {quantisation}: adapters were not tried on it", hint=WAY_OUT)
    return config


def check_base(base: Base) -> None:
    """The layers must be whole, and the embedding must have rows to extend."""
    tensors, config = base.checkpoint.tensors, decoder_config(base.config)
    quantised = base.config.get("quantization_config")  # then some linears may be left as they were
    names_there = dict.fromkeys(map(plain_name, tensors) if quantised else tensors)
    if missing := [*_missing_layers(names_there, config), *_missing_norms(names_there, config)]:
        raise BaseModelError(f"{base.folder}: its weights lack tensors that its config implies", problems=missing[:20])
    names = base.vocabulary
    tied = config.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    if tied is False and not names.head:
        raise BaseModelError(
            f"{base.folder}: config.json says tie_word_embeddings false, and there is no lm_head.weight",
            hint="save the model with its head, or set tie_word_embeddings to true if the embedding is the head",
        )
    for name in names.names:
        tensor = tensors[name]
        if tensor.shape[0] != base.vocab_size:
            raise BaseModelError(
                f"{base.folder}: {name} has {tensor.shape[0]} rows; config.json says vocab_size {base.vocab_size}"
            )
        if tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            raise BaseModelError(
                f"{base.folder}: {name} is {tensor.dtype} {list(tensor.shape)}; control tokens need rows of floats",
                hint="quantise the base without its embedding and lm_head",
            )
    if base.tokenizer.size > base.vocab_size + _MOST_MISSING_ROWS:
        raise BaseModelError(
            f"{base.folder}: tokenizer.json has ids up to {base.tokenizer.size - 1}, the model {base.vocab_size} rows"
        )
    if not base.linears:
        raise BaseModelError(f"{base.folder}: holds no linear (a 2-D weight in a numbered layer) for adapters")


def _missing_layers(tensors: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """Layers that are not there, and tensors that a layer lacks and all others of its type have."""
    layers: dict[int, set[str]] = {}
    heads: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is not None:
            heads[".".join(parts[:at])] = heads.get(".".join(parts[:at]), 0) + 1
    if not heads:
        return ["every layer"]
    stem = max(heads, key=lambda head: heads[head])
    for name in tensors:
        if name.startswith(stem + "."):
            number, _, rest = name[len(stem) + 1 :].partition(".")
            if number.isdecimal():
                layers.setdefault(int(number), set()).add(rest)
    count = config["num_hidden_layers"]
    absent = [f"{stem}.{i}" for i in range(count) if i not in layers]
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) < count:
        kinds = [""] * count
    for kind in dict.fromkeys(kinds[:count]):
        alike = [i for i in range(count) if kinds[i] == kind and i in layers]
        whole = max((layers[i] for i in alike), key=len, default=set())
        short = [i for i in alike if layers[i] < whole]
        if len(short) <= max(1, len(alike) // 4):  # more of them: a second sort of layer
            absent += [f"{stem}.{i}.{rest}" for i in short for rest in sorted(whole - layers[i], key=natural)]
    return absent


def _missing_norms(tensors: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """A decoder whose config has an epsilon for norms has norms, in its layers and at its end."""
    if not any(config.get(key) is not None for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")):
        return []
    norms = [name for name in tensors if "norm" in name.lower() or ".ln_" in name]
    inside = any(any(part.isdecimal() for part in name.split(".")) for name in norms)
    outside = any(not any(part.isdecimal() for part in name.split(".")) for name in norms)
    return [*([] if inside else ["the norms of its layers"]), *([] if outside else ["the norm after the last layer"])]
