"""Kill a process at random moments while it changes a model, and check what is left. Runs without torch.

python killer.py MODEL POOL ROUNDS SEED
"""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from recipes import contents

from granite_switch.composition.edit import add, remove, rename, update
from granite_switch.composition.verify import verify


def changes(model: Path, pool: Path, names: tuple[str, ...]) -> list:
    known = ("a", "b", "c.d")
    possible = [partial(add, model, [pool / "one" / name]) for name in known if name not in names]
    possible += [partial(update, model, [pool / "two" / name]) for name in known if name in names]
    if len(names) > 1:
        possible.append(partial(remove, model, [names[0]]))
    return [*possible, partial(rename, model, names[-1], f"n{time.monotonic_ns()}")]


def run(change) -> int:  # type: ignore[no-untyped-def]
    """Run a change in a child process. Returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        change()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def main(model: Path, pool: Path, rounds: int, seed: int) -> None:
    drawn = random.Random(seed)
    duration, killed, changed = 0.05, 0, 0
    for _ in range(rounds):
        before = contents(model)
        change = drawn.choice(changes(model, pool, verify(model, prove=False).names))
        began = time.monotonic()
        child = run(change)
        time.sleep(drawn.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            duration *= 1.1  # in case the machine has become slower: both outcomes must occur
        else:
            assert os.WEXITSTATUS(status) == 0
            duration = 0.8 * duration + 0.2 * (time.monotonic() - began)
        verify(model, deep=True, prove=False)
        after = contents(model)
        changed += after != before
        left = {path.name for path in model.parent.iterdir()} - {model.name}
        assert left <= {f".{model.name}.partial", f".{model.name}.lock"}, left
    _, status = os.waitpid(run(changes(model, pool, verify(model, prove=False).names)[0]), 0)
    assert status == 0
    assert {path.name for path in model.parent.iterdir()} == {model.name}
    verify(model, deep=True, prove=False)
    print(f"{killed} killed, {changed} changed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
