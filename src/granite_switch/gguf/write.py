"""Stream a planned export to a GGUF file: llama.cpp's keys, our own keys, and the tensors piece by piece."""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter, LlamaFileType

from granite_switch.core.progress import Progress
from granite_switch.gguf.plan import Plan
from granite_switch.gguf.tensors import max_rank
from granite_switch.gguf.vocabulary import Vocabulary

ARCH = "graniteswitch"
ROUTER_GAIN = 15.0  # llama.cpp's default: any other token has e^-30 of the control token's weight
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def write(plan: Plan, path: Path, progress: Progress | None = None) -> None:
    """Write the file.

    Args:
        plan: the export.
        path: the file, which is replaced if it exists.
        progress: called for each piece that is written.
    """
    writer = GGUFWriter(path, ARCH)
    _general(writer, plan)
    _hyperparameters(writer, plan)
    _tokenizer(writer, plan)
    _own_keys(writer, plan)
    for target in plan.targets:
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), target.nbytes, target.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = plan.nbytes
    assert writer.fout is not None
    (file,) = writer.fout
    try:
        for target in plan.targets:
            writer.write_padding(file, file.tell())
            for data in target.encoded():
                file.write(data)
                if progress:
                    progress(len(data), total)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _general(writer: GGUFWriter, plan: Plan) -> None:
    writer.add_type("model")
    writer.add_name(f"{plan.spec.base_model or 'Granite'} with {len(plan.spec.active)} adapters")
    writer.add_file_type(_FILE_TYPES[plan.outtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _hyperparameters(writer: GGUFWriter, plan: Plan) -> None:
    decoder, spec = plan.decoder, plan.spec
    writer.add_block_count(decoder.layers)
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_feed_forward_length(decoder.mlp)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head)
    writer.add_value_length(decoder.head)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_layer_norm_rms_eps(decoder.epsilon)
    writer.add_rope_dimension_count(decoder.head)
    writer.add_rope_freq_base(decoder.rope_theta)
    for key, value in decoder.rope_scaling.items():
        kind = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}[type(value)]
        writer.add_key_value(f"{ARCH}.rope.scaling.{key}", value, kind)
    if not decoder.positions:
        writer.add_bool(f"{ARCH}.rope.scaling.finetuned", False)  # tells the engine not to rotate
    writer.add_attention_scale(decoder.attention_scale)
    writer.add_embedding_scale(decoder.embedding_scale)
    writer.add_residual_scale(decoder.residual_scale)
    writer.add_logit_scale(decoder.logit_scale)
    writer.add_uint32(f"{ARCH}.adapters.count", len(spec.active))
    writer.add_uint32(f"{ARCH}.adapters.lora_rank", max_rank(spec))
    writer.add_array(f"{ARCH}.adapters.token_ids_activate", [a.token_id for a in spec.active])
    writer.add_array(f"{ARCH}.adapters.token_ids_substitute", [a.substitute_token_id for a in spec.active])
    writer.add_float32(f"{ARCH}.adapters.router_gain", ROUTER_GAIN)


def write_words(writer: GGUFWriter, words: Vocabulary, pre: str) -> None:
    """Write the tokenizer's keys."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_prefix)
    for name, index in words.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)


def _tokenizer(writer: GGUFWriter, plan: Plan) -> None:
    words = plan.vocabulary
    write_words(writer, words, plan.pre)
    if plan.spec.suppressed:
        writer.add_array("tokenizer.ggml.suppress_tokens", list(plan.spec.suppressed))
    if set(words.templates) == {"default"}:
        writer.add_chat_template(words.templates["default"])
    elif words.templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in words.templates.items()])


def _own_keys(writer: GGUFWriter, plan: Plan) -> None:
    """Write metadata that llama.cpp has no keys for and ignores."""
    adapters = plan.spec.active
    writer.add_string("granite_switch.switch", json.dumps(plan.spec.to_dict(), ensure_ascii=False, sort_keys=True))
    writer.add_array("granite_switch.adapters.names", [a.name for a in adapters])
    writer.add_array("granite_switch.adapters.technologies", [a.technology for a in adapters])
    writer.add_array("granite_switch.adapters.ranks", [max(a.ranks.values(), default=0) for a in adapters])
    writer.add_array("granite_switch.adapters.io_configs", [plan.io_configs[a.name] for a in adapters])
