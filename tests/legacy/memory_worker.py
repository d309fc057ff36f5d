"""Load a checkpoint and print, as JSON, how many bytes the process's own memory grew: at its peak and in the end.

`memory_worker.py WARM_UP FOLDER`: a small checkpoint is loaded first, so that imports and allocators do not count.
Pages mapped from the checkpoint's files do not count either, since they belong to the page cache.
"""

import json
import re
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import granite_switch.hf  # noqa: F401  (registers the Auto classes)


def own_memory() -> int:
    """Bytes of anonymous memory."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    before, samples, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            samples.append(own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    done.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    end = own_memory() - before
    print(json.dumps({"peak": max(*samples, end), "end": end, "weights": weights, "samples": len(samples)}))


if __name__ == "__main__":
    main()
