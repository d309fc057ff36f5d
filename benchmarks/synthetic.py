"""Bases, adapter libraries and composed checkpoints with random weights, created once and kept in one folder.

    python benchmarks/synthetic.py FOLDER [--size small] [--set 12-r16 ...] [--older PYTHON]

A set is NUMBER-rRANK, NUMBER-mixed (ranks 8, 16, 32, 64 in turn) or NUMBER-library (16, 4, 8, 8, 32). Its adapters 6
to 9 are aLoRA, the others LoRA, all on every projection. FOLDER/SIZE holds it as a library, `library-12-r16`, and
composed, `switch-12-r16`; with `--older` also composed by release 0.1.1, `older-12-r16`. Adapters are written directly
as tensors, without a model.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

# The sizes for release 0.1.1 have no padding rows in the vocabulary, because it would drop them.
SIZES = {
    "tiny": {"layers": 2, "hidden": 128, "mlp": 256, "heads": 4, "kv_heads": 2},
    "half": {"layers": 6, "hidden": 1024, "mlp": 4096, "heads": 16, "kv_heads": 4},
    "small": {"layers": 12, "hidden": 1024, "mlp": 4096, "heads": 16, "kv_heads": 4},
    "wide": {"layers": 3, "hidden": 2560, "mlp": 8192, "heads": 40, "kv_heads": 8},
    "3b": {"layers": 40, "hidden": 2560, "mlp": 8192, "heads": 40, "kv_heads": 8, "vocabulary": 100_352},
}
DTYPES = {"tiny": "float32", "half": "float32", "small": "float32", "wide": "float32", "3b": "bfloat16"}  # as stored
RANKS = {"mixed": (8, 16, 32, 64), "library": (16, 4, 8, 8, 32)}
INVOCATION = "<|start_of_role|>assistant<|end_of_role|>"
IO_YAML = "model: null\nresponse_format: null\ntransformations: null\n"


def make_base(folder: Path, size: str) -> None:
    import torch
    from artefacts import GRANITE_TEMPLATE, tokenizer_file
    from artefacts import make_base as make

    shape = dict(SIZES[size])
    padding = max(0, shape.pop("vocabulary", 0) - tokenizer_file().get_vocab_size())
    # release 0.1.1 edits templates, and its insertions assume a variable `ns`
    template = "{%- set ns = namespace() %}\n" + GRANITE_TEMPLATE
    dtype = getattr(torch, DTYPES[size])
    make(folder, pad_vocab=padding, initializer_range=0.02, dtype=dtype, template=template, **shape)
    _align(folder)


def _align(folder: Path) -> None:
    """Align the weights to a page, as in composed models, so that no contender gains from it."""
    from granite_switch.core.checkpoint import copy_of, read_header, write

    for path in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_header(path)
        new = path.with_suffix(".new")
        write(new, [copy_of(tensor) for tensor in tensors.values()], metadata=metadata)
        new.replace(path)


def make_library(folder: Path, base: Path, size: str, name: str) -> None:
    """Write the adapters of set `name` for a base as a library: ADAPTER/base/TECHNOLOGY/."""
    import json

    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    from granite_switch.core.checkpoint import Checkpoint
    from granite_switch.core.linears import linears

    config = json.loads((base / "config.json").read_text())
    shapes, dtype = linears(Checkpoint(base).tensors, config), getattr(torch, DTYPES[size])
    invocation = Tokenizer.from_file(str(base / "tokenizer.json")).encode(INVOCATION, add_special_tokens=False).ids
    count, ranks = name.split("-")
    for number in range(int(count)):
        rank = RANKS[ranks][number % len(RANKS[ranks])] if ranks in RANKS else int(ranks.removeprefix("r"))
        path = adapter_folder(folder, number)
        path.mkdir(parents=True)
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=sorted({path.rpartition(".")[2] for path in shapes}),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=invocation if is_alora(number) else None,
        ).save_pretrained(path)
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for linear, (out, width) in shapes.items():
            for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
                key = f"base_model.model.{linear}.lora_{matrix}.weight"
                tensors[key] = torch.empty(shape, dtype=dtype).normal_(std=0.06, generator=draw)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "io.yaml").write_text(IO_YAML)


def is_alora(number: int) -> bool:
    return 5 <= number < 9


def adapter_folder(library: Path, number: int) -> Path:
    return library / f"adapter{number:02}" / "base" / ("alora" if is_alora(number) else "lora")


def older_command(python: str, base: Path, library: Path, output: Path) -> list[str]:
    """The command with which release 0.1.1 composes."""
    module = "granite_switch.composer.compose_granite_switch"
    options = ["--base-model", base, "--target-model", "base", "--adapters", library, "--output", output]
    return [python, "-m", module, *map(str, options)]


def once(folder: Path, make) -> None:
    """Create a folder unless it exists; an interrupted run leaves none."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--older", metavar="PYTHON")
    options = parser.parse_args()
    from granite_switch import compose

    folder = options.folder / options.size
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    once(base, lambda part: make_base(part, options.size))
    for name in options.set or ["12-r16"]:
        library = folder / f"library-{name}"
        once(library, lambda part, name=name: make_library(part, base, options.size, name))
        once(folder / f"switch-{name}", lambda part, library=library: compose(base, [library], part, base_name="base"))
        if options.older:
            once(
                folder / f"older-{name}",
                lambda part, library=library: subprocess.run(
                    older_command(options.older, base, library, part), check=True, stdout=sys.stderr
                ),
            )


if __name__ == "__main__":
    main()
