"""Train an empty slot of a composed model with transformers' Trainer; only that adapter's A and B change.

    granite-switch add MODEL --new my-task --rank 16
    python examples/train_adapter.py MODEL my-task data.jsonl --output TRAINED
    granite-switch extract TRAINED my-task --output my-task

Each line of the data is {"messages": [...]}, where the last message is the answer to learn. Optional `documents` and
`tools` go to the chat template, which also places the adapter's control token.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import granite_switch.hf  # noqa: F401  (registers the Auto classes)
from granite_switch.core.layout import parse_key


def freeze_others(model: Any, adapter: str) -> int:
    """Freeze everything except one adapter's A and B, and hold these in float32, as PEFT does.

    Args:
        model: a composed model.
        adapter: the adapter's name.

    Returns:
        The number of trainable parameters.
    """
    model.config.switch_spec.slot(adapter)  # raises an error that lists the adapters if the name is unknown
    trained = 0
    for name, parameter in model.named_parameters():
        key = parse_key(name)
        parameter.requires_grad = bool(key and key.adapter == adapter)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained += parameter.numel()
    return trained


def examples(lines: list[dict[str, Any]], tokenizer: Any, adapter: str, **template: Any) -> list[dict[str, Any]]:
    """Token ids and labels of each conversation, with the loss only on the last answer.

    Args:
        lines: `messages`, and other arguments of the chat template.
        tokenizer: the composed model's.
        adapter: the adapter's name.
        template: arguments of the chat template for all lines, such as enable_thinking=False.
    """
    result = []
    for line in lines:
        *prompt, answer = line["messages"]
        more = {key: value for key, value in line.items() if key != "messages"}
        ids = tokenizer.apply_chat_template(
            prompt, adapter_name=adapter, add_generation_prompt=True, return_dict=True, **more, **template
        )["input_ids"]
        target = tokenizer(answer["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        result.append({"input_ids": [*ids, *target], "labels": [*[-100] * len(ids), *target]})
    return result


def padded(batch: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """A batch padded to one length, without loss on the padding."""
    size = max(len(one["input_ids"]) for one in batch)

    def rows(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*one[key], *[filler] * (size - len(one[key]))] for one in batch])

    mask = [[1] * len(one["input_ids"]) + [0] * (size - len(one["input_ids"])) for one in batch]
    return {"input_ids": rows("input_ids", pad), "labels": rows("labels", -100), "attention_mask": torch.tensor(mask)}


def train(model: str, adapter: str, data: Path, output: Path, **arguments: Any) -> list[float]:
    """Train one adapter of a composed model, and save the whole model.

    Args:
        model: the composed model's folder.
        adapter: the adapter's name.
        data: a JSON Lines file.
        output: folder for the trained model.
        arguments: of `TrainingArguments`.

    Returns:
        The loss of each logged step.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    switch = AutoModelForCausalLM.from_pretrained(model)
    print(f"{adapter}: {freeze_others(switch, adapter):,} parameters to train")
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(
        switch,
        TrainingArguments(str(output / "states"), save_strategy="no", report_to=[], **arguments),
        train_dataset=examples(lines, tokenizer, adapter),
        data_collator=lambda batch: padded(batch, pad),
    )
    trainer.train()
    switch.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="composed model with the slot")
    parser.add_argument("adapter", help="the slot's name")
    parser.add_argument("data", type=Path, help="JSON Lines file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    losses = train(
        options.model,
        options.adapter,
        options.data,
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=1,
    )
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last" if losses else "too few steps to log a loss")


if __name__ == "__main__":
    main()
