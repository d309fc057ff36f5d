"""The model card: the base, the adapters, and how to call them."""

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from granite_switch.composition.adapters import Adapter
from granite_switch.core.spec import SwitchSpec

_TAGS = ("granite-switch", "lora", "alora")
_CARD = """# {base} with {count} adapters

A [Granite Switch](https://pypi.org/project/granite-switch/) checkpoint: one base model and the adapters below, switched
per token by control tokens in the prompt.

| slot | adapter | technology | rank | targets | parameters | source | sha256 of its weights |
|---|---|---|---|---|---|---|---|
{rows}

```python
import granite_switch.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], adapter_name="{example}",
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Served by vLLM with `pip install 'granite-switch[vllm]'`, the same name goes into
`"chat_template_kwargs": {{"adapter_name": "{example}"}}`.
"""


def model_card(model: SwitchSpec, adapters: Mapping[str, Adapter]) -> str:
    """Return README.md of the composed model. It contains nothing that changes from run to run."""
    rows = []
    for slot, spec in enumerate(model.adapters, 1):
        if spec.retired:
            continue
        adapter = adapters[spec.name]
        parameters = sum(t.shape[0] * t.shape[1] for t in adapter.tensors.values())
        targets = ", ".join(spec.modules)
        rows.append(
            f"| {slot} | `{spec.name}` | {spec.technology} | {spec.rank} | {targets} | {parameters:,} "
            f"| {_cell(spec.source)} | `{_cell(spec.sha256[:16])}` |"
        )
    example = model.names[0] if model.names else "base"
    base = _cell(model.base_model)
    text = _CARD.format(base=base, count=len(rows), rows="\n".join(rows), example=example)
    head = ModelCardData(base_model=base, library_name="transformers", tags=list(_TAGS))
    return str(ModelCard("---\n" + head.to_yaml() + "\n---\n\n" + text))


def _cell(text: str) -> str:
    """Fit untrusted text into a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
