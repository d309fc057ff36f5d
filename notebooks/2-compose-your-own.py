# %% [markdown]
# # Compose your own
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/2-compose-your-own.ipynb)
#
# This notebook looks at the plan before composing, composes, compares the result with PEFT, changes it, and measures what
# an adapter costs.

# %% [markdown]
# On Colab, the next cell installs the package and uses a real Granite model from the hub. Elsewhere it uses this
# repository's sample of 1.7 million parameters, which runs on any machine.

# %%
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

if "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "https://github.com/generative-computing/granite-switch"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./granite-switch[hf]", "peft"], check=True)
    BASE, LIBRARY, NAME = "ibm-granite/granite-4.0-micro", "ibm-granite/granitelib-rag-r1.0", ""
else:
    BASE, LIBRARY, NAME = "../sample/base", "../sample/library", "granite-switch-sample"
WORK = Path(mkdtemp())

# %% [markdown]
# ## The plan
#
# `prepare` reads headers and configs and reports all problems at once. It writes nothing.

# %%
import time

import granite_switch
from granite_switch.composition.compose import prepare

plan = prepare(BASE, [LIBRARY], base_name=NAME)
print(f"{plan.spec.base_model}: {plan.checkpoint.nbytes / 1e6:.1f} MB, adapters {plan.adapter_bytes / 1e6:.1f} MB")
for adapter in plan.spec.adapters:
    where = repr(adapter.invocation_text) if adapter.technology == "alora" else "the first token"
    print(f"{adapter.name:25}{adapter.technology:7}{adapter.rank:3}  acts from {where}")

# %% [markdown]
# If something does not fit, you get an error with a hint, and no files are left behind:

# %%
try:
    prepare(BASE, [LIBRARY], base_name="another-base")
except granite_switch.SwitchError as error:
    print(error.message, *error.problems, error.hint, sep="\n  ")

# %% [markdown]
# ## Compose and inspect
#
# The base's shards are linked and the adapters copied. No model is loaded.

# %%
start = time.perf_counter()
granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME)
print(f"{time.perf_counter() - start:.1f} s")
for path in sorted((WORK / "model").iterdir()):
    print(f"{path.stat().st_size:>10,}  {path.name}")

# %% [markdown]
# How strongly each adapter changes each layer and projection, relative to the base's own weights:

# %%
from IPython.display import SVG

from granite_switch.composition.inspect import plot, strengths

plot(strengths(WORK / "model"), WORK / "strengths.svg")
SVG(str(WORK / "strengths.svg"))

# %% [markdown]
# ## Equal to PEFT
#
# `verify` checks the files. With `--against` it runs each adapter both in PEFT on the plain base and in the composed model.

# %%
line = [sys.executable, "-m", "granite_switch.cli", "verify", str(WORK / "model"), "--deep"]
line += ["--against", LIBRARY, "--against", BASE, *(["--base-name", NAME] if NAME else [])]
print(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)

# %% [markdown]
# ## Change it
#
# The other adapters keep their slots and token ids, so their prompts and caches stay valid.

# %%
granite_switch.remove(WORK / "model", ["citations"])
granite_switch.rename(WORK / "model", "query_rewrite", "rewrite")
granite_switch.add(WORK / "model", [LIBRARY], include=["citations"], base_name=NAME)
[(a.name, a.token, "retired" if a.retired else "") for a in granite_switch.verify(WORK / "model").adapters]

# %% [markdown]
# ## What an adapter costs
#
# Seconds to prefill a prompt of 512 tokens and generate 32, for the base and each adapter in turn, best of five. A base this
# small shows the overhead of the calls rather than the arithmetic; docs/performance.md uses a base of 367 MB.

# %%
import torch
from transformers import AutoModelForCausalLM

import granite_switch.hf

model = AutoModelForCausalLM.from_pretrained(WORK / "model", device_map="auto")
spec = model.config.switch_spec
prompt = torch.randint(20, 300, (1, 512), device=model.device)
seconds = {}
for _ in range(5):
    for name in ("base", *spec.names):
        ids = prompt.clone()
        if name != "base":
            ids[0, 0] = spec.adapter(name).token_id
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=32, max_new_tokens=32, do_sample=False)
        seconds[name] = min(seconds.get(name, 9e9), time.perf_counter() - start)
for name, value in seconds.items():
    print(f"{name:25}{value:6.2f} s  {value / seconds['base']:.2f} of the base's")
