"""A folder, or a file, that appears under its name whole or not at all.

It is written beside its place under a hidden name, put on the disk, and then renamed; an existing folder is swapped
with it in one step where the system can (Linux), else moved aside first. A lock file keeps two writers apart, and what
a killed writer left is removed by the next.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from granite_switch.core.files import sync, sync_tree
from granite_switch.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a folder to write in; on success it becomes `target`, on any error it is removed.

    Args:
        target: where to write the result.
        force: replace what is there.

    Raises:
        OutputError: it exists, cannot be written, another command is writing it, or the disk is full.
    """
    check_target(target, force=force)
    with _beside(target) as partial:
        partial.mkdir()
        yield partial
        sync_tree(partial)
        _into_place(partial, target.absolute(), force)


@contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give the path of a file to write; on success it becomes `target`, on any error it is removed.

    Args:
        target: where to write the result.
        force: replace the file that is there.

    Raises:
        OutputError: as for `staged`.
    """
    check_file(target, force=force)
    with _beside(target) as partial:
        yield partial
        sync(partial)
        check_file(target, force=force)  # it may have come while we wrote
        partial.replace(target)
        sync(partial.parent)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A hidden path beside the target, locked and empty; whatever is left there is removed."""
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _restore(target)
            _remove(partial)
            try:
                yield partial
            finally:
                _remove(partial)
    except OSError as error:
        name = f", {error.filename}" if error.filename and str(target.parent) not in str(error.filename) else ""
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}{name})",
            hint="free some space or choose another --output; nothing was left over",
        ) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other commands from replacing a folder while it is read; where no lock can be made, none can write either.

    Raises:
        OutputError: another command is writing it.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(folder.absolute()))
        yield


def restore(target: Path) -> None:
    """Put a folder back that a killed command had moved aside, where two folders cannot be swapped in one step."""
    if _old(target.absolute()).exists() and not target.exists():
        with suppress(OSError), _locked(target.absolute()):
            _restore(target.absolute())


def check_file(target: Path, *, force: bool = False) -> None:
    """Refuse a target that exists, unless `force` is set and it is a file."""
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(f"{target}: exists already", hint="choose another name, or --force to replace it")
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, not a file", hint="choose another name")


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse a target that exists, unless `force` is set and it is a folder."""
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(f"{target}: exists already", hint="choose another name, or --force to replace it")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file, not a folder", hint="choose another name")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock file of a target; whoever held it removes it."""
    path = target.parent / f".{target.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"{target}: another command is writing it", hint="wait until it has finished") from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held, so that it is nobody else's; Windows removes it on release
            path.unlink()
        lock.release()


def _into_place(partial: Path, target: Path, force: bool) -> None:
    """Give the finished folder its name. What was there is in `partial` afterwards, or gone."""
    if target.exists():
        check_target(target, force=force)  # it may have come while we wrote
        if not _exchange(partial, target):
            target.rename(_old(target))
            partial.rename(target)
    else:
        partial.rename(target)
    sync(target.parent)
    _remove(_old(target))


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _restore(target: Path) -> None:
    """With the lock held: what was moved aside comes back, or goes where its successor is."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)
    _remove(_old(target))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (renameat2); False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where linking is impossible. True if linked.

    A symlink (as in the hub's cache) is followed first: the file it names is what gets linked.
    """
    source = source.resolve()
    try:
        os.link(source, target)
        return True
    except OSError:
        shutil.copyfile(source, target)
        return False
