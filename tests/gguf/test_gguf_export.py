"""The exported file, read by the gguf package, has the checkpoint's contents."""

import json
import re
import shutil
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import edit_json, make_adapter, make_base
from gguf import GGUFReader, GGUFWriter, TokenType, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from granite_switch import compose
from granite_switch.core.border import read_json
from granite_switch.core.layout import AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import CheckpointError, OutputError, SwitchError
from granite_switch.gguf import export, prepare, write
from granite_switch.gguf.dialects import linear, read_decoder
from granite_switch.gguf.inspect import describe
from granite_switch.gguf.vocabulary import vocabulary


def read(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors as float32, shaped as torch has them."""
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors, read by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: t.float().numpy() for file in files for name, t in load_file(file).items()}


def halves(rows: np.ndarray, head: int) -> np.ndarray:
    """Undo the rotary order row by row: of a head's rows, first all even ones, then all odd ones."""
    order = [start + i for start in range(0, len(rows), head) for i in (*range(0, head, 2), *range(1, head, 2))]
    return rows[order]


def unpacked(path: Path, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The file's tensors under the checkpoint's names, rotary order undone, and the values that must be zero."""
    config = read_json(folder / "config.json")
    spec, decoder = SwitchSpec.from_dict(config["switch"]), read_decoder(config, "granite")[0]
    sizes, tensors, result, zeros = decoder.sizes, read(path), {}, {}
    result["model.embed_tokens.weight"] = tensors["token_embd.weight"]
    if "output.weight" in tensors:
        result["lm_head.weight"] = tensors["output.weight"]
    result["model.norm.weight"] = tensors["output_norm.weight"]
    for i in range(decoder.layers):
        layer = f"model.layers.{i}"
        result[f"{layer}.input_layernorm.weight"] = tensors[f"blk.{i}.attn_norm.weight"]
        result[f"{layer}.post_attention_layernorm.weight"] = tensors[f"blk.{i}.ffn_norm.weight"]
        cuts = np.cumsum([sizes["query"], sizes["key"]])
        q, k, v = np.split(tensors[f"blk.{i}.attn_qkv.weight"], cuts)
        weights = {"attn_q": halves(q, decoder.head), "attn_k": halves(k, decoder.head), "attn_v": v}
        for row in decoder.rows:
            weight = weights[row.stem] if row.stem in weights else tensors[f"blk.{i}.{row.stem}.weight"]
            path_ = linear(i, row)
            result[f"{path_}.weight"] = weight
            stacks = {m: tensors[f"blk.{i}.{row.stem}.lora_{m.lower()}"] for m in "AB"}
            for slot in range(len(spec.active) + 1):
                a, b = stacks["A"][slot], stacks["B"][slot]
                if row.stem in ("attn_q", "attn_k"):
                    b = halves(b, decoder.head)
                rank = spec.active[slot - 1].ranks.get(path_, 0) if slot else 0
                zeros[f"{path_}.{slot}"] = np.concatenate([a[rank:].ravel(), b[:, rank:].ravel()])
                if rank:
                    scale, name = spec.active[slot - 1].scale_of(path_), spec.active[slot - 1].name
                    result[AdapterTensor(name, path_, "A").key] = a[:rank]
                    result[AdapterTensor(name, path_, "B").key] = b[:, :rank] / np.float32(scale)
    return result, zeros


@pytest.mark.parametrize("which", ["model", "wide"])
def test_every_tensor_reads_back(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    export(folder, tmp_path / "f32.gguf", outtype="f32")
    found, zeros = unpacked(tmp_path / "f32.gguf", folder)
    wanted = checkpoint(folder)
    assert found.keys() == wanted.keys()
    head = "lm_head.weight" if which == "wide" else "model.embed_tokens.weight"
    spec = SwitchSpec.from_dict(read_json(folder / "config.json")["switch"])
    controls = sorted(spec.suppressed)
    assert {*spec.control_slots, len(wanted[head]) - 1} < {*controls}
    assert not found[head][controls].any()
    assert wanted[head][controls].any(axis=1).all()
    found[head] = found[head].copy()
    found[head][controls] = wanted[head][controls]
    for name, value in wanted.items():
        if name.endswith("-B"):  # multiplied and divided by its scaling
            np.testing.assert_allclose(found[name], value, rtol=3e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert not any(value.any() for value in zeros.values())


def test_control_tokens_keep_their_rows_where_they_may_be_generated(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    switch = read_json(model / "config.json")["switch"]
    edit_json(tmp_path / "model" / "config.json", switch={**switch, "generatable": True})
    export(tmp_path / "model", tmp_path / "out.gguf")
    found, wanted = read(tmp_path / "out.gguf")["token_embd.weight"], checkpoint(model)["model.embed_tokens.weight"]
    last = len(wanted) - switch["reserved"]
    np.testing.assert_array_equal(found[:last], wanted[:last])
    assert keys(tmp_path / "out.gguf")["tokenizer.ggml.suppress_tokens"] == list(range(last, len(wanted)))


@pytest.mark.parametrize(("outtype", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)])
def test_smaller_types_stay_within_their_error(
    model: Path, exported: Path, tmp_path: Path, outtype: str, error: float
) -> None:
    plan = export(model, tmp_path / "out.gguf", outtype=outtype)
    assert (tmp_path / "out.gguf").stat().st_size < 0.7 * exported.stat().st_size
    exact, found = read(exported), read(tmp_path / "out.gguf")
    kinds = {t.name: t.type.name for t in plan.targets}
    assert found.keys() == exact.keys()
    for name, values in exact.items():
        if name.endswith("norm.weight"):
            assert kinds[name] == "F32"
        elif outtype == "q8_0" and values.shape[-1] % 32:
            assert kinds[name] == "F16"
        else:
            assert kinds[name] == outtype.upper()
        largest = np.abs(values).max(axis=-1, keepdims=True)
        assert (np.abs(found[name] - values) <= error * largest + 1e-7).all(), name


def test_bfloat16_passes_through_unchanged(make_model: Any, tmp_path: Path) -> None:
    folder = make_model(dtype=torch.bfloat16)
    assert export(folder, tmp_path / "out.gguf").outtype == "bf16"
    found, _ = unpacked(tmp_path / "out.gguf", folder)
    for name, value in checkpoint(folder).items():
        if "_lora." not in name and "embed" not in name:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_keys(wide: Path, tmp_path: Path) -> None:
    export(wide, tmp_path / "out.gguf")
    found, config = keys(tmp_path / "out.gguf"), read_json(wide / "config.json")
    spec = SwitchSpec.from_dict(config["switch"])
    expected = {
        "general.architecture": "graniteswitch",
        "graniteswitch.block_count": 2,
        "graniteswitch.context_length": 32768,
        "graniteswitch.embedding_length": 64,
        "graniteswitch.feed_forward_length": 96,
        "graniteswitch.attention.head_count": 4,
        "graniteswitch.attention.head_count_kv": 1,
        "graniteswitch.attention.key_length": 32,
        "graniteswitch.attention.value_length": 32,
        "graniteswitch.rope.dimension_count": 32,
        "graniteswitch.rope.freq_base": 10000.0,
        "graniteswitch.attention.scale": 0.2,
        "graniteswitch.embedding_scale": 6.0,
        "graniteswitch.residual_scale": 0.5,
        "graniteswitch.logit_scale": 4.0,
        "graniteswitch.adapters.count": 3,
        "graniteswitch.adapters.lora_rank": 8,
        "graniteswitch.adapters.token_ids_activate": [a.token_id for a in spec.adapters],
        "graniteswitch.adapters.token_ids_substitute": [a.substitute_token_id for a in spec.adapters],
        "granite_switch.adapters.names": ["check", "cite", "rewrite"],
        "granite_switch.adapters.technologies": ["lora", "alora", "alora"],
        "granite_switch.adapters.ranks": [8, 3, 5],
        "granite_switch.adapters.io_configs": [(wide / "io_configs/check/io.yaml").read_text(), "", ""],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (wide / "chat_template.jinja").read_bytes().decode(),
        "tokenizer.ggml.suppress_tokens": [
            *range(min(spec.control_slots), read_json(wide / "config.json")["vocab_size"])
        ],
    }
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert SwitchSpec.from_dict(json.loads(found["granite_switch.switch"])) == spec
    assert spec.base_token_id not in found["graniteswitch.adapters.token_ids_activate"]


def test_tokens(model: Path, exported: Path) -> None:
    found, config = keys(exported), read_json(model / "config.json")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config["vocab_size"]
    added = tokenizer.get_added_tokens_decoder()
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        assert text == tokenizer.id_to_token(i)
        assert kind == (TokenType.CONTROL if i in added else TokenType.NORMAL)
    spec = SwitchSpec.from_dict(config["switch"])
    assert [tokens[a.token_id] for a in spec.adapters] == ["<|check|>", "<|cite|>", "<|rewrite|>"]
    merges = read_json(model / "tokenizer.json")["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_added_tokens_that_are_not_special_and_rows_without_a_token(model: Path) -> None:
    tokenizer = read_tokenizer(model)
    data = {**tokenizer.data, "added_tokens": [dict(token) for token in tokenizer.data["added_tokens"]]}
    data["added_tokens"][4]["special"] = False
    spec = SwitchSpec.from_dict(read_json(model / "config.json")["switch"])
    words, problems, warnings = vocabulary(replace(tokenizer, data=data), tokenizer.size + 2, spec)
    assert (problems, warnings) == ([], [])
    assert words.types[4] == TokenType.USER_DEFINED
    assert words.tokens[-2:] == [f"[PAD{tokenizer.size}]", f"[PAD{tokenizer.size + 1}]"]
    assert words.types[-2:] == [TokenType.UNUSED] * 2


def test_tokenizers_that_llama_cpp_lacks(model: Path) -> None:
    tokenizer = read_tokenizer(model)
    spec = SwitchSpec.from_dict(read_json(model / "config.json")["switch"])

    def problems(**changes: Any) -> list[str]:
        return vocabulary(replace(tokenizer, data={**tokenizer.data, **changes}), tokenizer.size + 1, spec)[1]

    pieces = json.loads(Tokenizer(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str())["model"]
    assert any("the tokenizer is WordPiece" in line for line in problems(model=pieces))
    metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    assert any("with decoder Metaspace" in line for line in problems(decoder=metaspace))
    text = f"[PAD{tokenizer.size}]"  # the name of the last row, which has no token
    added = [{**t, "content": text if t["id"] == 4 else t["content"]} for t in tokenizer.data["added_tokens"]]
    model_data = tokenizer.data["model"]
    words = {text if i == 4 else word: i for word, i in model_data["vocab"].items()}
    assert f"two tokens have the text {text!r}" in problems(added_tokens=added, model={**model_data, "vocab": words})


def test_the_same_bytes_twice(model: Path, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere")
    export(tmp_path / "elsewhere", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == exported.read_bytes()


def test_the_file_appears_whole_or_not_at_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(count: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        export(model, tmp_path / "out.gguf", progress=fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        export(model, tmp_path / "out.gguf")
    calls: list[tuple[int, int]] = []
    plan = export(model, tmp_path / "out.gguf", force=True, progress=lambda *call: calls.append(call))
    assert sum(count for count, _ in calls) == plan.nbytes
    assert {total for _, total in calls} == {plan.nbytes}
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layers=12, hidden=256, mlp=1024)
    make_adapter(tmp_path / "one", base, targets=("q_proj",))
    compose(base, [tmp_path / "one"], tmp_path / "model")
    plan = prepare(tmp_path / "model")
    largest = max(target.nbytes for target in plan.targets)
    assert plan.nbytes > 20 * largest
    tracemalloc.start()
    write(plan, tmp_path / "out.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * largest


def change(folder: Path, target: Path, config: Mapping[str, Any]) -> Path:
    shutil.copytree(folder, target)
    edit_json(target / "config.json", **config)
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias True: .*\n.*mlp_bias True: "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight: missing"),
        ({"num_hidden_layers": 1}, r"check: llama\.cpp's architecture has no adapters on model\.layers\.1\."),
        ({"intermediate_size": 64}, "but config.json says"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_do_is_refused(
    model: Path, tmp_path: Path, config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match="model cannot be exported") as caught:
        prepare(change(model, tmp_path / "model", config))
    assert re.search(message, str(caught.value))


def test_tokens_that_the_engine_would_take_without_a_word(model: Path, tmp_path: Path) -> None:
    switch = read_json(model / "config.json")["switch"]
    first, second, third = switch["adapters"]
    wrong = [{**first, "substitute_token_id": 5000}, {**second, "token_id": 6000}, third]
    with pytest.raises(CheckpointError) as caught:
        prepare(change(model, tmp_path / "a", {"switch": {**switch, "adapters": wrong}}))
    assert "check: substitute 5000 is not in the vocabulary" in str(caught.value)
    assert "cite: control token 6000 is not in the vocabulary" in str(caught.value)
    swapped = [{**first, "token_id": second["token_id"]}, {**second, "token_id": first["token_id"]}, third]
    with pytest.raises(CheckpointError, match=r"'<\|check\|>' is token"):
        prepare(change(model, tmp_path / "b", {"switch": {**switch, "adapters": swapped}}))
    retired = [{**record, "retired": True} for record in switch["adapters"]]
    with pytest.raises(CheckpointError, match="it has no adapters"):
        prepare(change(model, tmp_path / "c", {"switch": {**switch, "adapters": retired}}))


def test_what_is_no_composed_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a composed model"):
        prepare(base)
    with pytest.raises(CheckpointError, match="no such file"):
        prepare(tmp_path)


def test_tensors_that_the_architecture_lacks(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("model-*.safetensors")
    save_file({**load_file(path), "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, path)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias: llama\.cpp's architecture has no such tensor"):
        prepare(tmp_path / "model")


@pytest.mark.parametrize("file", ["model-0*", "adapter-check*"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_values_that_are_not_finite(model: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = next((tmp_path / "model").glob(f"{file}.safetensors"))
    tensors = load_file(path)
    next(t for name, t in tensors.items() if t.ndim == 2 and not name.endswith("-A"))[1, 2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has NaN or infinite values"):
        export(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_values_beyond_float16(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("model-*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight: values overflow float16"):
        export(tmp_path / "model", tmp_path / "out.gguf", outtype="f16")
    assert not (tmp_path / "out.gguf").exists()
    export(tmp_path / "model", tmp_path / "out.gguf", outtype="bf16")


def test_a_retired_adapter_leaves_no_slot(model: Path, tmp_path: Path) -> None:
    switch = read_json(model / "config.json")["switch"]
    adapters = [{**a, "retired": a["name"] == "check"} for a in switch["adapters"]]
    folder = change(model, tmp_path / "model", {"switch": {**switch, "adapters": adapters}})
    (folder / "adapter-check.safetensors").unlink()
    index = read_json(folder / "model.safetensors.index.json")
    weight_map = {k: v for k, v in index["weight_map"].items() if v != "adapter-check.safetensors"}
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    export(folder, tmp_path / "out.gguf")
    found = keys(tmp_path / "out.gguf")
    assert found["granite_switch.adapters.names"] == ["cite", "rewrite"]
    assert found["graniteswitch.adapters.lora_rank"] == 5
    assert read(tmp_path / "out.gguf")["blk.0.attn_k.lora_a"].shape == (3, 5, 64)


def test_describe(model: Path, exported: Path, tmp_path: Path) -> None:
    found = describe(exported)
    assert (found["outtype"], found["pre_tokenizer"], found["layers"], found["lora_rank"]) == ("f32", "gpt-2", 2, 8)
    check, _, rewrite = found["adapters"]
    assert (check["name"], check["technology"], check["rank"], check["control_token"]) == (
        "check",
        "lora",
        8,
        "<|check|>",
    )
    assert check["io_config"].startswith("model: null")
    assert (rewrite["invocation_text"], rewrite["substitute"]) == ("<rewrite>", "<")
    json.dumps(found)
    (tmp_path / "text").write_text("no GGUF")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        describe(tmp_path / "text")
    (tmp_path / "short").write_bytes(exported.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="truncated"):
        describe(tmp_path / "short")


def test_describe_what_is_damaged(exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    key = b"graniteswitch.adapters.token_ids_activate"
    at = data.index(key) + len(key) + 8  # behind the types of the array and of its elements
    (tmp_path / "long").write_bytes(data[:at] + (1 << 60).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(CheckpointError, match="it ends before byte"):
        describe(tmp_path / "long")
    writer = GGUFWriter(tmp_path / "wrong", "graniteswitch")
    writer.add_string("graniteswitch.block_count", "two")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path / "wrong")
    assert "graniteswitch.block_count must be a number" in "".join(caught.value.problems)
    for old, new, message in (
        (b'"format_version": 1', b'"format_version": 7', r"granite_switch\.switch: .*format 7"),
        (b"granite_switch.adapters.ranks", b"granite_switch.adapters.xanks", "contradict each other"),
    ):
        assert data.count(old) == 1
        (tmp_path / "other").write_bytes(data.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            describe(tmp_path / "other")


def test_unknown_outtype_fails_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SwitchError, match="q4_0"):
        export(model, tmp_path / "out.gguf", outtype="q4_0")
