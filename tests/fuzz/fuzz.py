"""Damage files and run every command on them. Each run must give a result or an error that names the problem.

python fuzz.py MATERIAL --cases 20000 [--first 0] [--seed 0] [--workers 2]; `--case N` runs one and shows its
traceback. A case fails if it raises anything but a `SwitchError`, if an error leaves files or changes its sources, if
a model composed without an error does not verify, or if it takes more than 20 seconds of computing. There is no torch,
and one process with limited memory for each worker.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from mutations import mutate

from granite_switch import gguf
from granite_switch.cli.generate import read_document
from granite_switch.cli.maintain import inspect as cli_inspect
from granite_switch.cli.serve import _check as check_serving
from granite_switch.composition import proof
from granite_switch.composition.base import read_base
from granite_switch.composition.compose import compose
from granite_switch.composition.edit import add, remove, rename, update
from granite_switch.composition.extract import extract
from granite_switch.composition.inspect import inspect, strengths
from granite_switch.composition.push import format_files
from granite_switch.composition.sources import scan
from granite_switch.composition.upgrade import upgrade
from granite_switch.composition.verify import find_problems, verify
from granite_switch.conversation import Conversation
from granite_switch.core.model import read_model
from granite_switch.errors import SwitchError
from granite_switch.gguf.inspect import describe
from granite_switch.play.engine import Model
from granite_switch.vllm.calls import PATHS, Catalogue, Refused

# comparing the tokenizer with transformers starts a process, which takes seconds: skip it in most cases
proof.release = lambda: 0

SECONDS = 20
MEMORY = 1 << 30

Command = Callable[[Path, Path], object]  # (folder of the material, folder for output)


def _described(at: Path, out: Path) -> None:
    with open(os.devnull, "w") as quiet:
        real, sys.stdout = sys.stdout, quiet
        try:
            for number in (1, 2, 3):
                cli_inspect(str(at / f"legacy-{number}"))
        finally:
            sys.stdout = real


def _asked(at: Path, out: Path) -> None:
    """What clients send to the server, on every path."""
    catalogue = Catalogue(("m",), read_model(at / "model")[1])
    for file in sorted((at / "requests").iterdir()):
        for path in sorted(PATHS):
            with contextlib.suppress(Refused):
                catalogue.read(path, file.read_bytes() if file.is_file() else b"")


def _documents(at: Path, out: Path) -> None:
    """What is given with --document; a pipe is waited for, as `-d <(command)` wants."""
    path = at / "documents/one.json"
    if not path.is_fifo():
        read_document(path, 1)


def _quantised(at: Path, out: Path) -> None:
    """One base of each format; one of them is damaged."""
    for base in sorted((at / "quantised").iterdir()):
        with contextlib.suppress(SwitchError):
            read_base(base)


# the damaged folder, and the command that is run on it
COMMANDS: tuple[tuple[str, Command], ...] = (
    ("base", lambda at, out: compose(at / "base", [at / "adapters"], out)),
    ("one", lambda at, out: compose(at / "one", [at / "adapters/lora"], out)),
    ("adapters", lambda at, out: compose(at / "base", [at / "adapters"], out)),
    ("adapters", lambda at, out: compose(at / "base", [at / "adapters"], out, technology="alora")),
    ("adapters", lambda at, out: add(at / "model", [at / "adapters"], output=out)),
    ("adapters", lambda at, out: scan([str(at / "adapters")])),
    ("manifest", lambda at, out: compose(at / "base", [at / "manifest/manifest.yaml"], out)),
    ("model", lambda at, out: inspect(at / "model")),
    ("model", lambda at, out: strengths(at / "model")),
    ("model", lambda at, out: verify(at / "model", deep=True)),
    ("model", lambda at, out: extract(at / "model", "n-lora", out)),
    ("model", lambda at, out: add(at / "model", [at / "adapters/rewrite"], output=out)),
    ("model", lambda at, out: rename(at / "model", "n-lora", "other", output=out)),
    ("model", lambda at, out: remove(at / "model", ["n-alora"], output=out)),
    ("model", lambda at, out: update(at / "model", [at / "updates"], output=out)),
    ("model", lambda at, out: format_files(at / "model", verify(at / "model"))),
    ("legacy-1", lambda at, out: upgrade(at / "legacy-1", out)),
    ("legacy-2", lambda at, out: upgrade(at / "legacy-2", out)),
    ("legacy-3", lambda at, out: upgrade(at / "legacy-3", out)),
    ("legacy-1", _described),
    ("model", lambda at, out: gguf.export(at / "model", out)),
    ("legacy-3", lambda at, out: gguf.export(at / "legacy-3", out)),
    ("gguf", lambda at, out: describe(at / "gguf/model.gguf")),
    ("model", lambda at, out: Conversation(at / "model", system="Be brief.").ask("Who?", "n-lora")),
    ("model", lambda at, out: Model.read(at / "model")),
    ("model", lambda at, out: check_serving(str(at / "model"), [])),
    ("requests", _asked),
    ("documents", _documents),
    ("quantised", _quantised),
)


class TooLong(BaseException):
    """Raised on a timeout; not an Exception, so that no handler catches it."""


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below a folder, with attributes that show whether it was written."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        if not path.is_dir() or path.is_symlink():  # a folder's modification time changes with its lock file
            found[str(path.relative_to(folder))] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def run(number: int, seed: int, material: Path, place: Path) -> tuple[str, str]:
    """Run one case. Returns what was done, and what is wrong with the outcome ("" if nothing)."""
    draw = random.Random(f"{seed}-{number}")
    damaged, command = draw.choice(COMMANDS)
    at, out = place / "at", place / "out"
    at.mkdir()
    for part in material.iterdir():
        if part.name == damaged:
            shutil.copytree(part, at / part.name, copy_function=os.link)
        else:
            (at / part.name).symlink_to(part)
    done = f"case {number}: {damaged}/{mutate(at / damaged, draw)}"
    before = state(place)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing
    signal.alarm(15 * SECONDS)  # of waiting, which a busy machine does too
    try:
        command(at, out)
        failed = False
    except SwitchError as error:
        failed = True
        if re.search("[\ud800-\udfff]", str(error)):
            return done, "an error that no stream can write"
    except BaseException as error:
        lines = traceback.format_exc().splitlines()
        own = [line.strip() for line in lines if "granite_switch" in line]
        return done, f"{type(error).__name__} at {own[-1] if own else ''}\n" + "\n".join(lines[-30:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return done, leftovers(before, place, out, failed)


def leftovers(before: dict[str, tuple[int, int, int]], place: Path, out: Path, failed: bool) -> str:
    """Files that a finished command should not have left."""
    after = {name: about for name, about in state(place).items() if not name.startswith("out/") and name != "out"}
    if after != before:
        return f"changed or left: {sorted(set(after.items()) ^ set(before.items()))[:3]}"
    if failed and out.exists():
        return "an error, and an output"
    if not failed and (out / "config.json").is_file() and (problems := find_problems(out)):
        return f"composed, but: {problems[0]}"
    return ""


def work(arguments: argparse.Namespace, first: int, step: int) -> int:
    """Run every `step`th case from `first`; prints the failed ones and the memory used."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))  # includes mapped files, so it is generous
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    os.fsync = lambda descriptor: None  # durability is not tested here
    kinds: collections.Counter[str] = collections.Counter()
    for number in range(first, arguments.cases, step):
        with tempfile.TemporaryDirectory(dir=arguments.place) as place:
            if number // 500 > (number - step) // 500:
                print(f"{number} of {arguments.cases}", file=sys.stderr, flush=True)
            done, problem = run(number, arguments.seed, arguments.material, Path(place))
        if problem:
            kind = problem.splitlines()[0]
            kinds[kind] += 1
            if kinds[kind] == 1:
                print(f"{done}\n{problem}\n", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if peak > MEMORY:
        kinds[f"peak memory {peak:,} bytes"] += 1
    for kind, count in kinds.most_common():
        print(f"{count} times {kind}")
    print(f"worker {first}: {sum(kinds.values())} failures, peak memory {peak / 2**20:.0f} MiB", flush=True)
    return 1 if kinds else 0


def _too_long(*_: object) -> None:
    raise TooLong(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("material", type=Path)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="begin with this case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--place", type=Path, help="folder for temporary folders, on the same disk as the material")
    parser.add_argument("--case", type=int)
    arguments = parser.parse_args()
    arguments.material = arguments.material.resolve()
    arguments.place = arguments.place or arguments.material.parent
    if not arguments.material.exists():
        subprocess.run([sys.executable, Path(__file__).with_name("material.py"), arguments.material], check=True)
    updates = arguments.material / "updates"
    if not updates.exists():
        shutil.copytree(arguments.material / "adapters/rewrite", updates / "n-lora")
    if arguments.case is not None:
        arguments.cases = arguments.case + 1
        return work(arguments, arguments.case, 1)
    if arguments.workers == 1:
        return work(arguments, arguments.first, 1)
    children = []
    for first in range(arguments.first, arguments.first + arguments.workers):
        child = os.fork()
        if not child:
            os._exit(work(arguments, first, arguments.workers))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
