"""Determine how transformers reads a base's tokenizer, and write that into the tokenizer's files.

Since release 5, `AutoTokenizer` uses all of `tokenizer.json` for some values of `model_type` and `tokenizer_class`; for
others it uses only the vocabulary and rebuilds normalizer, pre-tokenizer and decoder for the named class. A composed
folder has its own `model_type`, so it would be read differently from its base. Here the result for the base becomes
explicit: `tokenizer.json` gets the parts and tokens that the base is read with, and `tokenizer_class` names the class.
The rules are those of transformers 5.16 to 5.24; `granite_switch.autotokenizer` proves them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from granite_switch.core.border import checked, read_json
from granite_switch.core.files import inside
from granite_switch.core.tokenizer import SPECIALS, BaseTokenizer, read_tokenizer, token_text
from granite_switch.core.tokenizer_records import TokenizerConfig
from granite_switch.errors import BaseModelError

_WHOLE = "TokenizersBackend"  # the class that uses tokenizer.json unchanged

# registered tokenizer classes by `model_type`, for decoders; other model types have none
_REGISTERED = {
    **dict.fromkeys(
        [
            "arctic",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_v4",
            "ernie4_5",
            "ernie4_5_moe",
            "flex_olmo",
            "glm",
            "glm4",
            "glm4_moe",
            "glm4_moe_lite",
            "gpt_bigcode",
            "granite",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "hyperclovax",
            "internlm2",
            "internlm3",
            "iquestcoder",
            "jamba",
            "kimi_linear",
            "mimo_v2_flash",
            "minicpm3",
            "minimax_m2",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "modernbert-decoder",
            "nemotron",
            "olmo2",
            "olmo3",
            "olmo_hybrid",
            "persimmon",
            "phi3",
            "phimoe",
            "stablelm",
        ],
        _WHOLE,
    ),
    **dict.fromkeys(
        ["codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi", "starcoder2"], "GPT2Tokenizer"
    ),
    **dict.fromkeys(
        ["falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv", "xlstm"], "GPTNeoXTokenizer"
    ),
    **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"], "Qwen2Tokenizer"),
    **dict.fromkeys(["qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp"], "Qwen3_5Tokenizer"),
    **dict.fromkeys(
        ["gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma", "zaya"],
        "GemmaTokenizer",
    ),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
}
# model types whose registered class overrides the one that tokenizer_config.json names
_FORCED = {"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"}
_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
_AS_FILE = {_WHOLE, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer"}

# for config.json: if `granite_switch` is not registered, transformers looks there for an object with an empty
# `model_type` before it warns about an unknown one
UNREGISTERED = {"unregistered": {"model_type": ""}}

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class _Rebuilt:
    """The parts of tokenizer.json that a tokenizer class replaces: its `__init__` in transformers, as data."""

    defaults: Settings  # special tokens for keys that tokenizer_config.json lacks
    model: Callable[[Settings], Settings]  # settings of the BPE model
    splitting: Callable[[Settings], Settings]  # normalizer, pre_tokenizer, decoder
    plain_specials: bool = False  # whether special tokens are added again without their flags
    post_processor: bool = True  # whether tokenizer.json's is kept


def read_as_base(folder: Path, config: Settings) -> BaseTokenizer:
    """Read a base's tokenizer as transformers does.

    Args:
        folder: the base's folder.
        config: the base's config.json.

    Raises:
        BaseModelError: reading the tokenizer needs the base's own code, or transformers, which is not installed.
    """
    return as_read(joined(read_tokenizer(folder), folder), config, folder)


def joined(tokenizer: BaseTokenizer, folder: Path) -> BaseTokenizer:
    """Merge special_tokens_map.json into a tokenizer's config if transformers reads that file."""
    settings = dict(tokenizer.config)
    extra = settings.pop("additional_special_tokens", None)
    if extra and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = extra
    path = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and path.is_file():
        more = read_json(inside(folder, path.name))
        checked(TokenizerConfig, more, path, BaseModelError)
        for key, value in more.items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                settings["extra_special_tokens"] = _merged(settings.get("extra_special_tokens") or [], value)
            else:
                settings[key] = {**value, "__type": "AddedToken", "special": True} if isinstance(value, dict) else value
    return replace(tokenizer, config=settings)


def as_read(tokenizer: BaseTokenizer, config: Settings, folder: Path) -> BaseTokenizer:
    """Return a tokenizer whose files state how transformers reads them together with this config.json."""
    effective, written = _classes(tokenizer, config, folder)
    rebuilt = _REBUILT.get(effective)
    settings = _settings(tokenizer, rebuilt)
    data = {**tokenizer.data, "truncation": None, "padding": None}
    if rebuilt:
        data |= _pipeline(rebuilt, data, settings, effective, folder)
    data["added_tokens"] = _added_tokens(data, settings, rebuilt)
    specials = {key: token_text(settings[key]) for key in SPECIALS if settings.get(key)}
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    return replace(tokenizer, data=data, config={**settings, "tokenizer_class": written}, special_tokens=specials)


