"""A part of `make fuzz`: damaged files give a result or an error, never a traceback or leftover files."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    line = [sys.executable, HERE / "fuzz.py", tmp_path / "material", "--cases", "500", "--seed", "7"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "worker 0: 0 failures" in done.stdout
