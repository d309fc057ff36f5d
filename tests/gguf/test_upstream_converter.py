"""The same model through llama.cpp's own converter, which reads legacy format 2."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artefacts import edit_json
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from granite_switch.core.border import read_json
from granite_switch.core.layout import AdapterTensor
from granite_switch.core.spec import SwitchSpec
from granite_switch.gguf import OUTTYPES, export
from granite_switch.gguf.dialects import linear, read_decoder
from granite_switch.gguf.tensors import max_rank

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / ".cache" / "llama.cpp"
SAMPLE = ROOT.parent / "shared" / "data" / "legacy" / "g2"
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "shared_mlp.input_linear": ("gate_proj", "up_proj"),
    "shared_mlp.output_linear": ("down_proj",),
}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.is_dir(), reason="needs llama.cpp's converter: make test-gguf"),
]


def convert(folder: Path, output: Path) -> Path:
    """Run the converter for all types; writes <type>.gguf to `output`."""
    script = Path(__file__).parent / "upstream_converter.py"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(SOURCE), str(folder), str(output), *OUTTYPES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def in_the_old_layout(model: Path, target: Path) -> None:
    """Rewrite a composed model in legacy format 2: fused, stacked, padded, B scaled."""
    config = read_json(model / "config.json")
    spec, decoder = SwitchSpec.from_dict(config["switch"]), read_decoder(config, "granite")[0]
    layers, rank = decoder.layers, max_rank(spec)
    rows = {row.path.rpartition(".")[2]: row for row in decoder.rows}
    tensors = {name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()}

    def stack(layer: int, name: str, matrix: str) -> np.ndarray:
        (out, width), path = decoder.shape(rows[name]), linear(layer, rows[name])
        shape = (rank, width) if matrix == "A" else (out, rank)
        result = np.zeros((len(spec.adapters), 1, *shape), np.float32)
        for i, adapter in enumerate(spec.adapters):
            if path in adapter.ranks:
                values = tensors[AdapterTensor(adapter.name, path, matrix).key]
                scale = np.float32(adapter.scale_of(path) if matrix == "B" else 1)
                result[i, 0, : values.shape[0], : values.shape[1]] = values * scale
        return result

    old = {name: t for name, t in tensors.items() if "proj" not in name}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for fused, names in FUSED.items():
            weights = [tensors[f"{prefix}.{rows[name].path}.weight"] for name in names]
            old[f"{prefix}.{fused}.base_layer.weight"] = np.concatenate(weights)
            for matrix in "AB":
                for i, name in enumerate(names):
                    key = f"lora_{matrix}_slices.{i}" if len(names) > 1 else f"lora_{matrix}"
                    old[f"{prefix}.{fused}.{key}"] = stack(layer, name, matrix)
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(old, target / "model.safetensors", metadata={"format": "pt"})
    changes: dict[str, Any] = {
        "switch": None,
        "num_adapters": len(spec.adapters),
        "adapter_names": list(spec.names),
        "adapter_ranks": [rank] * len(spec.adapters),
        "adapter_token_ids": [a.token_id for a in spec.adapters],
        "adapter_substitute_token_ids": [a.substitute_token_id for a in spec.adapters],
        "max_lora_rank": rank,
        "num_hidden_layers": layers + 1,
        "shared_intermediate_size": config["intermediate_size"],
        "num_local_experts": 0,
    }
    edit_json(target / "config.json", **changes)


def same(found: GGUFReader, wanted: GGUFReader, suppressed: Sequence[int]) -> None:
    """Compare every tensor, type and byte, except the rows of suppressed tokens, which upstream can generate."""
    mine = {tensor.name: tensor for tensor in found.tensors}
    assert mine.keys() == {tensor.name for tensor in wanted.tensors}
    for theirs in wanted.tensors:
        tensor = mine[theirs.name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (theirs.tensor_type, theirs.shape.tolist()), theirs.name
        rows = np.delete(tensor.data, suppressed, axis=0) if theirs.name == "token_embd.weight" else tensor.data
        others = np.delete(theirs.data, suppressed, axis=0) if theirs.name == "token_embd.weight" else theirs.data
        np.testing.assert_array_equal(rows, others, err_msg=theirs.name)
    for key, field in wanted.fields.items():
        if key.startswith(("tokenizer.", "graniteswitch.")) and "expert" not in key:
            assert found.fields[key].contents() == field.contents(), key


def test_both_layouts_of_one_model(model: Path, tmp_path: Path) -> None:
    in_the_old_layout(model, tmp_path / "old")
    theirs = convert(tmp_path / "old", tmp_path / "theirs")
    spec = SwitchSpec.from_dict(read_json(model / "config.json")["switch"])
    controls = sorted(spec.control_slots)
    for outtype in OUTTYPES:
        wanted = GGUFReader(theirs / f"{outtype}.gguf")
        export(model, tmp_path / "new.gguf", outtype=outtype, force=True)
        same(GGUFReader(tmp_path / "new.gguf"), wanted, spec.suppressed)
        export(tmp_path / "old", tmp_path / "old.gguf", outtype=outtype, force=True)
        # it has no return-to-base token and no spare rows
        same(GGUFReader(tmp_path / "old.gguf"), wanted, controls[1:])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the samples are not beside the checkout")
def test_a_checkpoint_of_the_older_program(tmp_path: Path) -> None:
    convert(SAMPLE, tmp_path / "theirs")
    controls = read_json(SAMPLE / "config.json")["adapter_token_ids"]
    for outtype in OUTTYPES:
        export(SAMPLE, tmp_path / "mine.gguf", outtype=outtype, force=True)
        same(GGUFReader(tmp_path / "mine.gguf"), GGUFReader(tmp_path / "theirs" / f"{outtype}.gguf"), controls)
