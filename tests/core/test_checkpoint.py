"""Safetensors as streams: we and the safetensors library read each other's files; damage is reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from granite_switch.core.checkpoint import Checkpoint, Entry, copy_of, read_header, to_float32, write, write_index
from granite_switch.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_copies_are_exact(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    folder = tmp_path_factory.mktemp("copy")
    tensors = {
        f"t.{i}": (torch.arange(int(np.prod(shape))) % 2).reshape(shape).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }
    save_file(tensors, folder / "a.safetensors")
    header, _ = read_header(folder / "a.safetensors")
    write(folder / "b.safetensors", [copy_of(tensor) for tensor in header.values()])
    assert (folder / "b.safetensors").stat().st_size % 4096 == sum(t.nbytes for t in header.values()) % 4096  # a page
    back = load_file(folder / "b.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].float(), tensor.float())


def test_rows_are_appended(tmp_path: Path) -> None:
    matrix = torch.randn(3, 4).bfloat16()
    save_file({"m": matrix}, tmp_path / "a.safetensors")
    tensor = read_header(tmp_path / "a.safetensors")[0]["m"]
    write(tmp_path / "b.safetensors", [Entry("m", tensor.dtype, (4, 4), (tensor, tensor.row(1)))])
    assert torch.equal(load_file(tmp_path / "b.safetensors")["m"], torch.cat([matrix, matrix[1:2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_decodes_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, -1.5, 3.25], [float("inf"), 1e-3, -65000.0]]).to(dtype)
    save_file({"m": values}, tmp_path / "a.safetensors")
    read = read_header(tmp_path / "a.safetensors")[0]["m"].float32()
    assert torch.equal(torch.from_numpy(read.copy()), values.float())
    assert to_float32(b"", "BF16").shape == (0,)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"m": torch.ones(100, 100)}, path)
    whole = path.read_bytes()
    for damaged, words in [
        (whole[:-1], "its header says"),
        (whole[:20], "cut off"),
        (b"", "cut off"),
        (whole[:8] + b"x" * 64 + whole[72:], "damaged safetensors header"),
        (whole + b"more", "its header says"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words):
            read_header(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "nothing.safetensors")


def test_text_that_no_stream_can_write(tmp_path: Path) -> None:
    header = b'{"m": {"dtype": "\\ud800", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="ud800") as caught:
        read_header(tmp_path / "a.safetensors")
    assert str(caught.value).encode()


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_file({name: torch.ones(9)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {f"{n}.safetensors": read_header(tmp_path / f"{n}.safetensors")[0] for n in "abc"})
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b", "c"}
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "c.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert len(caught.value.problems) == 2


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        Checkpoint(tmp_path)
    assert "maps b to a.safetensors" in caught.value.problems[0]


@pytest.mark.parametrize("name", [
    "../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "x\\a.safetensors", "a.bin", ".a.safetensors",
    "a\0.safetensors", "C:a.safetensors", "", 3, None, ["a.safetensors"],
])  # fmt: skip
def test_names_in_an_index_are_no_paths(name: object, tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
        Checkpoint(tmp_path / "model")


def test_a_shard_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "b.safetensors"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="incomplete") as caught:
            Checkpoint(tmp_path / "model")
        assert "links outside its folder" in caught.value.problems[0]
        (tmp_path / "model" / name).unlink()
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(9), "b": torch.ones(9)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.problems == ("a is in a.safetensors and in b.safetensors",)


NUMBERS = st.integers(-1, 40) | st.sampled_from([2**63, 2**64, 2**200, 1.0, True, None, "8", [0]])
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "é"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8", "F4", "F6_E2M3", "F32 ", "f32", None, "C64", "BOOL"]),
            "shape": st.lists(NUMBERS, max_size=3) | st.none(),
            "data_offsets": st.lists(NUMBERS, max_size=3) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
        },
    )
    | st.none()
    | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | st.integers(), max_size=2),
    max_size=3,
)
PIECES = st.lists(st.tuples(st.integers(0, 12), st.integers(-4, 4).map(lambda n: n if abs(n) == 4 else 0)), max_size=3)


def same_as_the_library(path: Path, header: bytes, data: int) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    try:
        with safe_open(path, framework="numpy") as opened:
            library = set(opened.keys())
    except SafetensorError:
        with pytest.raises(CheckpointError):
            read_header(path)
        return
    assert set(read_header(path)[0]) == library


@settings(max_examples=500)
@given(HEADERS, st.integers(0, 40), st.sampled_from([b"", b" ", b"\n", b"\0", b"x"]))
def test_headers_are_refused_as_the_library_refuses_them(
    tmp_path_factory: pytest.TempPathFactory, header: dict, data: int, end: bytes
) -> None:
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    same_as_the_library(path, json.dumps(header).encode() + end, data)


@settings(max_examples=300)
@given(PIECES, st.integers(-4, 4), st.permutations(range(3)))
def test_overlaps_and_gaps(tmp_path_factory: pytest.TempPathFactory, pieces: list, more: int, order: list) -> None:
    header, at = {}, 0
    for i, (size, shift) in enumerate(pieces):
        at += shift
        header[f"t{i}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    shuffled = {name: header[name] for i in order if (name := f"t{i}") in header}
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    same_as_the_library(path, json.dumps(shuffled).encode(), max(0, at + more * (more % 2)))


def test_a_header_larger_than_the_librarys_limit(tmp_path: Path) -> None:
    length = 100_000_001
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    with pytest.raises(CheckpointError, match="allows 100,000,000"):
        read_header(tmp_path / "a.safetensors")
