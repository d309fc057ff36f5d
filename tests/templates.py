"""Chat templates like real ones, which between them print everything that a chat can contain."""

from artefacts import CHATML, ROLES, SHARED_DATA

LLAMA = ["<|begin_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]

_TEXT = """\
{%- macro text(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is defined and content is not none -%}
        {%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}[{{ part.type }}]{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""  # noqa: E501

GRANITE = (
    _TEXT
    + """\
{%- set head = namespace(text='') -%}
{%- if tools %}{% for tool in tools %}{% set head.text = head.text + (tool | tojson) + '\\n' %}{% endfor %}{% endif -%}
{%- if documents %}{% for document in documents -%}
    {% set head.text = head.text + '[' ~ document.doc_id ~ ' ' ~ document.title ~ ']' ~ document.text + '\\n' %}
{%- endfor %}{% endif -%}
{%- if note is defined %}{% set head.text = head.text + note %}{% endif -%}
{%- if messages and messages[0].role == 'system' -%}
    {{- '<|start_of_role|>system<|end_of_role|>' + text(messages[0].content) + head.text + '<|end_of_text|>\\n' -}}
{%- elif head.text -%}
    {{- '<|start_of_role|>system<|end_of_role|>' + head.text + '<|end_of_text|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (loop.first and message.role == 'system') -%}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}{{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' -}}{%- endfor -%}
    {{- '<|end_of_text|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""  # noqa: E501
)

# drops the thinking of earlier turns, and opens a new answer differently from how it writes an earlier one
CHATML_THINKING = (
    _TEXT
    + """\
{%- if tools or documents or note is defined -%}
    {{- '<|im_start|>system\\n' -}}
    {%- for tool in tools or [] -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
    {%- for document in documents or [] -%}{{- document | tojson ~ '\\n' -}}{%- endfor -%}
    {{- note if note is defined -}}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {{- text(message.content).split('</think>')[-1].lstrip('\\n') -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '\\n<call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '</call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- text(message.content) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n\\n') -}}
{%- endif -%}
"""
)

# starts with a token that later turns do not have, and strips messages
LLAMA_TEMPLATE = (
    _TEXT
    + """\
{{- bos_token -}}
{%- if documents or tools or note is defined -%}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
    {%- for page in documents or [] -%}{{- page.doc_id ~ page.title ~ page.text ~ '\\n' -}}{%- endfor -%}
    {%- for tool in tools or [] -%}{{- (tool | tojson(indent=2)) ~ '\\n' -}}{%- endfor -%}
    {{- note if note is defined -}}
    {{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (text(message.content) | trim) -}}
    {%- for call in message.tool_calls or [] -%}{{- '<|python_tag|>' ~ (call | tojson) -}}{%- endfor -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
)


def real_granite() -> str | None:
    """Granite 4.0's own template, if it is next to the checkout."""
    path = SHARED_DATA / "chat_templates" / "granite-4.0.jinja"
    return path.read_text() if path.is_file() else None


# template, its tokenizer's special tokens, invocation text that opens an answer
FAMILIES: dict[str, tuple[str, list[str], str]] = {
    "granite": (GRANITE, ROLES, "<|start_of_role|>assistant<|end_of_role|>"),
    "chatml": (CHATML_THINKING, CHATML, "<|im_start|>assistant\n"),
    "llama": (LLAMA_TEMPLATE, LLAMA, "<|start_header_id|>assistant<|end_header_id|>"),
}
if template := real_granite():
    FAMILIES["granite 4.0"] = (template, ROLES, "<|start_of_role|>assistant<|end_of_role|>")
