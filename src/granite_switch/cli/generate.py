"""`granite-switch generate`: answer one chat with one adapter, streamed, with an optional trace of the tokens."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from granite_switch.cli import options
from granite_switch.cli.command import require
from granite_switch.cli.console import calm_libraries, console, shows_progress, stderr
from granite_switch.errors import CheckpointError, SwitchError, TemplateError


def generate(
    model: options.Model,
    message: Annotated[
        list[str], typer.Option("--message", "-m", help="User message; repeat to alternate user and assistant.")
    ],
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", help="Adapter that answers; by default the base model.")
    ] = "base",
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    document: Annotated[
        list[Path] | None, typer.Option("--document", "-d", help="Text or JSON file; repeatable.", exists=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    device_map: options.DeviceMap = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Print each token in its slot's colour.")] = False,
    trace_html: Annotated[Path | None, typer.Option(help="Write the trace to an HTML file.")] = None,
) -> None:
    """Generate with one adapter of a composed model."""
    documents = [entry for number, path in enumerate(document or (), 1) for entry in read_document(path, number)]
    loaded, tokenizer = load(model, device_map)
    spec = loaded.config.switch_spec
    spec.slot(adapter)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(message)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    prompt = encode(tokenizer, messages, documents, adapter)
    streamer = None
    if not json_ and not trace:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "streamer": streamer}
    if temperature > 0:
        settings["temperature"] = temperature
    sequence = loaded.generate(**prompt.to(loaded.device), **settings)[0].tolist()

    from granite_switch.cli import trace as tracing

    length = prompt["input_ids"].shape[1]
    tokens = tracing.trace(sequence, length, spec, lambda i: tokenizer.decode([i]))
    if trace_html:
        trace_html.write_text(tracing.page(tokens, spec), encoding="utf-8")
        stderr.print(f"trace written: {trace_html}")
    if json_:
        record = {
            "adapter": adapter,
            "text": tokenizer.decode(sequence[length:], skip_special_tokens=True),
            "prompt_tokens": length,
            "generated_tokens": len(sequence) - length,
        }
        if trace:
            record["trace"] = [{"id": t.id, "text": t.text, "slot": t.slot} for t in tokens]
        print(json.dumps(record, ensure_ascii=False))
    elif trace:
        tracing.show(tokens, spec, console)


def read_document(path: Path, number: int) -> list[dict[str, Any]]:
    """The documents in a file: a text file is one; a JSON file contains one or a list."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SwitchError(f"--document {path} cannot be read as text ({error})") from None
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SwitchError(f"--document {path} is not JSON ({error})") from None
        documents = data if isinstance(data, list) else [data]
        if not all(isinstance(entry, dict) for entry in documents):
            raise SwitchError(f"--document {path} is neither a JSON object nor a list of them")
        return documents
    return [{"doc_id": str(number), "title": path.stem, "text": text.strip()}]


def load(model: str, device_map: str) -> tuple[Any, Any]:
    """A model and its tokenizer, loaded with transformers.

    Raises:
        CheckpointError: there is no such model, or it has no adapters.
    """
    require("transformers", "torch", "accelerate", extra="hf")
    calm_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import granite_switch.hf  # noqa: F401  (registers the Auto classes)
    from granite_switch.core.files import inside
    from granite_switch.core.records import read_config

    if not shows_progress():
        logging.disable_progress_bar()
    if "/" in model and not os.path.exists(model) and (Path(model).is_absolute() or model.startswith(".")):
        raise CheckpointError(f"{model}: no such folder")
    if os.path.isdir(model):
        read_config(inside(Path(model), "config.json"))
    try:
        config = AutoConfig.from_pretrained(model)
        if getattr(config, "switch", None) is None:
            raise CheckpointError(
                f"{model} is not a composed model: its model_type is {config.model_type!r}",
                hint="make one with granite-switch compose",
            )
        return (
            AutoModelForCausalLM.from_pretrained(model, config=config, device_map=device_map),
            AutoTokenizer.from_pretrained(model),
        )
    except (OSError, ValueError) as error:
        if isinstance(error, SwitchError):
            raise
        raise CheckpointError(f"{model} cannot be loaded ({str(error).splitlines()[0]})") from None


def encode(tokenizer: Any, messages: list[dict[str, str]], documents: list[dict[str, Any]], adapter: str) -> Any:
    """Render and tokenise a chat; returns the inputs for `generate`."""
    import jinja2

    if not tokenizer.chat_template:
        raise TemplateError("the model has no chat template", hint="place control tokens yourself (docs/format.md)")
    try:
        return tokenizer.apply_chat_template(
            messages,
            documents=documents or None,
            adapter_name=None if adapter == "base" else adapter,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except jinja2.TemplateError as error:
        raise TemplateError(str(error)) from None
