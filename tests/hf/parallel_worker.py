"""One of several processes that hold a model together; started by test_parallel.py under torchrun.

Arguments: the checkpoint; a file with {name: ids}; a file to write {logits, text, held, gradients} to, and beside it
the saved folder. It computes in float64, so that the order of sums does not matter.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401

folder, prompts, results = map(Path, sys.argv[1:])
torch.set_num_threads(1)
warnings.simplefilter("ignore")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto").eval()
asked = torch.load(prompts)
with torch.no_grad():
    logits = {name: model(ids).logits for name, ids in asked.items()}
text = {name: model.generate(ids, max_new_tokens=6, do_sample=False) for name, ids in asked.items()}
held = {name: p.to_local().numel() for name, p in model.named_parameters() if hasattr(p, "to_local")}
for ids in asked.values():
    model(ids, labels=ids).loss.backward()
gradients = {name: p.grad for name, p in model.named_parameters() if "_lora" in name}
gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
model.save_pretrained(results.with_suffix(".saved"), is_main_process=dist.get_rank() == 0)
if dist.get_rank() == 0:
    torch.save({"logits": logits, "text": text, "held": held, "gradients": gradients}, results)
dist.barrier()
dist.destroy_process_group()
