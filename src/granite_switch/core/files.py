"""Copy files fast, flush them to disk, and refuse files outside their folder."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from granite_switch.errors import CheckpointError, SwitchError

_CHUNK = 8 << 20


def copy_bytes(source: Any, target: Any, start: int, nbytes: int) -> Iterator[int]:
    """Append a range of one open file to another, by `sendfile` where the system can.

    Args:
        source: a file open for reading.
        target: a file open for writing.
        start: the range's offset in `source`, in bytes.
        nbytes: the range's length.

    Yields:
        The number of bytes of each piece copied; a last 0 if the source ends too early.
    """
    target.flush()
    fast = hasattr(os, "sendfile")
    while nbytes:
        count = 0
        if fast:
            with suppress(OSError):
                count = os.sendfile(target.fileno(), source.fileno(), start, min(nbytes, _CHUNK))
            fast = count > 0  # unsupported here; any other failure recurs below
        count = count or _read_write(source.fileno(), target.fileno(), start, min(nbytes, _CHUNK))
        yield count
        if not count:
            return
        start, nbytes = start + count, nbytes - count
    target.seek(0, os.SEEK_END)


def _read_write(source: int, target: int, start: int, count: int) -> int:
    os.lseek(source, start, os.SEEK_SET)
    data = os.read(source, count)
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return len(data)


def sync_file(file: Any) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file's data or a folder's entries to disk. Windows cannot flush folders."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if folder or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder tree to disk: files first, then the folders that list them, the outermost last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def inside(folder: Path, name: str | Path) -> Path:
    """Return the path of a file in a model's or an adapter's folder.

    Raises:
        CheckpointError: it is a link that leads out of the folder and out of the hub's cache, or not a regular file.
    """
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: is a link to itself") from None
    if not real.is_relative_to(folder.resolve()) and not _linked_by_the_hub(folder, real):
        raise CheckpointError(f"{path}: links outside its folder, to {real}", hint="copy the file into the folder")
    if real.exists() and not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return path


def _linked_by_the_hub(folder: Path, real: Path) -> bool:
    """Whether a file is a blob of the hub's cache, whose snapshots are folders of links."""
    resolved = folder.resolve()
    for snapshot in (resolved, *resolved.parents):
        if snapshot.parent.name == "snapshots" and real.is_relative_to(snapshot.parent.parent / "blobs"):
            return True
    return in_hub_cache(real)


def in_hub_cache(path: Path) -> bool:
    """Whether a file or folder is in the hub library's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.resolve().is_relative_to(Path(HF_HUB_CACHE).resolve())


T = TypeVar("T")


def steady(folder: Path, read: Callable[[], T], errors: tuple[type[Exception], ...] = (SwitchError, OSError)) -> T:
    """Return the result of `read`, called again if another command replaces the folder meanwhile.

    Args:
        folder: a model's folder.
        read: called without arguments.
        errors: what `read` raises if it finds files of two states; ignored if the folder has changed.

    Raises:
        CheckpointError: the folder keeps changing.
    """
    for _ in range(20):
        before = state_of(folder)
        try:
            result = read()
        except errors:
            if state_of(folder) == before:
                raise
            continue
        if state_of(folder) == before:
            return result
    raise CheckpointError(
        f"{folder}: is being changed by another command", hint="wait until the other command has finished"
    )


def state_of(folder: Path) -> tuple[int, ...]:
    """Return what changes if a folder, or a file in it, is replaced."""
    try:
        found = folder.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
