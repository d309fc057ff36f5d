"""Ask every adapter of a GGUF file through llama-cpp-python.

The file contains everything: weights, tokenizer, chat template and adapter names. With the sample:

    granite-switch export gguf out/granite-switch-sample --output out/sample.gguf
    python examples/with_llama_cpp.py out/sample.gguf

With your own model, give a message, and an adapter's name to ask only that adapter:

    python examples/with_llama_cpp.py model.gguf --adapter answerability --message "Where does Ada live?"
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--adapter", help="ask only this adapter; `base` is the base model")
    parser.add_argument("--message", help="the question; by default the sample's own questions")
    options = parser.parse_args()

    llm = Llama(str(options.file), n_ctx=2048, verbose=False)
    for name in [options.adapter] if options.adapter else ["base", *adapters(llm)]:
        if options.message:
            print(f"{name}: {answer(llm, [{'role': 'user', 'content': options.message}], name)}")
            continue
        example = sample_example(name)
        text = answer(llm, example.messages, name, documents=example.documents)
        print(
            f"{name}\n  asked:    {example.messages[-1]['content']}\n  answered: {text}\n  expected: {example.expected}"
        )


def adapters(llm: Llama) -> list[str]:
    """The names that `answer` accepts."""
    records = json.loads(llm.metadata["granite_switch.switch"])["adapters"]
    return [record["name"] for record in records if not record.get("retired")]


def answer(
    llm: Llama,
    messages: Sequence[Mapping[str, Any]],
    adapter: str = "base",
    *,
    documents: Sequence[Mapping[str, Any]] | None = None,
    max_tokens: int = 96,
) -> str:
    """The greedy answer to a prompt that is rendered with the adapter's control token."""
    template = Jinja2ChatFormatter(
        llm.metadata["tokenizer.chat_template"],
        eos_token=token_text(llm, llm.token_eos()),
        bos_token=token_text(llm, llm.token_bos()),  # Llama's templates write the BOS token
    )
    prompt = template(messages=list(messages), adapter_name=adapter, documents=documents).prompt
    tokens = llm.tokenize(prompt.encode(), add_bos=False, special=True)
    result = llm.create_completion(tokens, max_tokens=max_tokens, temperature=0)
    return result["choices"][0]["text"]


def token_text(llm: Llama, token: int) -> str:
    """The text of a special token; empty if the model has none."""
    return llm.detokenize([token], special=True).decode() if token >= 0 else ""


def sample_example(name: str) -> Any:
    """A held-out example of one of the sample's tasks."""
    sys.path.insert(0, str(ROOT / "sample"))
    import world

    return world.examples("answer" if name == "base" else name, 1, seed=7)[0]


if __name__ == "__main__":
    main()
