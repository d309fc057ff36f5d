# %% [markdown]
# # One conversation, five checks
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/4-one-conversation-five-checks.ipynb)
#
# The base answers a question from documents, and five requests then check the conversation. On one cache, each check
# computes only its own few tokens. An ordinary LoRA adapter has to prefill the whole conversation for every check.

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

# %%
from transformers import AutoModelForCausalLM

import granite_switch
import granite_switch.hf

granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME)
model = AutoModelForCausalLM.from_pretrained(WORK / "model", device_map="auto")

# %% [markdown]
# ## A long conversation
#
# Documents about people and places, then a question. `Conversation` keeps the token ids and the cache.

# %%
from granite_switch.hf import Conversation

PEOPLE = ["Ada", "Hugo", "Nora", "Carl", "Elsa", "Otto", "Ida", "Paul"] * 8
DOCUMENTS = [{"doc_id": str(i), "text": f"{name} lives in Tarn."} for i, name in enumerate(PEOPLE)]
CHECKS = ["answerability"] * 5


def begin():
    talk = Conversation(model, documents=DOCUMENTS)
    reply = talk.say("Where does Ada live?", max_new_tokens=16)
    return talk, reply


talk, reply = begin()
print(len(reply.turn.ids), "tokens read;", reply.text)

# %% [markdown]
# ## Five checks on one cache
#
# With `aside=True`, a check sees the conversation but does not become part of it. The adapter is an activated LoRA, so it
# continues from the base's own cache.

# %%
import time


def check(talk, name, question):
    start = time.perf_counter()
    reply = talk.say(question, name, aside=True, max_new_tokens=1)
    return reply, time.perf_counter() - start


QUESTIONS = [f"Where does {name} live?" for name in ("Hugo", "Nora", "Carl", "Elsa", "Otto")]
kept = []
for name, question in zip(CHECKS, QUESTIONS, strict=True):
    reply, seconds = check(talk, name, question)
    kept.append(seconds)
    print(f"{question:25} from the cache {reply.turn.reused:5}, computed {reply.turn.prefill:4}, {seconds:.3f} s")

# %% [markdown]
# ## The same checks without the cache
#
# A LoRA acts from the first token, so no part of the conversation is cached for it.

# %%
anew = []
for question in QUESTIONS:
    fresh = Conversation(model, documents=DOCUMENTS)
    fresh.messages = list(talk.messages)
    start = time.perf_counter()
    reply = fresh.say(question, "citations", aside=True, keep=False, max_new_tokens=1)
    anew.append(time.perf_counter() - start)
    print(f"{question:25} from the cache {reply.turn.reused:5}, computed {reply.turn.prefill:4}, {anew[-1]:.3f} s")

# %%
import matplotlib.pyplot as plt

positions = range(1, 6)
figure, axes = plt.subplots(figsize=(7, 3))
axes.bar([p - 0.2 for p in positions], kept, 0.4, label="aLoRA, kept cache", color="#0277bd")
axes.bar([p + 0.2 for p in positions], anew, 0.4, label="LoRA, prefilled anew", color="#bdbdbd", hatch="//")
axes.set(xlabel="check", ylabel="seconds to the first token", title="Five checks of one conversation")
axes.legend()
plt.show()
print(f"{sum(anew) / sum(kept):.0f} times as long without the cache")
assert sum(anew) > sum(kept)

# %% [markdown]
# ## Rewrite, answer, check, and back to the base
#
# `examples/flow.py` runs four steps with two adapters on one growing cache.

# %%
sys.path.insert(0, "../examples" if Path("../examples").exists() else "granite-switch/examples")
import flow
from transformers import AutoTokenizer

for step in flow.run(model, AutoTokenizer.from_pretrained(WORK / "model")):
    print(f"{step.name:14} cached {step.cached:4}, computed {step.prefilled:4}   {step.text}")

# %% [markdown]
# ## Through Mellea
#
# Mellea has a function for each task: `rag.rewrite_question`, `rag.check_answerability` and
# `rag.flag_hallucinated_content`. In this repository it has its own environment, which `make test-vllm` creates.

# %%
own = Path("../.venv-mellea/bin/python")
python = str(own) if own.exists() else sys.executable
line = [python, "../examples/mellea_adapters.py", str(WORK / "model")]
done = subprocess.run(line, capture_output=True, text=True)
print(done.stdout[done.stdout.index("{\n") :] if done.returncode == 0 else done.stderr.strip().splitlines()[-1])
