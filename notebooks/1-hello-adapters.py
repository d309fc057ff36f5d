# %% [markdown]
# # Hello, adapters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/1-hello-adapters.ipynb)
#
# One checkpoint contains a base model and several adapters. A control token in the prompt selects which of them computes
# the tokens from there on. This notebook calls each adapter once and shows which of them computed which token.

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
# ## Compose a base and its adapters into one checkpoint

# %%
import granite_switch

plan = granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME)
for slot, adapter in enumerate(plan.spec.adapters, 1):
    print(slot, adapter.name, adapter.technology, f"rank {adapter.rank}", adapter.token)

# %% [markdown]
# ## Load it like any other model
#
# `import granite_switch.hf` registers the model with transformers. Everything after that is plain transformers.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_switch.hf

model = AutoModelForCausalLM.from_pretrained(WORK / "model", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(WORK / "model")
type(model).__name__

# %% [markdown]
# ## Call each adapter
#
# `adapter_name` is an argument of the chat template, which places the adapter's control token. The last user message is the
# instruction that each adapter was trained on; it comes from the adapter's `io.yaml`, and clients such as Mellea add it.

# %%
DOCUMENTS = [{"doc_id": "0", "text": "Ada lives in Tarn. Ada works as a baker."}]
ASK = [{"role": "user", "content": "Where does Ada live?"}]
TALK = [
    {"role": "user", "content": "What does Ada work as?"},
    {"role": "assistant", "content": "Ada works as a baker."},
    {"role": "user", "content": "Where does she live?"},
    {"role": "user", "content": "<rewrite> Write the last question so that it stands alone."},
]
CLAIM = [
    *ASK,
    {"role": "assistant", "content": "Ada lives in Selby."},
    {"role": "user", "content": "Check each sentence of the last answer."},
]
QUOTE = [
    *ASK,
    {"role": "assistant", "content": "Ada lives in Tarn."},
    {"role": "user", "content": "Quote the documents for each sentence of the last answer."},
]


def call(messages, adapter=None):
    inputs = tokenizer.apply_chat_template(
        messages,
        documents=DOCUMENTS,
        adapter_name=adapter,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    sequence = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0].tolist()
    return inputs["input_ids"].shape[1], sequence


def text(messages, adapter=None):
    length, sequence = call(messages, adapter)
    return tokenizer.decode(sequence[length:], skip_special_tokens=True)


print("base           ", text(ASK))
print("answerability  ", text(ASK, "answerability"))
print("query_rewrite  ", text(TALK, "query_rewrite"))
print("hallucinations ", text(CLAIM, "hallucination_detection"))
print("citations      ", text(QUOTE, "citations"))

# %% [markdown]
# ## See which adapter computed which token
#
# answerability is an activated LoRA: it acts from the assistant's turn onward. The base computes the prompt before that, so
# its KV cache can be shared. citations is a LoRA and acts from the first token.

# %%
from IPython.display import HTML

from granite_switch.cli import trace


def show(messages, adapter):
    length, sequence = call(messages, adapter)
    tokens = trace.trace(sequence, length, model.config.switch_spec, lambda i: tokenizer.decode([i]))
    return HTML(trace.page(tokens, model.config.switch_spec))


show(ASK, "answerability")

# %%
show(QUOTE, "citations")

# %% [markdown]
# ## User text cannot switch adapters
#
# The chat template replaces control tokens in messages by a space, so users cannot switch to another adapter.

# %%
rendered = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Where <|citations|> does Ada live?"}], add_generation_prompt=True, tokenize=False
)
assert "<|citations|>" not in rendered
print(rendered)
