"""Tools that do not import this package need only `trust_remote_code=True`; each runs in its own process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from artefacts import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import granite_switch.hf  # noqa: F401
from granite_switch import compose
from granite_switch.composition.verify import verify
from granite_switch.core.remote import MODULE
from granite_switch.errors import CheckpointError

HERE = Path(__file__).parent


def run(tmp_path: Path, *arguments: object, answers: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process with its own cache of remote code, and with answers to prompts on stdin."""
    own = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", **environment}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, env=own, capture_output=True, text=True, timeout=300, input=answers)


def test_pipeline_and_saving_in_a_process_that_never_imports_us(composed: Path, tmp_path: Path) -> None:
    done = run(tmp_path, HERE / "remote_worker.py", composed, tmp_path / "saved")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(composed)
    tokenizer = AutoTokenizer.from_pretrained(composed)
    prompt = tokenizer("<|citations|>the river ends", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert record["class"] == "GraniteSwitchForCausalLM"
    assert record["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert record["files"] == [MODULE]
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    torch.testing.assert_close(torch.tensor(record["logits"]), logits, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == json.loads((composed / "config.json").read_text())["auto_map"]


def test_our_own_loading_asks_nothing(composed: Path, tmp_path: Path) -> None:
    code = (
        "import granite_switch.hf, sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "M.from_pretrained(sys.argv[1]); T.from_pretrained(sys.argv[1]); M.from_pretrained(sys.argv[1],"
        "trust_remote_code=True); assert not [n for n in sys.modules if n.startswith('transformers_modules.')]"
    )
    done = run(tmp_path, "-c", code, composed, HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="warning")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "warn" not in done.stderr.lower()
    assert "trust_remote_code" not in done.stderr


def test_a_tokenizer_alone_needs_no_code(composed: Path, tmp_path: Path) -> None:
    """`trust_remote_code=False` asks nothing. Without it transformers asks on stdin, and no gives the same ids."""
    code = (
        "import sys; from transformers import AutoTokenizer as T; folder, text = sys.argv[1:];"
        "ids = T.from_pretrained(folder, trust_remote_code=False)(text)['input_ids']; print(ids);"
        "assert T.from_pretrained(folder)(text)['input_ids'] == ids; print(sys.stdin.read());"
        "assert not [name for name in sys.modules if name.startswith('granite_switch')]"
    )
    text = "<|citations|>the river ends"
    done = run(tmp_path, "-c", code, composed, text, answers="n\nleft", TRANSFORMERS_VERBOSITY="warning")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    assert first == str(AutoTokenizer.from_pretrained(composed)(text)["input_ids"])
    assert done.stdout.count("[y/N]") == 1
    assert last.endswith("left")


@pytest.mark.parametrize("older", [False, True])
def test_without_the_package_the_error_says_what_to_install(older: bool, composed: Path, tmp_path: Path) -> None:
    """With no package of that name, and with release 0.1.1 under it."""
    (tmp_path / "granite_switch" / "hf").mkdir(parents=True)
    for package in ("granite_switch", "granite_switch/hf"):
        (tmp_path / package / "__init__.py").write_text("" if older else "raise ModuleNotFoundError('not here')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from transformers import AutoModelForCausalLM as M;"
        "M.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    done = run(tmp_path, "-c", code, composed, tmp_path)
    assert done.returncode == 1
    assert "pip install 'granite-switch[hf]>=0.2'" in done.stderr.strip().splitlines()[-1]


def test_verify_says_when_the_module_is_missing(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", base)
    compose(base, [tmp_path / "a"], tmp_path / "model")
    (tmp_path / "model" / MODULE).unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path / "model")
    assert MODULE in str(caught.value.problems)


TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""

MEASURE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
arguments = f"pretrained={sys.argv[1]},trust_remote_code=True,dtype=float32"
results = simple_evaluate("hf", model_args=arguments, tasks=["tiny"], log_samples=True, device="cpu", batch_size=1,
                          task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False))
print(json.dumps([[r[0][0] for r in sample["resps"]] for sample in results["samples"]["tiny"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_scores_an_adapter_as_the_model_does(composed: Path, tmp_path: Path) -> None:
    questions = ["<|citations|>Is the house red?", "<|answerability|>Is it far?", "Is the river long?"]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    (tasks / "tiny.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    done = run(tmp_path, "-c", MEASURE, composed, tasks, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(composed), AutoTokenizer.from_pretrained(composed)
    for question, score in zip(questions, scores, strict=True):
        start = len(tokenizer(question)["input_ids"]) - 1
        for choice, value in zip(("yes", "no"), score, strict=True):
            whole = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                odds = model(whole).logits[0, :-1].log_softmax(-1)
            expected = odds[start:].gather(1, whole[0, start + 1 :, None]).sum().item()
            assert float(value) == pytest.approx(expected, abs=1e-3)
