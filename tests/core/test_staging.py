"""An output appears whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granite_switch.core.staging import link_or_copy, staged, staged_file
from granite_switch.errors import OutputError


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_success_and_failure(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert _left(tmp_path) == {"out"}
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert _left(tmp_path) == {"out"}


def test_existing_output_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(OutputError, match="already exists"), staged(tmp_path / "out"):
        pass
    with staged(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("")
    assert _left(tmp_path / "out") == {"new"}
    assert _left(tmp_path) == {"out"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), staged(tmp_path / "file", force=True):
        pass


def test_two_writers(tmp_path: Path) -> None:
    with staged(tmp_path / "out"), pytest.raises(OutputError, match="another command"), staged(tmp_path / "out"):
        pass
    assert _left(tmp_path) == {"out"}


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise OSError(28, "No space left on device")
    assert _left(tmp_path) == set()


def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from granite_switch.core.staging import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as f: (f / 'half').write_text('x');"
        " print('in', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "in\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "out").exists()
    time.sleep(0.05)
    with staged(tmp_path / "out") as folder:
        assert _left(folder) == set()
    assert _left(tmp_path) == {"out"}


def test_links_follow_symlinks(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "name").symlink_to(tmp_path / "blob")
    assert link_or_copy(tmp_path / "name", tmp_path / "linked")
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "linked").stat().st_ino == (tmp_path / "blob").stat().st_ino


def test_a_file_is_staged_like_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "out") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert _left(tmp_path) == set()
    with staged_file(tmp_path / "out") as path:
        path.write_text("1")
        with pytest.raises(OutputError, match="another command"), staged_file(tmp_path / "out"):
            pass
    with pytest.raises(OutputError, match="already exists"), staged_file(tmp_path / "out"):
        pass
    with staged_file(tmp_path / "out", force=True) as path:
        path.write_text("2")
    assert (tmp_path / "out").read_text() == "2"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"), staged_file(tmp_path / "folder", force=True):
        pass
    assert _left(tmp_path) == {"out", "folder"}
