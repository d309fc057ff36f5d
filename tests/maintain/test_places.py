"""Killed processes, concurrent ones, a read-only folder, a full disk: nothing is lost, and the error is clear."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipes import SOAK, Recipe, contents

from granite_switch.composition.edit import add, remove
from granite_switch.composition.verify import verify
from granite_switch.core.staging import held
from granite_switch.errors import OutputError

HERE = Path(__file__).parent

ADD = """
import sys, time
from granite_switch.composition.edit import add
from granite_switch.errors import OutputError
while True:
    try:
        add(sys.argv[1], [sys.argv[2]])
        break
    except OutputError as error:
        if "another command is writing" not in str(error):
            sys.exit(str(error))
        time.sleep(0.01)
"""


@pytest.fixture
def model(base: Path, pool: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    Recipe(base, tmp_path, [{"name": "a", "path": str(pool / "one/a")}]).compose("place/model")
    return folder / "model"


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def test_killed_at_random_moments(model: Path, pool: Path) -> None:
    rounds = 600 if SOAK else 40  # more than two hundred kills
    line = python(HERE / "killer.py", model, pool, rounds, 7)
    done = subprocess.run(line, capture_output=True, text=True, timeout=15 * rounds, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    killed, _, changed, _ = done.stdout.split()
    assert int(killed) >= rounds // 3  # otherwise the moments were not spread over the run
    assert int(changed) >= rounds // 20


def test_two_at_once_lose_nothing(model: Path, pool: Path) -> None:
    sources = [pool / "one/b", pool / "one/c.d"]
    running = [subprocess.Popen(python("-c", ADD, model, source), stderr=subprocess.PIPE) for source in sources]
    for one in running:
        _, problem = one.communicate(timeout=60)
        assert one.returncode == 0, problem
    assert set(verify(model, deep=True).names) == {"a", "b", "c.d"}


def test_a_model_in_use_is_refused(model: Path, pool: Path, tmp_path: Path) -> None:
    with held(model):
        with pytest.raises(OutputError, match="another command is writing it"):
            remove(model, ["a"])
        with pytest.raises(OutputError, match="another command is writing it"):
            add(model, [pool / "one/b"], output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


@pytest.fixture
def everyones() -> Iterator[Path]:
    """A folder that unprivileged users can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IRWXU)
    shutil.rmtree(folder)


@pytest.mark.parametrize("read_only", ["model", "its parent"])
def test_a_read_only_folder(read_only: str, model: Path, pool: Path, everyones: Path) -> None:
    here = Path(shutil.copytree(model, everyones / "model"))
    shutil.copytree(pool, everyones / "pool")
    before = contents(here)
    if os.geteuid() == 0:
        for path in everyones.rglob("*"):
            os.chown(path, 65534, 65534)
    (here if read_only == "model" else everyones).chmod(0o555)
    child = os.fork()
    if not child:  # an unprivileged user, to whom permissions apply
        result = 3
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            add(here, [everyones / "pool/one/b"])
        except OutputError as error:
            result = 0 if "read-only" in str(error) or "Permission denied" in str(error) else 4
        finally:
            os._exit(result)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert contents(here) == before
    assert {path.name for path in everyones.iterdir()} == {"model", "pool"}


FULL = """
mount -t tmpfs -o size=$(($(du -sk "$2" | cut -f1) + 60))k none "$1" && cp -r "$2" "$1/model" && ls -A "$1" &&
"$3" -m granite_switch.cli add "$1/model" "$4"; echo "exit $?"
ls -A "$1" && "$3" -m granite_switch.cli verify --deep "$1/model"
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces here, so no small disk can be mounted",
)
def test_a_full_disk(model: Path, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    line = ["unshare", "-rm", "sh", "-c", FULL, "sh", tmp_path / "disk", model, sys.executable, pool / "one/c.d"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=60, check=False)
    assert "cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["model", "exit 1", "model"]
    assert "1 adapters, no problems found" in lines[-1]
