"""One of two processes that train a model together, each its own adapter; started by test_distributed.py.

Arguments: the checkpoint, "ddp" or "fsdp", the adapter of each process (or "base"), a file for the gradients.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401

folder, how, names, results = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), Path(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
for name, parameter in model.named_parameters():
    parameter.requires_grad = "_lora" in name
ids = torch.load(results.with_suffix(".prompts"))[names[rank]]
if how == "ddp":
    trained = DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    trained = fully_shard(model)
for _ in range(2):  # DDP reports in the second pass what was missing in the first
    model.zero_grad()
    trained(ids, labels=ids, use_cache=False).loss.backward()
gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
if rank == 0:
    torch.save(gradients, results)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort the interpreter while it shuts down
