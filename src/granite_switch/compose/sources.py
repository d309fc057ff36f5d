"""Where bases and adapters come from: local folders, hub repositories, library folders, YAML manifests.

Finds what there is and fetches only the files needed; reading and checking an adapter is `adapters.py`.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from granite_switch.core.border import checked, read_yaml
from granite_switch.core.records import ManifestEntry, RetiredEntry, read_adapter_config
from granite_switch.errors import AdapterError, BaseModelError, CheckpointError

TECHNOLOGIES = ("alora", "lora")  # in order of preference
PROVENANCE = "granite_switch.json"  # beside an adapter that `extract` took out of a composed model
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "io.yaml", PROVENANCE)
_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*"]


@dataclass(frozen=True)
class Found:
    """One PEFT adapter folder, and under which name it is to be composed."""

    name: str
    folder: Path
    source: str  # for the record: a hub id with its path, or the folder's own name
    technology: str = ""  # as the library's folder has it; "" where the adapter's config decides
    base_name: str = ""  # as the library's folder has it; "" for a plain adapter folder
    invocation_placement: Literal["", "prefix", "suffix"] = ""  # where a missing invocation text goes
    retired: bool = False  # a removed adapter, whose slot is to stay taken
    substitute_token_id: int | None = None  # of a removed adapter; None for the base's


@dataclass(frozen=True)
class Selection:
    """Which adapters of the sources are wanted."""

    base_name: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    technology: str = ""

    def wants(self, name: str) -> bool:
        included = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return included and not any(fnmatchcase(name, glob) for glob in self.exclude)


def base_folder(base: str, revision: str | None = None) -> Path:
    """The base model's folder; a hub repository is fetched first."""
    path = Path(base)
    if path.exists():
        if not path.is_dir():
            raise BaseModelError(f"{base}: is a file; give the model's folder")
        return path
    return _fetch(base, revision, _BASE_FILES, BaseModelError)


def model_folder(model: str | PathLike[str], revision: str | None = None) -> Path:
    """A composed model's folder; a hub repository is fetched first."""
    path = Path(model)
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(f"{model}: is a file; give the model's folder")
        return path
    return _fetch(str(model), revision, [*_BASE_FILES, "README.md", "io_configs/*"], CheckpointError)


def own_name(base: str, folder: Path) -> str:
    """The base's own name: the last part of its hub id or folder."""
    if Path(base).exists():
        return folder.resolve().name
    return base.rstrip("/").split("/")[-1]


def find(sources: Sequence[str], selection: Selection, revision: str | None = None) -> list[Found]:
    """All wanted adapters of all sources, in order; of both technologies of one adapter the preferred one.

    Raises:
        AdapterError: a source is not there or holds no adapter; nothing is left after the selection; two of one name.
    """
    found: list[Found] = []
    for source in sources:
        here = list(_scan(source, selection, revision))
        if not here:
            raise AdapterError(
                f"{source}: no adapter in it",
                hint="give a PEFT adapter folder (adapter_config.json), a library folder or a YAML manifest",
            )
        found += _choose(source, here, selection)
    if not found:
        raise AdapterError("no adapter is left to compose", hint="see --list, --include, --exclude and --technology")
    live = [f for f in found if not f.retired]
    problems = [
        f"{name}: {', '.join(str(f.folder) for f in live if f.name == name)}"
        for name in dict.fromkeys(f.name for f in live)
        if sum(f.name == name for f in live) > 1
    ]
    if problems:
        raise AdapterError(
            "two adapters of one name",
            problems=problems,
            hint="exclude one with --exclude, or give them other names in a YAML manifest",
        )
    return found


def placed(found: Sequence[Found], places: Mapping[str, str]) -> list[Found]:
    """The same adapters, some with a place for their invocation text.

    Raises:
        AdapterError: a place that is neither "prefix" nor "suffix", or of an adapter that is not there.
    """
    names = [one.name for one in found]
    if missing := [name for name in places if name not in names]:
        raise AdapterError(f"there is no adapter {', '.join(missing)} to place", hint=f"adapters: {', '.join(names)}")
    where = {name: check_placement(name, value) for name, value in places.items()}
    return [replace(one, invocation_placement=where.get(one.name, one.invocation_placement)) for one in found]


def scan(sources: Sequence[str], revision: str | None = None) -> list[Found]:
    """Everything that the sources hold, for every base and technology (`--list`)."""
    return [found for source in sources for found in _scan(source, Selection(base_name="*"), revision)]


def _choose(source: str, found: list[Found], selection: Selection) -> list[Found]:
    """Of a library's folders, those for this base; of two technologies, one."""
    wanted = [f for f in found if selection.wants(f.name)]
    bases = sorted({f.base_name for f in wanted if f.base_name})
    matching = [f for f in wanted if f.base_name in ("", selection.base_name)]
    if bases and not any(f.base_name for f in matching):
        raise AdapterError(
            f"{source}: nothing for base model {selection.base_name!r}",
            problems=[f"there is {name!r}" for name in bases],
            hint="choose one with --base-name",
        )
    return [f for f in matching if f.retired or _preferred(f, matching, selection.technology)]


