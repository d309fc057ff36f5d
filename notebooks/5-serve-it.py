# %% [markdown]
# # Serve it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/5-serve-it.ipynb)
#
# vLLM's OpenAI server with every adapter as a model. OpenAI's own client calls each of them by name, streams, and goes
# through a conversation with several adapters whose prompts come out of one cache.

# %% [markdown]
# On Colab the next cell installs the package with vLLM and takes a real Granite from the hub (choose a machine with a GPU);
# elsewhere it takes the sample of this repository, 1.7 million parameters, which runs on any machine, and vLLM from the
# environment that `make test-vllm` makes.

# %%
# needs: .venv-vllm/bin/python
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

if "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "https://github.com/generative-computing/granite-switch"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./granite-switch[vllm]", "openai"], check=True)
    BASE, LIBRARY, NAME = "ibm-granite/granite-4.0-micro", "ibm-granite/granitelib-rag-r1.0", ""
    PYTHON, OPTIONS = sys.executable, []
else:
    BASE, LIBRARY, NAME = "../sample/base", "../sample/library", "granite-switch-sample"
    PYTHON, OPTIONS = "../.venv-vllm/bin/python", ["--enforce-eager", "--block-size", "32"]
WORK = Path(mkdtemp())

# %%
import granite_switch

granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME).spec.names

# %% [markdown]
# ## Start the server
#
# `granite-switch serve MODEL` takes all of vLLM's own options. In a shell this is
#
# ```bash
# granite-switch serve model --served-model-name granite --enable-prompt-tokens-details
# ```

# %%
import os
import socket
import time
import urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
line = [PYTHON, "-m", "granite_switch.cli", "serve", str(WORK / "model"), "--served-model-name", "granite"]
line += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enable-prompt-tokens-details"]
with (WORK / "log").open("w") as log:
    settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = subprocess.Popen([*line, *OPTIONS], env=settings, stdout=log, stderr=log)


def wait(seconds=500):
    for _ in range(seconds):
        assert server.poll() is None, (WORK / "log").read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"{url}/health").status
        except OSError:
            time.sleep(1)
    raise TimeoutError((WORK / "log").read_text()[-3000:])


wait()

# %% [markdown]
# ## Adapters are models

# %%
from openai import OpenAI

client = OpenAI(base_url=f"{url}/v1", api_key="none")
[model.id for model in client.models.list()]

# %% [markdown]
# ## Call each by its name
#
# What the user says last is what each adapter was trained on: its `io.yaml` has it, and clients such as Mellea write it.

# %%
DOCUMENTS = [{"doc_id": "0", "text": "Ada lives in Tarn. Ada works as a baker."}]
ASK = [{"role": "user", "content": "Where does Ada live?"}]


def answered(text, request):
    return [*ASK, {"role": "assistant", "content": text}, {"role": "user", "content": request}]


REQUESTS = {
    "granite": ASK,
    "granite:answerability": ASK,
    "granite:query_rewrite": [
        {"role": "user", "content": "What does Ada work as?"},
        {"role": "assistant", "content": "Ada works as a baker."},
        {"role": "user", "content": "Where does she live?"},
        {"role": "user", "content": "<rewrite> Write the last question so that it stands alone."},
    ],
    "granite:hallucination_detection": answered("Ada lives in Selby.", "Check each sentence of the last answer."),
    "granite:citations": answered("Ada lives in Tarn.", "Quote the documents for each sentence of the last answer."),
}


def call(model, messages, **options):
    documents = {"documents": DOCUMENTS}
    settings = {"temperature": 0, "max_tokens": 48, "extra_body": documents, **options}
    return client.chat.completions.create(model=model, messages=messages, **settings)


for model, messages in REQUESTS.items():
    answer = call(model, messages)
    print(f"{answer.model:32}{answer.choices[0].message.content}")

# %% [markdown]
# An adapter that is not there is an error, never the base's answer:

# %%
from openai import NotFoundError

try:
    call("granite:nobody", ASK)
except NotFoundError as error:
    print(error.status_code, error.body["message"])

# %% [markdown]
# ## Stream

# %%
for chunk in call("granite:citations", REQUESTS["granite:citations"], stream=True):
    print(chunk.choices[0].delta.content or "", end="|")

# %% [markdown]
# ## One conversation, several adapters, one cache
#
# A user message may say which adapter answers it. The client keeps nothing but the messages; the server finds what was said
# before in its cache, whichever adapter said it (`--enable-prompt-tokens-details` reports how much).

# %%
TURNS = [
    ("Where does Ada live?", "base"),
    ("What does Ada work as?", "answerability"),
    ("And Hugo?", "base"),
    ("<rewrite> Write the last question so that it stands alone.", "query_rewrite"),
    ("What does Ada eat?", "answerability"),
    ("Where does Ada live?", "base"),
]
PEOPLE = ["Ada", "Hugo", "Nora", "Carl", "Elsa", "Otto", "Ida", "Paul"]
DOCUMENTS = [
    {"doc_id": str(i), "text": f"{name} lives in Tarn. {name} works as a baker."} for i, name in enumerate(PEOPLE)
]

messages, cached = [], []
for text, adapter in TURNS:
    messages.append({"role": "user", "content": text, "adapter": adapter})
    answer = call("granite", messages)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    usage = answer.usage
    cached.append(usage.prompt_tokens_details.cached_tokens)
    print(f"{adapter:15}prompt {usage.prompt_tokens:4}, from the cache {cached[-1]:4}   {messages[-1]['content']}")
assert cached == sorted(cached)

# %% [markdown]
# ## What was asked of whom
#
# Beside vLLM's own metrics there are three by adapter.

# %%
metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
print("\n".join(row for row in metrics.splitlines() if row.startswith("granite_switch_") and "_total{" in row))

# %% [markdown]
# ## Stop the server

# %%
server.terminate()
print("the server has stopped, exit code", server.wait(120))
try:
    urllib.request.urlopen(f"{url}/health")
    raise AssertionError("it still answers")
except OSError as error:
    print(error)
