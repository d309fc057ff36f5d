"""Write a folder or a file so that it appears complete or not at all.

It is written beside the target under a hidden name, flushed to disk, and then renamed. An existing folder is swapped
with it in one step if the system can (Linux), otherwise moved aside first. A lock file excludes other writers, and the
next writer removes what a killed one left.
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
    """Yield a temporary directory; replace `target` with it on success, delete it on error.

    Args:
        target: the folder to write.
        force: replace an existing folder.

    Raises:
        OutputError: the target exists or cannot be written, another command is writing it, or the disk is full.
    """
    check_target(target, force=force)
    with _beside(target) as partial:
        partial.mkdir()
        yield partial
        sync_tree(partial)
        _into_place(partial, target.absolute(), force)


@contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file; replace `target` with it on success, delete it on error.

    Args:
        target: the file to write.
        force: replace an existing file.

    Raises:
        OutputError: as for `staged`.
    """
    check_file(target, force=force)
    with _beside(target) as partial:
        yield partial
        sync(partial)
        check_file(target, force=force)  # it may have been created meanwhile
        partial.replace(target)
        sync(partial.parent)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield an unused hidden path beside the target, with the target locked; delete what is left there afterwards."""
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
            hint="free some space or choose another --output; no partial output was left",
        ) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Prevent other commands from replacing a folder while it is read. Where no lock can be created, none can write.

    Raises:
        OutputError: another command is writing it.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(folder.absolute()))
        yield


def restore(target: Path) -> None:
    """Move back a folder that a killed command moved aside, on systems that cannot swap two folders in one step."""
    if _old(target.absolute()).exists() and not target.exists():
        with suppress(OSError), _locked(target.absolute()):
            _restore(target.absolute())


def check_file(target: Path, *, force: bool = False) -> None:
    """Refuse a target that exists, unless `force` is set and it is a file."""
    _check_new(target, force)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, not a file", hint="choose another name")


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse a target that exists, unless `force` is set and it is a folder."""
    _check_new(target, force)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file, not a folder", hint="choose another name")


def _check_new(target: Path, force: bool) -> None:
    if (target.exists() or target.is_symlink()) and not force:
        raise OutputError(f"{target}: already exists", hint="choose another name, or use --force to replace it")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold a target's lock file, and remove it afterwards."""
    path = target.parent / f".{target.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"{target}: another command is writing it", hint="wait until it has finished") from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release, or it could be another's; Windows removes it on release
            path.unlink()
        lock.release()


def _into_place(partial: Path, target: Path, force: bool) -> None:
    """Rename the finished folder to `target`. The folder that it replaces is left in `partial`, or deleted."""
    if target.exists():
        check_target(target, force=force)  # it may have been created meanwhile
        if not _swap(partial, target):
            target.rename(_old(target))
            partial.rename(target)
    else:
        partial.rename(target)
    sync(target.parent)
    _remove(_old(target))


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _restore(target: Path) -> None:
    """Move back the folder that was set aside, or delete it if its successor is in place. The lock must be held."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)
    _remove(_old(target))


def _swap(a: Path, b: Path) -> bool:
    """Swap two paths in one step (renameat2); False if the system or the file system cannot."""
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
    """Hard-link a file, or copy it if that is impossible; return whether it was linked.

    Symlinks (as in the hub's cache) are resolved first, so the link is to the file itself.
    """
    source = source.resolve()
    try:
        os.link(source, target)
        return True
    except OSError:
        shutil.copyfile(source, target)
        return False
