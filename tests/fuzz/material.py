"""Material to damage: a base, adapters, a manifest, a composed model, and one checkpoint per legacy format.

python material.py FOLDER
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "legacy")]

from artefacts import ASSISTANT, make_adapter, make_base
from families import make_decoder
from layouts import write_old
from quantised import FORMATS, meant_by, quantise

from granite_switch import compose
from granite_switch.gguf import export

IO_YAML = "model: null\nresponse_format: null\ntransformations: null\nparameters: {temperature: 0.5}\n"


def make(folder: Path) -> None:
    """Write the material into an empty folder."""
    base = make_base(folder / "base", layers=2, hidden=32, heads=2, kv_heads=1, mlp=48, max_shard_size="40KB")
    one = make_base(folder / "one", layers=2, hidden=32, heads=2, kv_heads=1, mlp=48)
    adapters = folder / "adapters"
    make_adapter(adapters / "lora", base, rank=2, targets=("q_proj", "down_proj"), use_rslora=True)
    settings = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {r"layers\.\d+\.mlp": 5}}
    make_adapter(adapters / "alora", base, rank=2, targets=("q_proj", "up_proj"), invocation=ASSISTANT, **settings)
    make_adapter(adapters / "rewrite", base, rank=1, targets=("k_proj",), invocation="<rewrite>")
    (adapters / "lora/io.yaml").write_text(IO_YAML)
    entries = [{"name": f"n-{name}", "path": f"../adapters/{name}"} for name in ("lora", "alora")]
    (folder / "manifest").mkdir()
    manifest = [*entries, {"name": "gone", "retired": True, "substitute_token_id": 2}]
    (folder / "manifest/manifest.yaml").write_text(json.dumps(manifest))
    compose(base, [folder / "manifest/manifest.yaml"], folder / "model")
    for version in (1, 2, 3):
        write_old(folder / f"legacy-{version}", version, one, adapters, ["lora"])
    export(folder / "model", folder / "gguf/model.gguf")
    with tempfile.TemporaryDirectory() as place:
        plain = make_decoder(Path(place), "granite", intermediate_size=192)
        for name in FORMATS:
            shutil.rmtree(meant_by(quantise(plain, folder / "quantised" / name, name)))
    message = {"role": "user", "content": [{"type": "text", "text": "Who?"}], "adapter": "n-alora"}
    requests = {
        "chat": {"model": "m:n-lora", "messages": [message], "chat_template_kwargs": {"adapter_name": "n-lora"}},
        "prompt": {"model": "m", "prompt": [[1, 2], [3]], "truncate_prompt_tokens": 4},
        "responses": {"model": "m", "input": [message], "stream": True},
    }
    documents = {"one": [{"doc_id": "1", "title": "Tarn", "text": "It ends in the sea."}]}
    for kind, files in (("requests", requests), ("documents", documents)):
        (folder / kind).mkdir()
        for name, data in files.items():
            (folder / kind / f"{name}.json").write_text(json.dumps(data))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
