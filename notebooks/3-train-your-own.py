# %% [markdown]
# # Train your own and add it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/3-train-your-own.ipynb)
#
# An empty slot is added to a composed model, trained in the model for a minute or two, measured before and after, and taken
# out as an ordinary PEFT adapter. The base and the other adapters stay as they are, byte for byte.

# %% [markdown]
# On Colab the next cell installs the package and takes a real Granite from the hub (choose a machine with a GPU); elsewhere
# it takes the sample of this repository, 1.7 million parameters, which runs on any machine.

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
import granite_switch
import granite_switch.hf

CHECKOUT = Path("..") if Path("../sample").exists() else Path("granite-switch")
sys.path[:0] = [str(CHECKOUT / "sample"), str(CHECKOUT / "examples")]
granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME).spec.names

# %% [markdown]
# ## The task
#
# The base answers in a sentence. The adapter is to answer the same questions in JSON. People and towns are drawn, and a
# third of all pairs is held out.

# %%
import json
import random

from world import PEOPLE, TOWNS, is_held_out

random.seed(0)
pairs = [(person, town) for person in PEOPLE for town in TOWNS]
training = random.sample([pair for pair in pairs if not is_held_out(*pair)], 300)
testing = random.sample([pair for pair in pairs if is_held_out(*pair)], 12)


def example(person, town):
    question = {"role": "user", "content": f"Where does {person} live?"}
    answer = {"role": "assistant", "content": json.dumps({"town": town})}
    return {"messages": [question, answer], "documents": [{"doc_id": "0", "text": f"{person} lives in {town}."}]}


(WORK / "data.jsonl").write_text("".join(json.dumps(example(*pair)) + "\n" for pair in training))
example(*training[0])

# %% [markdown]
# ## A slot
#
# `--invocation` makes it an activated LoRA: it acts from that text on. The text that opens the assistant's turn stands in
# every prompt, so all the conversation before it stays the base's, and is cached for every adapter at once.


# %%
def granite_switch_command(*words):
    line = [sys.executable, "-m", "granite_switch.cli", *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0


ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"
granite_switch_command("add", WORK / "model", "--new", "town_as_json", "--rank", 16, "--invocation", ASSISTANT)

# %% [markdown]
# ## Before
#
# B is zero, so the slot changes nothing: it answers what the base answers.

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer


def answers(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for person, town in testing:
        case = example(person, town)
        inputs = tokenizer.apply_chat_template(
            case["messages"][:1],
            documents=case["documents"],
            adapter_name=adapter,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    return texts


def right(texts):
    return sum(text == json.dumps({"town": town}) for text, (_, town) in zip(texts, testing, strict=True))


base = answers(WORK / "model")
assert answers(WORK / "model", "town_as_json") == base
print(f"{base[0]}   right: {right(base)} of {len(testing)}")

# %% [markdown]
# ## Train
#
# transformers' Trainer, 38 steps; only the slot's A and B have gradients
# ([examples/train_adapter.py](../examples/train_adapter.py)).

# %%
import time

from train_adapter import train

start = time.perf_counter()
losses = train(
    WORK / "model",
    "town_as_json",
    WORK / "data.jsonl",
    WORK / "trained",
    num_train_epochs=2,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=8,
    disable_tqdm=True,
)
print(f"{time.perf_counter() - start:.0f} s; loss {losses[0]:.2f} over the first steps, {losses[-1]:.2f} over the last")

# %% [markdown]
# ## After

# %%
after = answers(WORK / "trained", "town_as_json")
print(f"{after[0]}   right: {right(after)} of {len(testing)}")
assert right(after) > right(base)
assert answers(WORK / "trained") == base  # the base has not changed

# %%
for path in sorted((WORK / "model").glob("*.safetensors")):
    same = path.read_bytes() == (WORK / "trained" / path.name).read_bytes()
    print(f"{path.name:50}{'the same bytes' if same else 'changed'}")

# %% [markdown]
# ## Take it out, and compare with PEFT
#
# `extract` writes PEFT's two files. `verify --against` runs each adapter in PEFT on the plain base and in the composed model.

# %%
granite_switch_command("extract", WORK / "trained", "town_as_json", "--output", WORK / "town_as_json")
sources = [word for source in (WORK / "town_as_json", LIBRARY, BASE) for word in ("--against", source)]
granite_switch_command("verify", WORK / "trained", *sources, *(["--base-name", NAME] if NAME else []))

# %% [markdown]
# ## Put it elsewhere
#
# `add` takes the extracted folder into any model of that base, as it takes folders that PEFT, TRL and others write.

# %%
granite_switch.compose(BASE, [LIBRARY], WORK / "another", base_name=NAME)
granite_switch.add(WORK / "another", [WORK / "town_as_json"])
assert answers(WORK / "another", "town_as_json") == after

# %% [markdown]
# ## Push it
#
# The whole model, verified first, with its model card; the adapter alone is a PEFT folder and goes up as any other:
#
# ```bash
# hf auth login
# granite-switch push trained me/my-model --private
# hf upload me/town-as-json town_as_json
# ```
#
# Everybody else then composes with `--adapters me/town-as-json`, or loads `me/my-model` as it is.