def _classes(tokenizer: BaseTokenizer, config: Settings, folder: Path) -> tuple[str, str]:
    """Return the class that transformers reads the base's tokenizer as, and the class to write for the composed one."""
    kind = config.get("model_type")
    declared = tokenizer.config.get("tokenizer_class") or config.get("tokenizer_class")
    registered = _REGISTERED.get(str(kind))
    plain = declared.removesuffix("Fast") if declared else registered or _WHOLE
    if tokenizer.config.get("auto_map") and registered != _WHOLE:
        raise BaseModelError(
            f"{folder / 'tokenizer_config.json'}: auto_map: the base's tokenizer needs its own code",
            hint="load it with transformers and trust_remote_code=True, and save a plain one with save_pretrained",
        )
    if tokenizer.config.get("fix_mistral_regex"):
        raise BaseModelError(
            f"{folder / 'tokenizer_config.json'}: fix_mistral_regex is not supported",
            hint="load the tokenizer with transformers, save it into the base with save_pretrained and remove the key",
        )
    if registered == _WHOLE or (kind in _FORCED and registered):
        return registered, registered
    if plain == "LlamaTokenizer" and '"ByteLevel"' in json.dumps(tokenizer.data):
        # releases without this rule rebuild it for both base and composed model, so the name is kept
        return _WHOLE, declared or _WHOLE
    if plain in _AS_FILE:
        return _WHOLE, _WHOLE
    if plain not in _REBUILT and not find_spec("transformers"):
        raise BaseModelError(
            f"{folder / 'tokenizer_config.json'}: it is not known how transformers reads tokenizer_class {declared}",
            hint="install transformers, so that composing can check it: pip install 'granite-switch[hf]'",
        )
    return plain, plain


def _settings(tokenizer: BaseTokenizer, rebuilt: _Rebuilt | None) -> dict[str, Any]:
    """Return tokenizer_config.json plus the settings that transformers reads from tokenizer.json."""
    settings = dict(tokenizer.config)
    if rebuilt:
        settings = {**rebuilt.defaults, **settings}
    if truncation := tokenizer.data.get("truncation"):
        settings.setdefault("truncation_side", str(truncation["direction"]).lower())
    if padding := tokenizer.data.get("padding"):
        settings.setdefault("pad_token", padding["pad_token"])
        settings.setdefault("padding_side", str(padding["direction"]).lower())
    return settings


def _merged(known: Any, more: Any) -> Any:
    if isinstance(known, dict) or isinstance(more, dict):
        return {**(known if isinstance(known, dict) else {}), **(more if isinstance(more, dict) else {})} or known
    return [*known, *(token for token in more if token not in known)]


