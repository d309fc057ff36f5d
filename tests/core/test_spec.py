"""config.json's `switch`: read and written without loss; contradictions and newer formats are refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core.layout import AdapterTensor, fold, parse_key, unfold
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.errors import CheckpointError

Q = "model.layers.{}.self_attn.q_proj"


def _adapter(name: str, token: int, **more) -> AdapterSpec:
    return AdapterSpec(name, "lora", f"<|{name}|>", token, 2, 8, 16.0, (Q.format(0), Q.format(1)), **more)


SPEC = SwitchSpec(
    (_adapter("a", 11, rank_pattern={Q.format(1): 4}), _adapter("b", 12, retired=True), _adapter("c.d", 13)),
    base_token="<|return_to_base|>",
    base_token_id=10,
    base_substitute_token_id=2,
)


def test_round_trip() -> None:
    assert SwitchSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_slots_and_substitutes() -> None:
    assert SPEC.control_slots == {10: 0, 11: 1, 12: 0, 13: 3}
    assert SPEC.substitutes == {10: 2, 11: 2, 12: 2, 13: 2}
    assert SPEC.names == ("a", "c.d")
    assert SPEC.slot("c.d") == 3
    with pytest.raises(CheckpointError, match="no adapter 'b'"):
        SPEC.slot("b")


def test_patterns() -> None:
    adapter = SPEC.adapters[0]
    assert adapter.ranks == {Q.format(0): 8, Q.format(1): 4}
    assert adapter.modules == ("q_proj",)
    assert (adapter.scale_of(Q.format(0)), adapter.scale_of(Q.format(1))) == (2.0, 4.0)
    assert SPEC.to_dict()["adapters"][0]["targets"] == ["model.layers.[0-1].self_attn.q_proj"]


@given(st.dictionaries(st.tuples(st.integers(0, 99), st.sampled_from("abc")), st.integers(1, 3)), st.booleans())
def test_paths_fold_and_unfold(values: dict, deep: bool) -> None:
    tail = ".0.w" if deep else ".w"
    paths = {f"model.layers.{i}.{name}{tail}": value for (i, name), value in values.items()} | {"model.single": 9}
    folded = fold(paths)
    assert unfold(folded) == paths
    assert len(folded) <= 1 + 9


@pytest.mark.parametrize("targets", [["model.layers.[x].q"], ["model.layers.[0-99999999].q"], [3], "q_proj"])
def test_targets_that_cannot_be_read(targets: object) -> None:
    data = SPEC.to_dict()
    data["adapters"][0]["targets"] = targets
    with pytest.raises(CheckpointError):
        SwitchSpec.from_dict(data)


@pytest.mark.parametrize("name", ["plain", "guardian-core", "v1.2", "a-b-c", "a%2Eb", "ünï"])
def test_tensor_names_round_trip(name: str) -> None:
    tensor = AdapterTensor(name, "model.layers.17.mlp.down_proj", "B")
    assert parse_key(tensor.key) == tensor
    assert "." not in tensor.parameter


def test_base_tensors_are_not_taken_for_adapters() -> None:
    assert parse_key("model.layers.0.self_attn.q_proj.weight") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format 2"),
        ({"format_version": None}, "format null"),
        ({"colour": "red"}, "unknown key"),
        ({"adapters": [{"name": "a"}]}, "missing"),
    ],
)
def test_bad_records_are_refused(change: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        SwitchSpec.from_dict({**SPEC.to_dict(), **change})


def test_contradictions_are_named_together() -> None:
    bad = replace(SPEC, adapters=(_adapter("a", 11), _adapter("a", 10), replace(_adapter("x", 2), token_id=2)))
    with pytest.raises(CheckpointError) as caught:
        SwitchSpec.from_dict(bad.to_dict())
    assert len(caught.value.problems) >= 3
