"""One conversation through four steps on one growing KV cache: rewrite, answer, answerability check, back to base.

Control tokens within the sequence switch the adapter; nothing before them is computed again. Run it on the sample:

    python examples/flow.py out/granite-switch-sample
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import granite_switch.hf  # noqa: F401  (registers the Auto classes)

OPEN, CLOSE, END = "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\n"
DOCUMENTS = [{"text": "Ada lives in Tarn. Ada works as a baker."}, {"text": "Hugo plays the harp."}]
HISTORY = [
    {"role": "user", "content": "What does Ada work as?"},
    {"role": "assistant", "content": "Ada works as a baker."},
    {"role": "user", "content": "Where does she live?"},
]
REWRITE = "<rewrite> Write the last question so that it stands alone."


@dataclass
class Step:
    """The cost and the result of one step."""

    name: str
    cached: int  # tokens taken from the cache
    prefilled: int  # tokens computed before the first new one
    text: str
    sequence: list[int]  # all tokens so far, including the answer
    logits: torch.Tensor  # [new tokens, vocabulary], one row per generated token


class Flow:
    """A sequence of tokens and its KV cache, both of which only grow."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ids: list[int] = []
        self.cache = DynamicCache(config=model.config)
        self.steps: list[Step] = []

    def step(self, name: str, text: str, max_new_tokens: int = 48) -> str:
        """Append text (control tokens included), prefill what is new, and generate an answer."""
        self.ids = [*self.ids, *self.tokenizer.encode(text, add_special_tokens=False)]
        cached = self.cache.get_seq_length()
        output = self.model.generate(
            torch.tensor([self.ids], device=self.model.device),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sequence = output.sequences[0].tolist()
        answer = self.tokenizer.decode(sequence[len(self.ids) :], skip_special_tokens=True)
        logits = torch.cat(output.logits)
        self.steps.append(Step(name, cached, len(self.ids) - cached, answer, sequence, logits))
        self.ids = sequence
        return answer


def run(model: Any, tokenizer: Any) -> list[Step]:
    """The four steps, on the sample."""
    spec = model.config.switch_spec
    rewrite, check = spec.adapter("query_rewrite"), spec.adapter("answerability")
    flow = Flow(model, tokenizer)

    # The rewrite's control token replaces the first token of its invocation text.
    start = tokenizer.apply_chat_template(
        [*HISTORY, {"role": "user", "content": REWRITE}],
        documents=DOCUMENTS,
        adapter_name=rewrite.name,
        add_generation_prompt=True,
        tokenize=False,
    )
    rewritten = flow.step("rewrite", start)

    # Back to base: its control token replaces the token that opens the next turn.
    question = rewritten.split('"')[3] if rewritten.count('"') >= 4 else HISTORY[-1]["content"]
    turn = f"\n{spec.base_token}user{CLOSE}{question}{END}"
    flow.step("answer", f"{turn}{OPEN}assistant{CLOSE}")

    # The check acts from the assistant marker; its control token replaces the marker's first token.
    flow.step("check", f"\n{OPEN}user{CLOSE}What does Hugo eat?{END}{check.token}assistant{CLOSE}")
    flow.step("back to base", f"\n{spec.base_token}assistant{CLOSE}")
    return flow.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a composed model that holds query_rewrite and answerability")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print(f"{'step':14}{'cached':>8}{'prefilled':>11}  answer")
    for step in run(model, tokenizer):
        print(f"{step.name:14}{step.cached:8}{step.prefilled:11}  {step.text}")


if __name__ == "__main__":
    main()
