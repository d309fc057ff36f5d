"""Files from third parties are read into checked records, or give an error that names the file and the key."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core.adapter_config import AdapterConfig, read_adapter_config
from granite_switch.core.border import check_name, read_json, read_yaml
from granite_switch.errors import AdapterError, CheckpointError, SwitchError


def written(folder: Path, **keys: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **keys}))
    return folder


@pytest.mark.parametrize("keys", [
    {"r": 0}, {"r": -1}, {"r": 4.0}, {"r": True}, {"r": None}, {"r": "4"}, {"r": 2**40},
    {"lora_alpha": None}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")},
    {"lora_alpha": [8]}, {"rank_pattern": [1]}, {"rank_pattern": {"*.q_proj": 4}}, {"rank_pattern": {"(q_proj": 4}},
    {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": "4"}}, {"alpha_pattern": {"q_proj": None}},
    {"alpha_pattern": {"q": -1}}, {"alora_invocation_tokens": 5}, {"alora_invocation_tokens": ["a"]},
    {"alora_invocation_tokens": [-1]}, {"alora_invocation_tokens": [1.0]}, {"use_rslora": "yes"}, {"bias": None},
    {"target_modules": 3}, {"base_model_name_or_path": 3}, {"bias": "all"}, {"init_lora_weights": "pissa"},
    {"rank_pattern": {"q" * 2000: 4}}, {"rank_pattern": {"q{e<=1}": 4}}, {"rank_pattern": {"((((" * 2000: 4}},
])  # fmt: skip
def test_a_wrong_key_is_named(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(written(tmp_path, **keys))
    assert next(iter(keys)) in str(caught.value)
    assert "adapter_config.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(written(tmp_path, r=None, lora_alpha="x", rank_pattern={"*": 1}))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("value", [True, 1, "on", [1], {"a": 1}])
@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "a_key_of_the_next_release"])
def test_features_are_allowed_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=key):
        read_adapter_config(written(tmp_path, **{key: value}))
    for off in (None, False, [], {}):
        read_adapter_config(written(tmp_path, **{key: off}))


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig

    settings = {"rank_pattern": {r"layers\.[01]\.self_attn\.(q|k)_proj": 2}, "alpha_pattern": {"v_proj": 7}}
    config = LoraConfig(r=4, lora_alpha=16.5, target_modules=["q_proj"], use_rslora=True, **settings)
    config.save_pretrained(tmp_path)
    read = read_adapter_config(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora) == (4, 16.5, True)
    assert [read.rank_of(f"model.layers.{i}.self_attn.k_proj") for i in (1, 2)] == [2, 4]
    assert read.alpha_of("model.layers.0.self_attn.v_proj") == 7


@given(
    st.dictionaries(
        st.sampled_from(["q_proj", ".*", r"layers\.1\.", r"(a|q)_proj", r"mlp\.\w+", "x?"]), st.integers(1, 9)
    )
)
def test_patterns_mean_what_peft_says(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    config = AdapterConfig(rank_pattern=patterns, r=99)
    for path in ("model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "a_proj"):
        assert config.rank_of(path) == patterns.get(get_pattern_key(list(patterns), path), 99)


@pytest.mark.parametrize("pattern", [r"(\w|\w\w)*[!?]", r"([a-z_.0-9]+)+!", "(.|.)+!" * 2, ".*" * 40 + "!"])
def test_a_pattern_that_backtracks_is_cut_off(pattern: str) -> None:
    config = AdapterConfig(rank_pattern={pattern: 1})
    began = time.monotonic()
    with suppress(AdapterError):
        assert config.rank_of("model.layers.30.self_attn.q_proj" * 4) == config.r
    assert time.monotonic() - began < 5


def test_what_is_cut_off_is_named() -> None:
    with pytest.raises(AdapterError, match=r"'\(a\|aa\)\+\[!\?\]' takes too long"):
        AdapterConfig(alpha_pattern={"(a|aa)+[!?]": 1}).alpha_of("a" * 200)


@pytest.mark.parametrize("text", [
    "", "{", "[" * 100_000, '{"a": ' * 300 + "1" + "}" * 300, "1" * 5000, '"\\ud800"', b"\xff\xfe", "nan"
])  # fmt: skip
def test_what_is_no_json(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"a\.json: cannot be read as JSON"):
        read_json(tmp_path / "a.json")


LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]


@pytest.mark.parametrize("text", [
    "a: [", "!!python/object:os.system x", "? {a: b}\n: c", "[" * 20_000, "\x00", "- 0o9:x\n\t",
    "a: &a [*a]", "a0: &a0 [x, x]\n" + "\n".join(LEVELS),
])  # fmt: skip
def test_what_is_no_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(AdapterError, match=r"a\.yaml: cannot be read as YAML"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_plain_file(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(SwitchError, match="not a regular file"):
            read(path)


@given(st.text(max_size=12))
def test_a_name_that_is_taken_is_one_file_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except SwitchError:
        return
    path = Path("/models/m") / f"adapter-{name}.safetensors"
    assert path.parent == Path("/models/m")
    assert str(path.resolve()).startswith("/models/m/adapter-")
