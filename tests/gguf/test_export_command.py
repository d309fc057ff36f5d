"""`granite-switch export gguf` and the Modelfiles next to its output."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from artefacts import CHATML, CHATML_TEMPLATE
from typer.testing import CliRunner

from granite_switch.cli import app
from granite_switch.core.chat import render
from granite_switch.core.tokenizer import read_tokenizer
from granite_switch.errors import SwitchError, TemplateError
from granite_switch.gguf.modelfile import modelfiles

RUN = CliRunner()


def go(template: str, system: str, prompt: str, response: str = "") -> str:
    """Ollama's rendering of one turn, for the template actions used here."""
    text = re.sub(
        r"{{ if \.System }}(.*?){{ else }}(.*?){{ end }}", r"\1" if system else r"\2", template, flags=re.DOTALL
    )
    for key, value in (("System", system), ("Prompt", prompt)):
        text = text.replace(f"{{{{ .{key} }}}}", value)
    before, after = text.split("{{ .Response }}")
    return before + response + after if response else before


def template_of(modelfile: str) -> str:
    found = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    assert found
    return found[1]


def test_the_command(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "model.gguf"
    arguments = ["export", "gguf", str(model), "--output", str(output), "--outtype", "q8_0", "--modelfile"]
    done = RUN.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "q8_0, gpt-2): check, cite, rewrite" in done.stdout.replace("\n", "")
    assert "one adapter per sequence" in done.stderr
    assert "no Modelfile for rewrite" in done.stderr
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"model.gguf", "model.Modelfile", "model.check.Modelfile", "model.cite.Modelfile"}
    with pytest.raises(SwitchError, match="already exists"):
        RUN.invoke(app, arguments, catch_exceptions=False)
    output.unlink()
    with pytest.raises(SwitchError, match=r"model\.Modelfile: already exists"):
        RUN.invoke(app, arguments, catch_exceptions=False)
    assert not output.exists()
    assert RUN.invoke(app, [*arguments, "--force"]).exit_code == 0
    assert RUN.invoke(app, ["export", "gguf", str(model), "-o", str(output), "--outtype", "q3"]).exit_code == 2
    inspected = RUN.invoke(app, ["inspect", str(output), "--json"])
    assert [a["name"] for a in json.loads(inspected.stdout)["adapters"]] == ["check", "cite", "rewrite"]


@pytest.mark.parametrize("chatml", [False, True])
def test_modelfiles_render_what_the_chat_template_renders(make_model: Any, model: Path, chatml: bool) -> None:
    folder = model
    if chatml:
        folder = make_model(specials=CHATML, template=CHATML_TEMPLATE, invocation="<|im_start|>assistant\n")
    tokenizer = read_tokenizer(folder)
    template = tokenizer.templates["default"]
    files = modelfiles("model.gguf", template, ("check", "cite", "rewrite"), tokenizer.special_tokens, 4096)
    assert "rewrite" not in files
    for name, text in files.items():
        for system in ("", "Be brief."):
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": "Where?"})
            wanted = render(
                template, messages, add_generation_prompt=True, adapter_name=name, **tokenizer.special_tokens
            )
            assert go(template_of(text), system, "Where?") == wanted
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    turns.append({"role": "user", "content": "When?"})
    base = template_of(files[""])
    wanted = render(template, turns, add_generation_prompt=True, **tokenizer.special_tokens)
    if not chatml:  # that template drops a part of an answer's opening later
        assert go(base, "", "Where?", "There.") + go(base, "", "When?") == wanted
    assert 'PARAMETER stop "' in files[""]


def test_a_template_that_changes_what_users_write_gets_no_modelfile() -> None:
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert modelfiles("m.gguf", template, (), {}, 10) == {}


def test_the_template_bears_llama_servers_way_of_rendering(model: Path) -> None:
    template = read_tokenizer(model).templates["default"]
    messages = [{"role": "user", "content": "Where?"}]
    # it renders once without the variable, to see what the generation prompt adds
    before = render(template, messages, adapter_name="cite", add_generation_prompt=jinja2.Undefined())
    whole = render(template, messages, adapter_name="cite", add_generation_prompt=True)
    assert whole == before + "<|cite|>assistant<|end_of_role|>"
    with pytest.raises(TemplateError, match="invocation text"):
        render(template, messages, adapter_name="cite", add_generation_prompt=False)
