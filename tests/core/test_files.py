"""Copying works without system calls that fail, data is synced before a rename, no path leads out of its folder."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_switch.core import files, staging
from granite_switch.core.files import copy_bytes, inside, steady
from granite_switch.core.staging import restore, staged, staged_file
from granite_switch.errors import CheckpointError, OutputError

NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EXDEV, errno.EPERM)


def failing(number: int, *, after: int = 0, real: Callable[..., int] | None = None) -> Callable[..., int]:
    """A system call that fails, optionally only from its nth call on."""
    calls = []

    def call(*arguments: object, **keywords: object) -> int:
        calls.append(arguments)
        if real and len(calls) <= after:
            return real(*arguments, **keywords)
        raise OSError(number, os.strerror(number))

    return call


def copied(source: Path, target: Path, start: int, nbytes: int) -> bytes:
    with source.open("rb") as a, target.open("wb") as b:
        b.write(b"head")
        counts = list(copy_bytes(a, b, start, nbytes))
        b.write(b"tail")
    assert sum(counts) == nbytes
    return target.read_bytes()


@pytest.mark.parametrize("number", NOT_HERE)
def test_copies_fall_back(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1000)
    (tmp_path / "a").write_bytes(data := os.urandom(10_000))
    for after in (0, 3):
        monkeypatch.setattr(os, "sendfile", failing(number, after=after, real=os.sendfile))
        assert copied(tmp_path / "a", tmp_path / "b", 17, 9_000) == b"head" + data[17:9017] + b"tail"


@given(st.integers(0, 5000), st.integers(0, 5000), st.booleans())
def test_both_ways_copy_the_same(tmp_path_factory: pytest.TempPathFactory, start: int, nbytes: int, fast: bool) -> None:
    folder = tmp_path_factory.mktemp("copy")
    (folder / "a").write_bytes(data := bytes(range(256)) * 20)
    with pytest.MonkeyPatch.context() as patch:
        if fast:
            patch.setattr(files, "_read_write", lambda *_: 0)
        else:
            patch.delattr(os, "sendfile")
        nbytes = min(nbytes, len(data) - start)
        assert copied(folder / "a", folder / "b", start, nbytes) == b"head" + data[start : start + nbytes] + b"tail"


def test_a_source_that_ends_too_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        assert list(copy_bytes(a, b, 0, 20)) == [10, 0]


def test_a_full_disk_is_not_taken_for_a_call_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sendfile", "write"):
        monkeypatch.setattr(os, name, failing(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left"), staged_file(tmp_path / "b") as path:
        (tmp_path / "a").write_bytes(b"x" * 10)
        with (tmp_path / "a").open("rb") as a, path.open("wb") as b:
            list(copy_bytes(a, b, 0, 10))
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


class Disk:
    """A disk that loses everything that was not synced when the power fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        fsync, rename, swap = os.fsync, Path.rename, staging._swap

        def synced(descriptor: int) -> None:
            self.events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def renamed(path: Path, target: Path) -> Path:
            self.events.append(("rename", str(path)))
            return rename(path, target)

        def swapped(a: Path, b: Path) -> bool:
            done = swap(a, b)
            self.events += [("rename", str(a))] if done else []
            return done

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(Path, "replace", renamed)
        monkeypatch.setattr(staging, "_swap", swapped)

    def check(self, partial: Path, parent: Path, names: set[str]) -> None:
        """Check that a staged output was synced when it was renamed, and that the rename was synced."""
        moved = self.events.index(("rename", str(partial)))
        before = [path for kind, path in self.events[:moved] if kind == "sync"]
        assert names <= set(before)
        for name in names:  # a folder is synced after its contents
            for inner in names:
                if Path(name) in Path(inner).parents:
                    assert before.index(inner) < before.index(name)
        assert ("sync", str(parent)) in self.events[moved:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("in_one_step", [False, True])
def test_data_is_on_the_disk_before_it_has_its_name(
    there: bool, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_step:
        monkeypatch.setattr(staging, "_swap", lambda a, b: False)
    if there:
        (tmp_path / "out").mkdir()
    disk = Disk(monkeypatch)
    partial = tmp_path / ".out.partial"
    with staged(tmp_path / "out", force=there) as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(name)
    disk.check(partial, tmp_path, {str(partial / name) for name in ("", "a", "inner", "inner/b")})
    disk.events.clear()
    with staged_file(tmp_path / "file") as path:
        path.write_text("x")
    disk.check(tmp_path / ".file.partial", tmp_path, {str(tmp_path / ".file.partial")})


def strace(*line: object) -> list[str]:
    calls = "trace=write,pwrite64,sendfile,copy_file_range,openat,link,linkat,fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", calls, *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode != 0,
    reason="no strace here",
)
def test_the_systems_own_record_of_compose(base: Path, adapters: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    lines = strace(sys.executable, "-m", "granite_switch.cli", "compose", base, "-a", adapters, "-o", output)
    partial = str(tmp_path / ".out.partial")
    moved = next(i for i, line in enumerate(lines) if "rename" in line and partial in line)
    synced = {m[1]: i for i, line in enumerate(lines[:moved]) if (m := re.search(r"fsync\(\d+<(.+?)>\)", line))}
    assert any("write" in line and f"{partial}/embeddings.safetensors>" in line for line in lines[:moved])
    for path in [output, *output.rglob("*")]:
        name = str(path).replace(str(output), partial)
        changed = [i for i, line in enumerate(lines[:moved]) if f"<{name}>" in line and "fsync" not in line]
        assert name in synced, name
        assert max(changed, default=0) < synced[name] < moved, name
    assert any("fsync" in line and f"<{tmp_path}>" in line for line in lines[moved:])


def test_two_steps_where_folders_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_swap", lambda a, b: False)
    for text in ("1", "2"):
        with staged(tmp_path / "out", force=True) as folder:
            (folder / "a").write_text(text)
    assert (tmp_path / "out/a").read_text() == "2"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_kill_between_the_two_steps_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_swap", lambda a, b: False)
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    for mend in (lambda: restore(tmp_path / "out"), lambda: staged(tmp_path / "out", force=True).__enter__()):
        (tmp_path / "out").rename(tmp_path / ".out.old")  # the state in which the process was killed
        mend()
        assert (tmp_path / "out/a").read_text() == "1"
        assert not (tmp_path / ".out.old").exists()


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "inner/file").write_text("x")
    (model / "fine").symlink_to("inner/file")
    (model / "out").symlink_to("../secret")
    (model / "absolute").symlink_to(tmp_path / "secret")
    (model / "missing").symlink_to("../nothing")
    os.mkfifo(model / "pipe")
    (tmp_path / "alias").symlink_to(model)
    assert inside(tmp_path / "alias", "fine").read_text() == "x"
    assert not inside(model, "not-there").exists()
    for name in ("out", "absolute", "missing", "../secret"):
        with pytest.raises(CheckpointError, match="links outside its folder"):
            inside(model, name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        inside(model, "pipe")


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    (tmp_path / "models--a--b/blobs/ff").write_text("x")
    snapshot.mkdir(parents=True)
    (snapshot / "file").symlink_to("../../blobs/ff")
    (snapshot / "other").symlink_to("../../../secret")
    assert inside(snapshot, "file").read_text() == "x"
    with pytest.raises(CheckpointError, match="links outside"):
        inside(snapshot, "other")


def test_a_folder_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    seen: list[int] = []

    def read() -> int:
        seen.append(1)
        if len(seen) < 3:
            folder.rename(tmp_path / f"old-{len(seen)}")
            folder.mkdir()
            raise FileNotFoundError
        return len(seen)

    assert steady(folder, read) == 3
    with pytest.raises(ZeroDivisionError):
        steady(folder, lambda: 1 // 0)
