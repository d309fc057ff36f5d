"""Send requests with unmodified clients: `python clients.py CLIENT URL < requests.json > answers.json`.

Runs in the clients' environment, without this project. A request is `{"model", "messages"}`, optionally with `"stream"`
or `"adapters"` (one per user message). An answer is `{"model", "text"}` with its token counts.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

KEY = "secret"
SETTINGS = {"temperature": 0, "max_tokens": 40}


def marked(messages: list[dict[str, str]], adapters: list[str]) -> list[dict[str, str]]:
    """The messages, with an adapter in each user message."""
    names = iter(adapters)
    return [m | {"adapter": next(names, "base")} if m["role"] == "user" else m for m in messages]


def answer(model: str, text: str, usage: Any = None) -> dict[str, Any]:
    usage = json.loads(json.dumps(usage, default=lambda value: value.model_dump())) or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    counts = {"prompt": usage.get("prompt_tokens"), "completion": usage.get("completion_tokens"), "cached": cached}
    return {"model": model, "text": text, **counts}


def openai_client(url: str) -> tuple[list[str], Callable[..., Any]]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=KEY)

    def ask(model: str, messages: Any, stream: bool = False, adapters: list[str] | None = None) -> Any:
        messages = marked(messages, adapters) if adapters else messages
        found = client.chat.completions.create(model=model, messages=messages, stream=stream, **SETTINGS)
        if stream:
            chunks = list(found)
            return answer(chunks[-1].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        return answer(found.model, found.choices[0].message.content, found.usage)

    return [model.id for model in client.models.list()], ask


def litellm_client(url: str) -> tuple[list[str], Callable[..., Any]]:
    import litellm

    models = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=url.removesuffix("/v1"), api_key=KEY
    )

    def ask(model: str, messages: Any, stream: bool = False, adapters: list[str] | None = None) -> Any:
        messages = marked(messages, adapters) if adapters else messages
        options = {**SETTINGS, "api_base": url, "api_key": KEY}
        found = litellm.completion(model=f"openai/{model}", messages=messages, stream=stream, **options)
        if stream:
            chunks = list(found)
            return answer(chunks[0].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        return answer(found.model, found.choices[0].message.content, found.usage)

    return models, ask


def langchain_client(url: str) -> tuple[list[str], Callable[..., Any]]:
    from langchain_openai import ChatOpenAI

    def chat(model: str, **more: Any) -> Any:
        return ChatOpenAI(base_url=url, api_key=KEY, model=model, **SETTINGS, **more)

    def ask(model: str, messages: Any, stream: bool = False, adapters: list[str] | None = None) -> Any:
        # LangChain allows extra fields in requests, not in messages
        more = {"extra_body": {"chat_template_kwargs": {"message_adapters": adapters}}} if adapters else {}
        if stream:
            chunks = list(chat(model).stream(messages))
            names = {chunk.response_metadata.get("model_name") for chunk in chunks} - {None}
            return answer(names.pop(), "".join(chunk.content for chunk in chunks))
        found = chat(model, **more).invoke(messages)
        return answer(found.response_metadata["model_name"], found.content, found.response_metadata["token_usage"])

    return [model.id for model in chat("any").root_client.models.list()], ask


def main() -> None:
    name, url = sys.argv[1:]
    models, ask = {"openai": openai_client, "litellm": litellm_client, "langchain": langchain_client}[name](url)
    given = json.load(sys.stdin)
    answers = [ask(**request) for request in given["requests"]]
    messages, turns = [], []
    for number, (text, _) in enumerate(given["turns"], 1):
        messages.append({"role": "user", "content": text})
        adapters = [adapter for _, adapter in given["turns"][:number]]
        turns.append(ask(given["base"], messages, adapters=adapters))
        messages.append({"role": "assistant", "content": turns[-1]["text"]})
    json.dump({"models": models, "answers": answers, "turns": turns}, sys.stdout)


main()
