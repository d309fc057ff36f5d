"""Seconds and bytes written by add, update, rename and remove on a composed 30B model.

    python benchmarks/edit.py [--folder DIR]

The base's shards are sparse files of realistic size that take no disk space; as in the hub's 5 GB shards, the first one
contains the embedding. This measures what a change reads and writes, not the values of weights.
"""

import argparse
import json
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LAYERS, HIDDEN, MLP, HEADS, VOCABULARY, PER_SHARD = 64, 6144, 20480, 48, 100_352, 5
SHAPES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (MLP, HIDDEN)),
    "mlp.down_proj": (HIDDEN, MLP),
}


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write a safetensors file of bfloat16 zeros that takes no disk space."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


def make_base(folder: Path) -> int:
    """Write the base and return its size in bytes."""
    from artefacts import make_base as tiny

    tiny(folder, layers=1)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for start in range(0, LAYERS, PER_SHARD):
        layers = range(start, min(start + PER_SHARD, LAYERS))
        shapes = {f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in SHAPES.items()}
        if start == 0:
            shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,), **shapes}
        name = f"model-{start:05}.safetensors"
        total += sparse(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def make_adapter(folder: Path, rank: int = 16, invocation: list[int] | None = None) -> Path:
    """Write a LoRA on q and v, or an aLoRA if an invocation is given."""
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(rank).normal(size=(rank, HIDDEN)).astype(np.float16)
    tensors = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = drawn, drawn.T.copy()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    config |= {"alora_invocation_tokens": invocation} if invocation else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="working folder; a temporary one by default")
    place = Path(tempfile.mkdtemp(dir=parser.parse_args().folder))
    import granite_switch

    try:
        total = make_base(place / "base")
        first = [make_adapter(place / f"first/{name}") for name in ("a", "b", "c")]
        other, new = make_adapter(place / "second/a", 8), make_adapter(place / "new/d")
        tokenizer = Tokenizer.from_file(str(place / "base/tokenizer.json"))
        tagged = make_adapter(place / "new/tagged", invocation=tokenizer.encode("<rewrite>").ids)
        model = place / "model"
        granite_switch.compose(place / "base", first, model)
        print(f"base {total / 1e9:.1f} GB in {len(list((place / 'base').glob('*.safetensors')))} shards, 3 adapters")
        steps: dict[str, Callable[[], object]] = {
            "add": lambda: granite_switch.add(model, [new]),
            "add, with an invocation of its own": lambda: granite_switch.add(model, [tagged]),
            "update": lambda: granite_switch.update(model, [other]),
            "rename": lambda: granite_switch.rename(model, "b", "e"),
            "remove": lambda: granite_switch.remove(model, ["c"]),
            "verify": lambda: granite_switch.verify(model),
            "inspect": lambda: granite_switch.inspect(model),
            "extract": lambda: granite_switch.extract(model, "a", place / "out/a"),
        }
        for name, step in steps.items():
            nodes = {path.stat().st_ino for path in model.rglob("*")}
            began = time.perf_counter()
            step()
            seconds = time.perf_counter() - began
            written = sum(p.stat().st_size for p in model.rglob("*") if p.is_file() and p.stat().st_ino not in nodes)
            print(f"{name:34} {seconds:6.2f} s, {written / 1e6:8.1f} MB written")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
