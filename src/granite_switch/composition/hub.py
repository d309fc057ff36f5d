"""Access the hub and its cache: parse ids, list a repository's files, fetch some of them.

A repository is listed before anything is fetched, so that only wanted adapters are fetched. If the hub cannot be
reached, its cache is used, with a warning in the log.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from granite_switch.errors import SwitchError, first_line

_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([^/]+)(?:/(.+))?$")

logger = logging.getLogger("granite_switch")


@dataclass(frozen=True)
class HubRef:
    """`owner/repo/path/in/repo@revision`."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        place = f"{self.repo}/{self.path}" if self.path else self.repo
        return f"{place}@{self.revision}" if self.revision else place

    def at(self, path: str) -> "HubRef":
        """The same repository at another path."""
        return replace(self, path=path.strip("/"))


def parse_ref(source: str, revision: str | None = None) -> HubRef:
    """Parse a hub id.

    Args:
        source: `owner/repo` or `owner/repo/path/in/repo`, optionally with `@revision`.
        revision: used if `source` has none.
    """
    if source.startswith(("/", ".", "~")):
        return HubRef(source)  # a missing path, not a hub id
    place, _, own = source.partition("@")
    parts = place.strip("/").split("/")
    return HubRef("/".join(parts[:2]), "/".join(parts[2:]), own or revision)


def snapshot_of(path: Path) -> HubRef | None:
    """Return the repository, path and commit of a folder in the hub's cache; None for any other folder."""
    for spelling in (os.path.abspath(path), str(path.resolve())):
        if found := _SNAPSHOT.search(Path(spelling).as_posix()):
            return HubRef(found[1].replace("--", "/"), found[3] or "", found[2])
    return None


@dataclass(frozen=True)
class Repository:
    """A hub repository with its list of files."""

    ref: HubRef
    files: tuple[str, ...]  # paths in it
    cached: Path | None = None  # the snapshot's folder, if only the hub's cache can be read

    def fetch(self, patterns: Sequence[str], error: type[SwitchError]) -> Path:
        """Fetch the files that match, and return the snapshot's folder."""
        if self.cached:
            return self.cached
        try:
            return _download(self.ref, patterns)
        except Exception as problem:
            raise error(f"{self.ref}: the hub says: {first_line(problem)}") from None


def open_repository(ref: HubRef, error: type[SwitchError]) -> Repository:
    """List a repository's files on the hub, or in its cache if the hub cannot be reached (logged as a warning).

    Raises:
        SwitchError: of class `error`; neither the hub nor its cache has the repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(ref.repo, revision=ref.revision)
        return Repository(ref, tuple(one.rfilename for one in info.siblings or ()))
    except HFValidationError:
        raise error(f"{ref}: is neither a local folder nor a hub id") from None
    except OfflineModeIsEnabled:
        reason, asked_for = "the hub cannot be reached (HF_HUB_OFFLINE is set)", True
    except Exception as problem:  # the class depends on the hub library's HTTP client
        reason, asked_for = f"the hub says: {first_line(problem)}", False
    try:
        folder = _download(ref, (), here_only=True)
    except Exception:
        raise error(f"{ref}: is not a local folder, and {reason}") from None
    if not asked_for:
        logger.warning("%s: %s; using the copy in the hub's cache, commit %s", ref, reason, folder.name)
    return Repository(ref, tuple(files_below(folder)), folder)


def files_below(folder: Path, depth: int = 8) -> Iterator[str]:
    """Yield the relative paths of a folder's files in order, down to `depth` levels. Links to folders are followed.

    A path that is not a folder has none.
    """
    if depth < 0 or not os.path.isdir(folder):
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if os.path.isdir(entry.path):  # a link to itself is none
            if not entry.name.startswith("."):
                yield from (f"{entry.name}/{path}" for path in files_below(Path(entry.path), depth - 1))
        else:
            yield entry.name


def _download(ref: HubRef, patterns: Sequence[str], *, here_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            ref.repo, revision=ref.revision, allow_patterns=list(patterns) or None, local_files_only=here_only
        )
    )
