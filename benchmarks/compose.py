"""Composing against copying: a synthetic base of several GB in shards, 12 adapters. Time and memory beside `cp`.

    python benchmarks/compose.py [--gigabytes 4] [--folder DIR]

Each part runs in a process of its own, composing and copying in turn; peak memory is the process's own (VmHWM).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

HIDDEN, MLP, HEADS, VOCABULARY = 2048, 8192, 32, 100_352
TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_COMPOSE = """
import sys, time; from granite_switch import compose
start = time.perf_counter()
compose(sys.argv[1], [sys.argv[2]], sys.argv[3])
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(seconds, int(peak) * 1024)
"""


def shapes() -> dict[str, tuple[int, int]]:
    return {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
        **dict.fromkeys(("gate_proj", "up_proj"), (MLP, HIDDEN)),
        "down_proj": (HIDDEN, MLP),
    }


def make_base(folder: Path, gigabytes: float) -> None:
    """A Granite of the wanted size in bf16: one shard for the embedding, one for each few layers."""
    from artefacts import make_base as tiny

    tiny(folder, layers=1)
    (folder / "model.safetensors").unlink()
    layer = sum(out * width for out, width in shapes().values()) * 2
    layers = max(1, round((gigabytes * 1e9 - VOCABULARY * HIDDEN * 2) / layer))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    draw = torch.Generator().manual_seed(0)
    embedding = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(generator=draw)
    shard("model-00001.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN)})
    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {
            f"{prefix}.{block}.{name}.weight": torch.empty(shapes()[name], dtype=torch.bfloat16).normal_(generator=draw)
            for block, names in TARGETS.items()
            for name in names
        }
        tensors |= {f"{prefix}.{n}_layernorm.weight": torch.ones(HIDDEN) for n in ("input", "post_attention")}
        shard(f"model-{index + 2:05}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapters(folder: Path, layers: int, count: int) -> None:
    for number in range(count):
        path = folder / f"adapter{number:02}"
        path.mkdir(parents=True)
        rank = (8, 16, 32)[number % 3]
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for block, names in TARGETS.items():
                for name in names:
                    out, width = shapes()[name]
                    stem = f"base_model.model.model.layers.{layer}.{block}.{name}"
                    for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
                        values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=draw)
                        tensors[f"{stem}.lora_{matrix}.weight"] = values
        save_file(tensors, path / "adapter_model.safetensors")
        names = [name for block in TARGETS.values() for name in block]
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
        (path / "adapter_config.json").write_text(json.dumps(settings))


def copied_bytes(model: Path) -> list[Path]:
    """The files that composing had to copy: those that are no hard links."""
    return [path for path in model.rglob("*") if path.is_file() and path.stat().st_nlink == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        make_base(work / "base", options.gigabytes)
        layers = json.loads((work / "base" / "config.json").read_text())["num_hidden_layers"]
        make_adapters(work / "adapters", layers, options.adapters)
        size = sum(p.stat().st_size for p in (work / "base").glob("*.safetensors"))
        seconds, copying, peaks = [], [], []
        for _ in range(options.runs + 1):
            shutil.rmtree(work / "out", ignore_errors=True)
            os.sync()
            command = [sys.executable, "-c", _COMPOSE, work / "base", work / "adapters", work / "out"]
            run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
            took, peak = run.stdout.split()
            seconds.append(float(took))
            peaks.append(int(peak))
            files = copied_bytes(work / "out")
            (work / "copy").mkdir()
            os.sync()
            start = time.perf_counter()
            subprocess.run(["cp", *map(str, files), str(work / "copy")], check=True)
            copying.append(time.perf_counter() - start)
            shutil.rmtree(work / "copy")
        seconds, copying, peaks = seconds[1:], copying[1:], peaks[1:]  # the first warms the page cache
        to_copy = sum(p.stat().st_size for p in copied_bytes(work / "out"))
        linked = sum(p.stat().st_nlink > 1 for p in (work / "out").glob("*.safetensors"))
        print(f"base {size / 1e9:.2f} GB in {layers + 1} shards, {options.adapters} adapters; {linked} shards linked")
        print(f"compose  {_spread(seconds)} s, peak memory {max(peaks) / 1e6:.0f} MB")
        print(f"cp       {_spread(copying)} s for the {to_copy / 1e9:.2f} GB that have to be copied")
        print(f"compose - cp: {_spread(np.subtract(seconds, copying).tolist())} s")
    finally:
        shutil.rmtree(work)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


if __name__ == "__main__":
    main()
