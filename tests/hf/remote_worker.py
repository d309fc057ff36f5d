"""Run composed models through transformers' own entry points, in a process that does not import this package."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, saved = sys.argv[1], sys.argv[2]
assert not [name for name in sys.modules if name.startswith("granite_switch")]
run = pipeline("text-generation", folder, trust_remote_code=True, device="cpu", dtype=torch.float32)
text = run("<|citations|>the river ends", max_new_tokens=8, do_sample=False, return_full_text=False)[0][
    "generated_text"
]
run.model.save_pretrained(saved)
run.tokenizer.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
ids = tokenizer("<|citations|>the river ends", return_tensors="pt")
with torch.no_grad():
    logits = again(**ids).logits[0, -1].tolist()
files = sorted(path.name for path in Path(saved).glob("*.py"))
print(json.dumps({"text": text, "class": type(run.model).__name__, "logits": logits, "files": files}))
