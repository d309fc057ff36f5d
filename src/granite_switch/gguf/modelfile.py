"""Ollama Modelfiles for an exported file: one for the base and one for each adapter, all with the same weights.

Ollama renders prompts with a Go template, to which no adapter name can be passed. So each Modelfile has a Go template
for one adapter, derived from what the chat template renders for one turn of marker texts. An adapter whose invocation
text the user has to write gets no Modelfile.
"""

from collections.abc import Mapping

from granite_switch.core.chat import render
from granite_switch.errors import TemplateError

_SYSTEM, _USER, _ANSWER, _NEXT = "switch-system", "switch-user", "switch-answer", "switch-next"


def modelfiles(
    file: str, template: str, adapters: tuple[str, ...], special_tokens: Mapping[str, str], context: int
) -> dict[str, str]:
    """Adapter name -> text of its Modelfile; the base's name is "".

    Args:
        file: the GGUF file's path, relative to the Modelfile.
        template: the composed chat template.
        adapters: names.
        special_tokens: bos_token and the like, as passed to the template.
        context: the model's context length, in tokens.
    """
    result = {}
    for name in ("", *adapters):
        try:
            go = _go_template(template, {**special_tokens, "adapter_name": name})
        except TemplateError:
            continue
        lines = [f"FROM ./{file}", f'TEMPLATE """{go}"""', f"PARAMETER num_ctx {min(context, 8192)}"]
        if stop := special_tokens.get("eos_token"):
            lines.append(f'PARAMETER stop "{stop}"')
        if name:
            lines += ["# an adapter's answers are short and exact", "PARAMETER temperature 0"]
        result[name] = "\n".join(lines) + "\n"
    return result


def _go_template(template: str, variables: Mapping[str, str]) -> str:
    """The Go template for one turn, with and without a system prompt, including the text that ends an answer.

    Raises:
        TemplateError: the chat template refuses the turn, or changes users' text.
    """
    user = {"role": "user", "content": _USER}
    with_system = _between(
        render(template, [{"role": "system", "content": _SYSTEM}, user], add_generation_prompt=True, **variables),
        (_SYSTEM, _USER),
    )
    alone = _between(render(template, [user], add_generation_prompt=True, **variables), (_USER,))
    answer, following = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}
    base = {key: value for key, value in variables.items() if key != "adapter_name"}
    _, _, turn, _ = _between(render(template, [user, answer, following], **base), (_USER, _ANSWER, _NEXT))
    opening = _between(render(template, [user], **base), (_USER,))[0]
    close = turn.removesuffix(opening) if turn.endswith(opening) else base.get("eos_token", "")
    first = f"{with_system[0]}{{{{ .System }}}}{with_system[1]}{{{{ .Prompt }}}}{with_system[2]}"
    second = f"{alone[0]}{{{{ .Prompt }}}}{alone[1]}"
    return f"{{{{ if .System }}}}{first}{{{{ else }}}}{second}{{{{ end }}}}{{{{ .Response }}}}{close}"


def _between(text: str, marks: tuple[str, ...]) -> list[str]:
    """The pieces of a text between marks, each of which must occur once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text or "{{" in before or '"""' in before:
            raise TemplateError("the chat template cannot be written as an Ollama template")
        pieces.append(before)
    return [*pieces, text]
