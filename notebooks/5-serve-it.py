# %% [markdown]
# # Serve it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/5-serve-it.ipynb)
#
# vLLM's OpenAI server with every adapter as a model. On Colab, install vLLM first (`pip install './granite-switch[vllm]'`).

# %% [markdown]
# On Colab the next cell installs the package and takes a real Granite from the hub; elsewhere it takes the sample of this
# repository, 1.7 million parameters, which runs on any machine.

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

# %%
# needs: .venv-vllm/bin/python
own = Path("../.venv-vllm/bin/python")
python = str(own) if own.exists() else sys.executable
options = [BASE, "--adapters", LIBRARY, "--output", str(WORK / "model"), *(["--base-name", NAME] if NAME else [])]
subprocess.run([sys.executable, "-m", "granite_switch.cli", "compose", *options, "--quiet"], check=True)

# %% [markdown]
# ## Start the server
#
# `granite-switch serve MODEL` takes all of vLLM's own options.

# %%
import os
import socket
import time
import urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
line = [python, "-m", "granite_switch.cli", "serve", str(WORK / "model"), "--served-model-name", "sample"]
line += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "2048"]
log = (WORK / "log").open("w")
server = subprocess.Popen(line, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=log, stderr=log)
url = f"http://127.0.0.1:{port}"
for _ in range(500):
    try:
        urllib.request.urlopen(f"{url}/health")
        break
    except OSError:
        assert server.poll() is None, (WORK / "log").read_text()[-3000:]
        time.sleep(1)

# %% [markdown]
# ## Adapters are models
#
# Any OpenAI client can call them (`pip install openai`); here with nothing but Python's own library.

# %%
import json


def post(path, **body):
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


[model["id"] for model in json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"]]

# %%
ASK = [{"role": "user", "content": "Where does Ada live?"}]
DOCUMENTS = [{"doc_id": "0", "text": "Ada lives in Tarn. Ada works as a baker."}]
for name in ("sample", "sample:answerability"):
    answer = post("/v1/chat/completions", model=name, messages=ASK, documents=DOCUMENTS, temperature=0, max_tokens=24)
    print(f"{answer['model']:22}", answer["choices"][0]["message"]["content"])

# %% [markdown]
# ## One cache for all of them
#
# answerability is an activated LoRA: it reads the base's own cache. The server's usage says how much of the prompt came from
# there.

# %%
LONG = [{"doc_id": str(i), "text": f"{n} lives in Tarn."} for i, n in enumerate(["Ada", "Hugo", "Nora", "Carl"] * 12)]
for name in ("sample", "sample:answerability", "sample:citations"):
    start = time.perf_counter()
    answer = post("/v1/chat/completions", model=name, messages=ASK, documents=LONG, temperature=0, max_tokens=1)
    print(f"{name:22}{answer['usage']['prompt_tokens']:6} tokens, {time.perf_counter() - start:.3f} s")

# %%
server.terminate()
server.wait()
print("the server has stopped")
