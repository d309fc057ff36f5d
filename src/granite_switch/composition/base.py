"""Read a base model and check that it can carry adapters."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from granite_switch.composition.reading import read_as_base
from granite_switch.core.border import shown
from granite_switch.core.checkpoint import Checkpoint
from granite_switch.core.files import inside
from granite_switch.core.layout import Vocabulary, at_layer, decoder_config, layer_count, natural, vocabulary
from granite_switch.core.linears import linears
from granite_switch.core.packed import FLOATS, WAY_OUT, Shape, plain_name, refused
from granite_switch.core.records import read_config
from granite_switch.core.spec import MODEL_TYPE
from granite_switch.core.tokenizer import BaseTokenizer
from granite_switch.errors import BaseModelError, CheckpointError

_MAX_MISSING_ROWS = 65536  # tokens without a row in the embedding; composing adds the rows
_NORM = re.compile(r"norm|\.ln(?:\d?\.|_)", re.IGNORECASE)
_EPSILONS = ("rms_norm_eps", "layer_norm_eps")
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass(frozen=True)
class Base:
    """A checked base model that can carry adapters."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    tokenizer: BaseTokenizer

    @cached_property
    def linears(self) -> dict[str, Shape]:
        """The shape (out, in) of each linear that adapters can target, by path."""
        try:
            return linears(self.checkpoint.tensors, self.config)
        except CheckpointError as error:
            raise BaseModelError(f"{self.folder}: {error.message}", problems=error.problems, hint=error.hint) from None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The names of the tensors with one row for each token."""
        found = vocabulary(self.checkpoint.tensors, self.vocab_size)
        if not found:
            raise BaseModelError(f"{self.folder}: has no token embedding of {self.vocab_size} rows")
        return found

    @property
    def vocab_size(self) -> int:
        return int(decoder_config(self.config)["vocab_size"])

    @property
    def lacks_norms(self) -> bool:
        """Whether config.json has an epsilon for norms of which no weight is there; some bases' norms have none."""
        epsilon = any(decoder_config(self.config).get(key) is not None for key in _EPSILONS)
        return epsilon and not any(map(_NORM.search, self.checkpoint.tensors))

    @property
    def layers(self) -> int:
        return layer_count(decoder_config(self.config))

    @property
    def architecture(self) -> str:
        """The model class in transformers and vLLM."""
        return str(self.config["architectures"][0])

    @property
    def size(self) -> int:
        """The first token id that the base does not use; padding rows count as used."""
        rows = self.checkpoint[self.vocabulary.embedding].shape[0]
        return max(self.tokenizer.size, rows, self.vocab_size)


def resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a config.json with another vocabulary size."""
    inner, size = decoder_config(config), {"vocab_size": rows}
    return {**config, **(size if inner is config else {"text_config": {**inner, **size}})}


def read_base(folder: Path) -> Base:
    """Read a base model and check that it can carry adapters.

    Raises:
        BaseModelError: lists everything that is missing.
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
    """Read the base's config.json and check that it is of a decoder that can carry adapters."""
    where = inside(folder, "config.json")
    config = read_config(where, BaseModelError, "a base is a model that transformers can load, with a config.json")
    if config["model_type"] == MODEL_TYPE:
        raise BaseModelError(
            f"{where}: model_type {MODEL_TYPE!r} cannot carry adapters",
            hint="it is already composed; `granite-switch add` adds more adapters",
        )
    if config.get("is_encoder_decoder"):
        raise BaseModelError(f"{where}: is_encoder_decoder: only decoders can carry adapters")
    names = config.get("architectures")
    if not names or not names[0].endswith(_CAUSAL):
        raise BaseModelError(
            f"{where}: architectures {shown(names)} does not name a language model",
            hint=f"the class must end in {', '.join(_CAUSAL)}; save the model with its language-model head",
        )
    if quantisation := refused(config):
        raise BaseModelError(f"{where}: {quantisation}: adapters are not supported on it", hint=WAY_OUT)
    return config


def check_base(base: Base) -> None:
    """Check that the layers are complete and that rows can be added to the embedding."""
    tensors, config = base.checkpoint.tensors, decoder_config(base.config)
    quantised = base.config.get("quantization_config")  # some linears may still be unquantised
    names_there = dict.fromkeys(map(plain_name, tensors) if quantised else tensors)
    if missing := [*_missing_layers(names_there, config), *_missing_norms(names_there, config)]:
        raise BaseModelError(f"{base.folder}: its weights lack tensors that its config implies", problems=missing[:20])
    names = base.vocabulary
    tied = config.get("tie_word_embeddings", base.config.get("tie_word_embeddings"))
    if tied is False and not names.head:
        raise BaseModelError(
            f"{base.folder}: config.json says tie_word_embeddings false, but there is no lm_head.weight",
            hint="save the model with its head, or set tie_word_embeddings to true if the embedding is the head",
        )
    for name in names.names:
        tensor = tensors[name]
        if tensor.shape[0] != base.vocab_size:
            raise BaseModelError(
                f"{base.folder}: {name} has {tensor.shape[0]} rows; config.json says vocab_size {base.vocab_size}"
            )
        if tensor.dtype not in FLOATS:
            raise BaseModelError(
                f"{base.folder}: {name} is {tensor.dtype} {list(tensor.shape)}; control tokens need float rows",
                hint="quantise the base without its embedding and lm_head",
            )
    if base.tokenizer.size > base.vocab_size + _MAX_MISSING_ROWS:
        raise BaseModelError(
            f"{base.folder}: tokenizer.json has ids up to {base.tokenizer.size - 1}, the model {base.vocab_size} rows"
        )
    if not base.linears:
        raise BaseModelError(f"{base.folder}: has no linear (a 2-D weight in a numbered layer) for adapters to target")


def _missing_layers(tensors: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """Return missing layers, and tensors that a layer lacks but the others of its type have."""
    numbered = [parts for parts in map(at_layer, tensors) if parts[1]]
    if not numbered:
        return ["every layer"]
    [(stem, _)] = Counter(head for head, _, _ in numbered).most_common(1)
    layers: dict[int, set[str]] = {}
    for head, number, rest in numbered:
        if head == stem:
            layers.setdefault(int(number), set()).add(rest)
    count = layer_count(config)
    absent = [f"{stem}.{i}" for i in range(count) if i not in layers]
    kinds = config.get("layer_types")  # some first layers lack a norm, as ModernBERT's
    if not isinstance(kinds, list) or len(kinds) < count:
        kinds = [""] * count
    for kind in dict.fromkeys(kinds[:count]):
        alike = [i for i in range(count) if kinds[i] == kind and i in layers]
        whole = max((layers[i] for i in alike), key=len, default=set())
        short = [i for i in alike if layers[i] < whole and (i or not all(map(_NORM.search, whole - layers[i])))]
        if len(short) <= max(1, len(alike) // 4):  # if more lack tensors, they are another type of layer
            absent += [f"{stem}.{i}.{rest}" for i in short for rest in sorted(whole - layers[i], key=natural)]
    return absent


def _missing_norms(tensors: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """Return missing norms: weights in the layers' norms imply a norm after the last layer, and the other way round."""
    if not any(config.get(key) is not None for key in _EPSILONS):
        return []
    found = {bool(at_layer(name)[1]) for name in tensors if _NORM.search(name)}
    names = {True: "the norms of its layers", False: "the norm after the last layer"}
    return [name for in_layer, name in names.items() if found and in_layer not in found]