def _pipeline(rebuilt: _Rebuilt, data: Settings, settings: Settings, name: str, folder: Path) -> dict[str, Any]:
    """Return the parts of tokenizer.json that the class replaces."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise BaseModelError(
            f"{folder / 'tokenizer.json'}: a {model.get('type')} model cannot be read as {name}",
            hint="set tokenizer_class to the class that saved it, or to TokenizersBackend",
        )
    flags: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    flags |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    parts = {"model": {**flags, **rebuilt.model(settings), "vocab": model["vocab"], "merges": model["merges"]}}
    parts |= {key: _json(part) for key, part in rebuilt.splitting(settings).items()}
    return parts if rebuilt.post_processor else {**parts, "post_processor": None}


def _json(part: Any) -> Any:
    """Return a part of a tokenizer in the form of tokenizer.json."""
    return json.loads(part.__getstate__()) if part is not None else None


def _added_tokens(data: Settings, settings: Settings, rebuilt: _Rebuilt | None) -> list[Any]:
    """Return `added_tokens` of tokenizer.json after transformers has added the tokens named in the settings."""
    saved = [*data.get("added_tokens", ())]
    library = Tokenizer.from_str(json.dumps({**data, "added_tokens": [] if rebuilt else saved}))
    listed = _listed(settings, saved)
    there = {repr(token) for token in library.get_added_tokens_decoder().values()}
    by_text = {token.content: token for token in listed}
    named = [by_text.get(str(token_text(value)), _added(value)) for value in _named(settings)]
    new = [token for token in listed if repr(token) not in there]
    known = {token.content for token in [*library.get_added_tokens_decoder().values(), *new]}
    for token in [*named, *map(_added, _extra(settings))]:
        if token.content not in known:
            known.add(token.content)
            new.append(token)
    texts = {token.content for token in named}
    library.add_tokens([_special(token) if token.content in texts else token for token in new])
    if rebuilt and rebuilt.plain_specials:
        again = [*texts, *(_added(value).content for value in _extra(settings))]
        library.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(again)])
    once = {token["content"] for token in saved if token.get("special") and not rebuilt}  # decoding still skips them
    added: list[Any] = json.loads(library.to_str())["added_tokens"]
    return [{**token, "special": token["special"] or token["content"] in once} for token in added]


def _listed(settings: Settings, saved: Iterable[Settings]) -> list[AddedToken]:
    """Return the added tokens by id: those of tokenizer_config.json, or of tokenizer.json if it lists none."""
    listed = {int(index): token for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    if settings.get("added_tokens_decoder") is None:
        listed = {token["id"]: {key: flag for key, flag in token.items() if key != "id"} for token in saved}
    return [_added(listed[index]) for index in sorted(listed)]


def _named(settings: Settings) -> Iterator[Any]:
    """Yield the named special tokens in the order in which transformers adds them."""
    extra = settings.get("extra_special_tokens")
    yield from (settings[key] for key in SPECIALS if settings.get(key))
    own = [key for key in settings if key.endswith("_token") and key not in SPECIALS]
    for kind in (dict, str):
        yield from (settings[key] for key in own if isinstance(settings[key], kind))
    yield from extra.values() if isinstance(extra, dict) else ()


def _extra(settings: Settings) -> list[Any]:
    extra = settings.get("extra_special_tokens") or []
    return [] if isinstance(extra, dict) else extra


def _added(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(**{key: flag for key, flag in value.items() if key in _FLAGS})


def _special(token: AddedToken) -> AddedToken:
    flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return AddedToken(token.content, **flags, normalized=token.normalized, special=True)


def _gpt2(settings: Settings) -> Settings:
    prefix = settings.get("add_prefix_space", False)
    return {"normalizer": None, "pre_tokenizer": pre_tokenizers.ByteLevel(prefix), "decoder": decoders.ByteLevel()}


def _neox(settings: Settings) -> Settings:
    split = pre_tokenizers.ByteLevel(settings.get("add_prefix_space", False), settings.get("trim_offsets", True))
    return {"normalizer": normalizers.NFC(), "pre_tokenizer": split, "decoder": decoders.ByteLevel()}


def _qwen(pattern: str) -> Callable[[Settings], Settings]:
    def parts(settings: Settings) -> Settings:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(settings.get("add_prefix_space") or False, use_regex=False)
        pre = pre_tokenizers.Sequence([split, level])
        return {"normalizer": normalizers.NFC(), "pre_tokenizer": pre, "decoder": decoders.ByteLevel()}

    return parts


def _llama(settings: Settings) -> Settings:
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = "never" if not prefix else "always" if settings.get("legacy", False) else "first"
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoding += [decoders.Strip(content=" ", left=1)] if prefix else []
    split = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    return {"normalizer": None, "pre_tokenizer": split, "decoder": decoders.Sequence(decoding)}


def _gemma(settings: Settings) -> Settings:
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return {
        "normalizer": normalizers.Replace(" ", "▁"),
        "pre_tokenizer": split,
        "decoder": decoders.Sequence(decoding),
    }


def _byte_level(settings: Settings) -> Settings:
    return {"continuing_subword_prefix": "", "end_of_word_suffix": ""}


_END = "<|endoftext|>"
# contractions, then words with a leading character, then digits one by one, punctuation, newlines, spaces
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_QWEN2 = _WORDS + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN3_5 = _WORDS + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = {"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END}

_REBUILT = {
    "GPT2Tokenizer": _Rebuilt(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None}, _byte_level, _gpt2
    ),
    "GPTNeoXTokenizer": _Rebuilt(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
        _byte_level,
        _neox,
        post_processor=False,
    ),
    "LlamaTokenizer": _Rebuilt(
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        lambda settings: {"fuse_unk": True, "byte_fallback": True},
        _llama,
    ),
    "Qwen2Tokenizer": _Rebuilt(_QWEN, _byte_level, _qwen(_QWEN2), plain_specials=True),
    "Qwen3_5Tokenizer": _Rebuilt(_QWEN, _byte_level, _qwen(_QWEN3_5)),
    "GemmaTokenizer": _Rebuilt(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        lambda settings: {"unk_token": token_text(settings["unk_token"]), "fuse_unk": True, "byte_fallback": True},
        _gemma,
    ),
}
