"""config.json's `switch`: read and written without loss; contradictions and newer formats are refused."""

import json
from dataclasses import replace

import pytest

from granite_switch.core.layout import AdapterTensor, parse_key
from granite_switch.core.spec import AdapterSpec, SwitchSpec
from granite_switch.errors import CheckpointError


def _adapter(name: str, token: int, **more) -> AdapterSpec:
    return AdapterSpec(name, "lora", f"<|{name}|>", token, 2, 8, 16.0, ("q_proj",), **more)


SPEC = SwitchSpec(
    (_adapter("a", 11, rank_pattern={"q_proj": (8, 0)}), _adapter("b", 12, retired=True), _adapter("c.d", 13)),
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
    assert [adapter.rank_of("q_proj", layer) for layer in (0, 1)] == [8, 0]
    assert adapter.rank_of("k_proj", 0) == 0
    assert adapter.scale_of("q_proj", 0) == 2.0


@pytest.mark.parametrize("name", ["plain", "guardian-core", "v1.2", "a-b-c", "a%2Eb", "ünï"])
def test_tensor_names_round_trip(name: str) -> None:
    tensor = AdapterTensor(name, 17, "down_proj", "B")
    assert parse_key(tensor.key) == tensor
    assert "." not in tensor.parameter


def test_base_tensors_are_not_taken_for_adapters() -> None:
    assert parse_key("model.layers.0.self_attn.q_proj.weight") is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format 2"),
        ({"format_version": None}, "format None"),
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
