"""llama.cpp's own Jinja engine, built from the package's source, renders composed templates as jinja2 does."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artefacts import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import FAMILIES

from granite_switch.core.chat import Placement, Return, render, wrap
from granite_switch.errors import TemplateError

llama_cpp = pytest.importorskip("llama_cpp", reason="needs the llama.cpp build: make test-gguf")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Engine = Callable[[str, dict[str, Any]], tuple[str | None, str]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    archives = sorted((ROOT / ".cache/sdist").glob("llama_cpp_python-*.tar.gz"))
    if not archives or not shutil.which("g++"):
        pytest.skip("needs the source of llama-cpp-python and g++")
    folder = tmp_path_factory.mktemp("engine")
    with tarfile.open(archives[-1]) as archive:
        wanted = ("/common/", "/vendor/nlohmann/", "/ggml/include/")
        archive.extractall(folder, [m for m in archive if any(part in m.name for part in wanted)], filter="data")
    source = next(folder.glob("*/vendor/llama.cpp"))
    library = Path(llama_cpp.__file__).parent / "lib"
    files = [*sorted(source.glob("common/jinja/*.cpp")), source / "common/json.cpp", source / "common/unicode.cpp"]
    program = folder / "render"
    subprocess.run(
        ["g++", "-O1", "-std=c++17", *(f"-I{source / part}" for part in ("common", "vendor", "ggml/include")),
         Path(__file__).with_name("jinja_engine.cpp"), *files, next(library.glob("libggml-base.so*")),
         f"-Wl,-rpath,{library}", "-o", program],
        check=True,
    )  # fmt: skip

    def run(template: str, variables: dict[str, Any]) -> tuple[str | None, str]:
        (folder / "template").write_text(template)
        (folder / "variables").write_text(json.dumps(variables))
        done = subprocess.run([program, folder / "template", folder / "variables"], capture_output=True)
        return (done.stdout.decode() if done.returncode == 0 else None), done.stderr.decode()

    return run


words = st.sampled_from(["Who?", "hi <|tag|>", "x" * 9, "a <|unused_5|> é", "-xxxxxxxx-!", "<|first|> no"])
names = st.sampled_from(["", "base", "first", "answer", "tag"])
turns = st.lists(st.tuples(words, names, words), min_size=1, max_size=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_renders_what_jinja2_renders(family: str, engine: Engine) -> None:
    template, specials, invocation = FAMILIES[family]
    opening = "<|begin_of_text|>" if family == "llama" else specials[2]
    placements = [
        Placement("first", "<|first|>", opening=opening),
        Placement("answer", "<|answer|>", invocation=invocation, rest=invocation.removeprefix(specials[2])),
        Placement("tag", "<|tag|>", invocation="<rewrite>", rest="rewrite>", place="suffix"),
    ]
    controls = ["<|back|>", "<|first|>", "<|answer|>", "<|tag|>", "<|unused_"]
    composed = wrap(template, placements, Return("<|back|>", specials[2]), controls)

    @settings(max_examples=40)
    @given(turns, names, st.booleans())
    def run(script: list[tuple[str, str, str]], adapter: str, documents: bool) -> None:
        messages: list[dict[str, str]] = []
        for text, name, answer in script:
            marked = {"role": "user", "content": text, **({"adapter": name} if name else {})}
            messages += [marked, {"role": "assistant", "content": answer}]
        variables = {"messages": messages[:-1], "add_generation_prompt": True, "bos_token": specials[0]}
        if adapter:
            variables["adapter_name"] = adapter
        if documents:
            variables["documents"] = [{"doc_id": "1", "title": "t", "text": "A <|first|>"}]
        found, reason = engine(composed, variables)
        try:
            expected, problem = render(composed, **variables), ""
        except TemplateError as error:
            expected, problem = None, error.message.removeprefix("chat template: ")
        assert found == expected
        assert problem[:40] in reason

    run()
    chat = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True, "bos_token": specials[0]}
    assert engine(composed, chat)[1] == engine(template, chat)[1]  # capabilities that the engine detects
