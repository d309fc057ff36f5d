# %% [markdown]
# # Train your own and add it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/generative-computing/granite-switch/blob/main/notebooks/3-train-your-own.ipynb)
#
# An empty slot is added to a composed model, trained in place for a minute or two, measured before and after, and taken out
# as an ordinary PEFT adapter. Base and other adapters stay as they are, byte for byte.

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
import granite_switch
import granite_switch.hf
from granite_switch.compose.slot import add_empty

ROOT = Path("..") if Path("../sample").exists() else Path("granite-switch")
sys.path[:0] = [str(ROOT / "sample"), str(ROOT / "examples")]
granite_switch.compose(BASE, [LIBRARY], WORK / "model", base_name=NAME)

# %% [markdown]
# ## The task
#
# The base answers in a sentence. The adapter is to answer the same questions as JSON. People and towns are drawn, and a third
# of all pairs is held out.

# %%
import json
import random

from world import PEOPLE, TOWNS, is_held_out

random.seed(0)
pairs = [(person, town) for person in PEOPLE for town in TOWNS]
training = random.sample([pair for pair in pairs if not is_held_out(*pair)], 400)
testing = random.sample([pair for pair in pairs if is_held_out(*pair)], 12)


def example(person, town):
    question = {"role": "user", "content": f"Where does {person} live?"}
    answer = {"role": "assistant", "content": json.dumps({"town": town})}
    return {"messages": [question, answer], "documents": [{"doc_id": "0", "text": f"{person} lives in {town}."}]}


(WORK / "data.jsonl").write_text("".join(json.dumps(example(*pair)) + "\n" for pair in training))
print(json.dumps(example(*training[0])))

# %% [markdown]
# ## A slot
#
# LoRA on the attention's projections by default. Until it is trained it changes nothing: B is zero.

# %%
add_empty(WORK / "model", "town_as_json", rank=16, invocation="")
granite_switch.verify(WORK / "model").names

# %% [markdown]
# ## Before

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(WORK / "model")


def answers(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
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
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    return texts


def right(texts):
    return sum(text == json.dumps({"town": town}) for text, (_, town) in zip(texts, testing, strict=True))


base, before = answers(WORK / "model", None), answers(WORK / "model", "town_as_json")
print("base:", base[0], "  slot:", before[0], f"  right: {right(before)} of {len(testing)}")

# %% [markdown]
# ## Train
#
# transformers' Trainer; only the slot's A and B have gradients (`examples/train_adapter.py`).

# %%
from train_adapter import train

losses = train(
    WORK / "model",
    "town_as_json",
    WORK / "data.jsonl",
    WORK / "trained",
    num_train_epochs=6,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=20,
    disable_tqdm=True,
)
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.3f} at last")

# %% [markdown]
# ## After

# %%
after = answers(WORK / "trained", "town_as_json")
print(after[0], f"  right: {right(after)} of {len(testing)}")
assert right(after) > right(before)
assert answers(WORK / "trained", None) == base  # the base has not changed

# %% [markdown]
# ## Take it out, put it elsewhere
#
# `extract` writes PEFT's two files; `add` takes them into any model of that base. `push` uploads a whole model, after verifying
# it: `granite_switch.push(WORK / "trained", "me/my-model", private=True)`.

# %%
granite_switch.extract(WORK / "trained", "town_as_json", WORK / "town_as_json")
granite_switch.remove(WORK / "model", ["town_as_json"])
granite_switch.add(WORK / "model", [WORK / "town_as_json"])
print(sorted(path.name for path in (WORK / "town_as_json").iterdir()))
assert answers(WORK / "model", "town_as_json") == after
