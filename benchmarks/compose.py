"""Time and memory of composing compared with `cp`: a sharded synthetic base of several GB, and 12 adapters.

    python benchmarks/compose.py [--family granite|granitemoehybrid|qwen3] [--gigabytes 4] [--folder DIR]

Composing and copying alternate, each in its own process. Peak memory is the process's VmHWM.
"""

import argparse
import json
import math
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
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

HIDDEN, MLP, HEADS, VOCABULARY = 2048, 8192, 32, 100_352
ATTENTION = {f"self_attn.{name}": (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
GATED = {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
FUSED = {"shared_mlp.input_linear": (2 * MLP, HIDDEN), "shared_mlp.output_linear": (HIDDEN, MLP)}
SHAPES = {
    "granite": ATTENTION | GATED,
    "granitemoehybrid": ATTENTION | FUSED,
    "qwen3": ATTENTION | GATED,
}
_COMPOSE = """
import resource, sys, time; from granite_switch import compose
start = time.perf_counter()
compose(sys.argv[1], [sys.argv[2]], sys.argv[3])
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(seconds, int(peak) * 1024, sum(one.ru_utime + one.ru_stime for one in usage))
"""


def make_base(folder: Path, family: str, gigabytes: float) -> None:
    """Write a base of the requested size in bf16: one shard for the embedding and one per layer."""
    from families import make_decoder

    make_decoder(folder, family)
    norms = [
        name
        for name in load_file(folder / "model.safetensors")
        if name.startswith("model.layers.0.") and "norm" in name
    ]
    (folder / "model.safetensors").unlink()
    layer = sum(out * width for out, width in SHAPES[family].values()) * 2
    layers = max(1, round((gigabytes * 1e9 - VOCABULARY * HIDDEN * 2) / layer))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {
        "shared_intermediate_size": MLP,
        "layer_types": (config.get("layer_types") or ["full_attention"])[:1] * layers,
    }
    config |= {
        "num_attention_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "mamba_n_heads": 2 * HIDDEN // 32,
        "num_key_value_heads": HEADS,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    used = max(tokenizer["model"]["vocab"].values(), default=0), *(t["id"] for t in tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"word{i}": i for i in range(max(used) + 1, VOCABULARY)}  # a token for every row
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weight_map = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    numbers = torch.randn(HIDDEN * 1024, generator=torch.Generator().manual_seed(0)).bfloat16()  # repeated, for speed

    def draw(*shape: int) -> torch.Tensor:
        return numbers.repeat(math.prod(shape) // len(numbers) + 1)[: math.prod(shape)].reshape(shape)

    embedding = draw(VOCABULARY, HIDDEN)
    shard("model-00001.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN)})
    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {f"{prefix}.{name}.weight": draw(*shape) for name, shape in SHAPES[family].items()}
        sizes = {norm: HIDDEN // HEADS if "self_attn" in norm else HIDDEN for norm in norms}
        tensors |= {norm.replace(".0.", f".{index}.", 1): torch.ones(size) for norm, size in sizes.items()}
        shard(f"model-{index + 2:05}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapters(folder: Path, family: str, layers: int, count: int) -> None:
    for number in range(count):
        path = folder / f"adapter{number:02}"
        path.mkdir(parents=True)
        rank = (8, 16, 32)[number % 3]
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for name, (out, width) in SHAPES[family].items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
                    values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=draw)
                    tensors[f"{stem}.lora_{matrix}.weight"] = values
        save_file(tensors, path / "adapter_model.safetensors")
        names = [name.rpartition(".")[2] for name in SHAPES[family]]
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
        (path / "adapter_config.json").write_text(json.dumps(settings))


def copied_bytes(model: Path) -> list[Path]:
    """Bytes of the files that composing had to copy, which are not hard links."""
    return [path for path in model.rglob("*") if path.is_file() and path.stat().st_nlink == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SHAPES, default="granite")
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        make_base(work / "base", options.family, options.gigabytes)
        layers = json.loads((work / "base" / "config.json").read_text())["num_hidden_layers"]
        make_adapters(work / "adapters", options.family, layers, options.adapters)
        size = sum(p.stat().st_size for p in (work / "base").glob("*.safetensors"))
        seconds, copying, peaks = [], [], []
        for _ in range(options.runs + 1):
            shutil.rmtree(work / "out", ignore_errors=True)
            os.sync()
            command = [sys.executable, "-c", _COMPOSE, work / "base", work / "adapters", work / "out"]
            run = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
            took, peak, cpu = run.stdout.split()
            seconds.append(float(took))
            peaks.append(int(peak))
            files = copied_bytes(work / "out")
            (work / "copy").mkdir()
            os.sync()
            start = time.perf_counter()
            subprocess.run(["cp", *map(str, files), str(work / "copy")], check=True)
            copying.append(time.perf_counter() - start)
            shutil.rmtree(work / "copy")
        seconds, copying, peaks = seconds[1:], copying[1:], peaks[1:]  # the first run warms the page cache
        to_copy = sum(p.stat().st_size for p in copied_bytes(work / "out"))
        linked = sum(p.stat().st_nlink > 1 for p in (work / "out").glob("*.safetensors"))
        print(f"{options.family}: {size / 1e9:.2f} GB in {layers + 1} shards, {linked} of them linked")
        print(f"compose  {_spread(seconds)} s ({float(cpu):.1f} s of CPU time), peak memory {max(peaks) / 1e6:.0f} MB")
        print(f"cp       {_spread(copying)} s for the {to_copy / 1e9:.2f} GB that have to be copied")
        print(f"compose - cp: {_spread(np.subtract(seconds, copying).tolist())} s")
    finally:
        shutil.rmtree(work)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


if __name__ == "__main__":
    main()