def _preferred(found: Found, others: Sequence[Found], technology: str) -> bool:
    """Whether an adapter is of the wanted technology, or of the better one where its library has both."""
    if technology:
        return _technology(found) == technology
    both = {f.technology for f in others if f.name == found.name and not f.retired} == set(TECHNOLOGIES)
    return not both or found.technology == TECHNOLOGIES[0]


def _technology(found: Found) -> str:
    if found.technology:
        return found.technology
    return "alora" if read_adapter_config(found.folder).alora_invocation_tokens else "lora"


def _scan(source: str, selection: Selection, revision: str | None) -> Iterable[Found]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _manifest(path, selection)
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if path.exists():
        raise AdapterError(f"{source}: is neither a folder nor a YAML manifest")
    names = selection.include or ("*",)
    library = [f"{name}/{selection.base_name or '*'}/*/{file}" for name in names for file in ADAPTER_FILES]
    folder = _fetch(source, revision, [*ADAPTER_FILES, *library], AdapterError, ignore=selection.exclude)
    return _folder(folder, source)


def _folder(path: Path, label: str) -> Iterable[Found]:
    """A PEFT adapter folder, a folder of them, or a library <name>/<base>/<technology>."""
    if (path / "adapter_config.json").is_file():
        resolved = path.resolve()
        if resolved.name in TECHNOLOGIES and len(resolved.parts) > 3:  # one leaf of a library
            yield Found(resolved.parent.parent.name, path, label, resolved.name)
        else:
            yield Found(label.rstrip("/").split("/")[-1], path, label)
        return
    for config in sorted(path.glob("*/adapter_config.json")):
        yield Found(config.parent.name, config.parent, f"{label}/{config.parent.name}")
    for config in sorted(path.glob("*/*/*/adapter_config.json")):
        folder = config.parent
        if folder.name in TECHNOLOGIES:
            name, base = folder.parent.parent.name, folder.parent.name
            yield Found(name, folder, f"{label}/{name}/{base}/{folder.name}", folder.name, base)


def _manifest(path: Path, selection: Selection) -> Iterable[Found]:
    """A YAML list of {name, path, revision, invocation_placement}, also under the key `adapters`.

    Paths are relative to the file.

    An entry {name, retired: true, substitute_token_id} keeps a removed adapter's slot and token taken.
    """
    data = read_yaml(path)
    records = data.get("adapters") if isinstance(data, dict) else data
    if not isinstance(records, list) or not records:
        raise AdapterError(f"{path}: holds no list of adapters", hint="each entry has `name`, `path`, `revision`")
    found = []
    for number, record in enumerate(records, 1):
        found.append(_manifest_entry(path, number, record, selection))
    return found


def _manifest_entry(path: Path, number: int, record: Any, selection: Selection) -> Found:
    where = f"{path}: entry {number}"
    hint = "each entry has `name`, `path`, `revision`"
    if isinstance(record, dict) and record.get("retired"):
        gone = checked(RetiredEntry, record, where, AdapterError, hint)
        return Found(gone.name, path, "", retired=True, substitute_token_id=gone.substitute_token_id)
    entry = checked(ManifestEntry, record, where, AdapterError, hint)
    local = path.parent / Path(entry.path).expanduser()
    source = str(local) if local.exists() else entry.path
    here = list(_scan(source, selection, entry.revision))
    if len(here) > 1:
        here = _choose(source, here, selection)
    if len(here) != 1:
        raise AdapterError(
            f"{path}: entry {number}: {entry.path} holds {len(here)} adapters, not one",
            hint="give the path of one adapter's folder",
        )
    name = entry.name or here[0].name
    where_to = check_placement(where, entry.invocation_placement)
    return Found(name, here[0].folder, here[0].source, here[0].technology, invocation_placement=where_to)


def check_placement(who: str, where: Any) -> Literal["", "prefix", "suffix"]:
    """Where a missing invocation text is written: "prefix", "suffix" or nowhere."""
    if where not in ("", "prefix", "suffix"):
        raise AdapterError(f"{who}: an invocation text is placed as `prefix` or `suffix`, not {where!r}")
    result: Literal["", "prefix", "suffix"] = where
    return result


def _fetch(
    repository: str, revision: str | None, patterns: list[str], error: type[Exception], ignore: Sequence[str] = ()
) -> Path:
    """Fetch some files of a hub repository into the hub's cache; what is there already needs no connection."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def fetch(here_only: bool = False) -> Path:
        ignored = [f"{glob}/*" for glob in ignore] or None
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignored,
                local_files_only=here_only,
            )
        )

    try:
        return fetch()
    except HFValidationError:
        reason = "is neither a folder here nor a hub id"
    except LocalEntryNotFoundError:
        reason = "is not a folder here, and the hub cannot be reached"
    except Exception as problem:  # a broken connection is of another class in each release of the hub's client
        with contextlib.suppress(Exception):  # 1.x asks for a commit's list of files even when all of them are here
            return fetch(here_only=True)
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        reason = f"is not a folder here, and the hub says: {lines[0]}"
    raise error(f"{repository}: {reason}") from None
