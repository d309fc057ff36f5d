"""Find adapters in local folders, hub repositories, library folders and YAML manifests.

A source is a list of files, local or on the hub. Paths determine which of its folders are adapters and what they are
called (`_place`); then the wanted ones are chosen, and only those are fetched. Adapters that are left out are reported
with the reason. `adapters.py` reads and checks an adapter.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from granite_switch.composition.hub import HubRef, Repository, files_below, open_repository, parse_ref, snapshot_of
from granite_switch.composition.recognise import refuse, what_file_is
from granite_switch.core.adapter_config import read_adapter_config
from granite_switch.core.border import checked, read_yaml
from granite_switch.core.records import ManifestEntry, RetiredEntry
from granite_switch.core.remote import MODULE
from granite_switch.core.spec import SwitchSpec
from granite_switch.errors import AdapterError, BaseModelError, CheckpointError, SwitchError

TECHNOLOGIES = ("alora", "lora")  # in order of preference
PROVENANCE = "granite_switch.json"  # in a folder that `extract` wrote
CONFIG = "adapter_config.json"
ADAPTER_FILES = (CONFIG, "adapter_model.safetensors", "io.yaml", PROVENANCE)
_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
_CHECKPOINT = re.compile(r"(?:checkpoint|epoch|step|iter)[-_]?\d+")
_UNWANTED = "--include or --exclude leaves it out"
_DEPTH = 4  # levels of folders in a source that are searched for adapters


Source = str | PathLike[str]


@dataclass(frozen=True)
class Found:
    """A PEFT adapter folder, and the name under which it is composed."""

    name: str
    folder: Path
    source: str  # for the record: a hub id with path and commit, or the folder's own name
    technology: str = ""  # from a library's folder name; "" if the adapter's config decides
    base_name: str = ""  # from a library's folder name; "" for a plain adapter folder
    invocation_placement: Literal["", "prefix", "suffix"] = ""  # where a missing invocation text is written
    retired: bool = False  # a removed adapter, whose slot stays reserved
    substitute_token_id: int | None = None  # of a removed adapter; None: the base's
    aside: str = ""  # why it is left out; in what `_places` finds, unless --include names it
    checkpoint: bool = False  # one of several states of one training run
    note: str = ""  # a warning for the plan


@dataclass(frozen=True)
class Discovery:
    """The adapters in the sources."""

    found: Sequence[Found]  # those that were chosen
    left: Sequence[str]  # a line for each that was left out


@dataclass(frozen=True)
class Selection:
    """Which adapters of the sources are wanted."""

    base_name: str = ""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    technology: str = ""

    def wants(self, name: str) -> bool:
        return (not self.include or self.names(name)) and not any(fnmatchcase(name, glob) for glob in self.exclude)

    def names(self, name: str) -> bool:
        """Whether --include names it."""
        return any(fnmatchcase(name, glob) for glob in self.include)


def base_folder(base: Source, revision: str | None = None) -> Path:
    """Return the base model's folder; a hub repository is fetched first."""
    return _whole(str(base), revision, _BASE_FILES, BaseModelError)


def model_folder(model: Source, revision: str | None = None) -> Path:
    """Return a composed model's folder; a hub repository is fetched first."""
    return _whole(str(model), revision, [*_BASE_FILES, MODULE, "README.md", "io_configs/*"], CheckpointError)


def _whole(model: str, revision: str | None, files: list[str], error: type[SwitchError]) -> Path:
    path = Path(model)
    if os.path.exists(path):
        if not path.is_dir():
            raise error(f"{model}: is a file; give the model's folder")
        return path
    ref = parse_ref(model, revision)
    prefix = f"{ref.path}/" if ref.path else ""
    folder = open_repository(ref, error).fetch([prefix + name for name in files], error) / ref.path
    if not folder.is_dir():
        raise error(f"{ref}: no such folder in the repository")
    return folder


def own_name(base: Source, folder: Path) -> str:
    """Return the base's own name: the last part of its hub id or folder."""
    ref = snapshot_of(folder) if os.path.exists(base) else parse_ref(str(base))
    return (ref.path or ref.repo).split("/")[-1] if ref else folder.resolve().name


def discover(sources: Sequence[Source], selection: Selection, revision: str | None = None) -> Discovery:
    """Find all wanted adapters in all sources, in order. If one comes as LoRA and aLoRA, the preferred one is taken.

    Raises:
        AdapterError: a source is missing or has no adapter, none is left after the selection, or two have one name.
    """
    every = [one for source in sources for one in _discover(str(source), selection, revision)]
    result = Discovery(_kept(every), [f"{one.source}: left out: {one.aside}" for one in every if one.aside])
    if not result.found:
        raise AdapterError(
            "no adapter is left to compose",
            problems=result.left,
            hint="see --list, --include, --exclude and --technology",
        )
    live = [f for f in result.found if not f.retired]
    problems = [
        f"{name}: {', '.join(str(f.folder) for f in live if f.name == name)}"
        for name in dict.fromkeys(f.name for f in live)
        if sum(f.name == name for f in live) > 1
    ]
    if problems:
        raise AdapterError(
            "two adapters have the same name",
            problems=problems,
            hint="exclude one with --exclude, or give them other names in a YAML manifest",
        )
    return result


def discover_for(
    model: SwitchSpec,
    sources: Sequence[Source],
    *,
    revision: str | None = None,
    base_name: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    technology: str = "",
) -> Discovery:
    """Find adapters for a composed model; libraries have them under its base's name."""
    name = base_name or model.base_model.rstrip("/").split("/")[-1]
    return discover(sources, Selection(name, include, exclude, technology), revision)


def placed(found: Sequence[Found], places: Mapping[str, Any]) -> list[Found]:
    """Set where the template writes missing invocation texts.

    Raises:
        AdapterError: a place is neither "prefix" nor "suffix", or there is no such adapter.
    """
    names = [one.name for one in found]
    if missing := [name for name in places if name not in names]:
        raise AdapterError(f"there is no adapter {', '.join(missing)} to place", hint=f"adapters: {', '.join(names)}")
    for name, where in places.items():
        if where not in ("", "prefix", "suffix"):
            raise AdapterError(f"{name}: an invocation text is placed as `prefix` or `suffix`, not {where!r}")
    return [replace(one, invocation_placement=places.get(one.name, one.invocation_placement)) for one in found]


def scan(sources: Sequence[str], revision: str | None = None, selection: Selection = Selection("*")) -> list[Found]:
    """List all adapters in the sources (`--list`), without fetching; `aside` says why one is left out."""
    result: list[Found] = []
    for source in sources:
        if _is_manifest(source):
            result += _manifest(Path(source), selection)
            continue
        here, _ = _scan(source, selection, revision)
        try:
            result += _choose(source, here, selection)
        except AdapterError as error:
            result += [replace(one, aside=error.message.removeprefix(f"{source}: ")) for one in here]
    return result


def _discover(source: str, selection: Selection, revision: str | None) -> list[Found]:
    """Find a source's adapters, fetch the wanted ones, and set `aside` of the others."""
    if _is_manifest(source):
        return _manifest(Path(source), selection)
    here, repository = _scan(source, selection, revision)
    if not here:
        if os.path.isdir(source):
            refuse(Path(source), source)
        raise AdapterError(
            f"{source}: contains no adapter",
            hint="give a PEFT adapter folder (adapter_config.json), a library folder or a YAML manifest",
        )
    found = _choose(source, here, selection)
    if repository and _kept(found):
        found = _fetched(repository, found)
    if not selection.technology:
        return found
    says = f"and --technology says {selection.technology}"
    return _leave(found, lambda f: "" if _technology(f) == selection.technology else f"it is {_technology(f)}, {says}")


def _is_manifest(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml") and os.path.isfile(source)


def _kept(found: Sequence[Found]) -> list[Found]:
    return [one for one in found if not one.aside]


def _leave(found: Sequence[Found], reason: Callable[[Found], str]) -> list[Found]:
    """Set `aside` of the adapters that are still kept."""
    return [one if one.aside else replace(one, aside=reason(one)) for one in found]


def _choose(source: str, here: Sequence[Found], selection: Selection) -> list[Found]:
    """Set `aside` of a source's adapters that are not wanted, by name, base and technology."""
    found = [replace(f, aside="" if selection.names(f.name) else f.aside) for f in here]
    found = [f if selection.wants(f.name) else replace(f, aside=_UNWANTED) for f in found]
    found = _one_checkpoint(source, found, selection)

    def fits(one: Found) -> bool:
        return selection.base_name == "*" or one.base_name in ("", selection.base_name)

    bases = sorted({f.base_name for f in _kept(found) if f.base_name})
    if bases and not any(map(fits, _kept(found))):
        raise AdapterError(
            f"{source}: nothing for base model {selection.base_name!r}",
            problems=[f"it has {name!r}" for name in bases],
            hint="choose one with --base-name",
        )
    found = _leave(found, lambda f: "" if fits(f) else f"it is for base {f.base_name!r}")
    if selection.technology:
        other = f"--technology says {selection.technology}"
        return _leave(found, lambda f: "" if f.technology in ("", selection.technology) else other)
    both = {f.name for f in _kept(found) if f.technology == TECHNOLOGIES[0]}
    return _leave(found, lambda f: "aLoRA is preferred to LoRA" if f.technology == "lora" and f.name in both else "")


def _one_checkpoint(source: str, found: Sequence[Found], selection: Selection) -> list[Found]:
    """Of several states of one training run, keep the final one or those that --include names; otherwise ask."""
    finished = [f.folder for f in _kept(found) if not f.checkpoint]
    states = [f for f in _kept(found) if f.checkpoint and not selection.names(f.name)]
    earlier = [f for f in states if f.folder.parent in finished]
    trainings = [[f for f in states if f.folder.parent == parent] for parent in {f.folder.parent for f in states}]
    states = next((t for t in trainings if len(t) > 1 and t[0] not in earlier), [])
    states = sorted(states, key=lambda f: int(re.findall(r"\d+", f.name)[-1]))
    if states:
        raise AdapterError(
            f"{source}: contains {len(states)} checkpoints of one training run; which one?",
            problems=[f.name for f in states],
            hint=f"--include {states[-1].name} takes the last one",
        )
    why = "an earlier state of the adapter above it (--include takes it)"
    return _leave(found, lambda f: why if f in earlier else "")


def _technology(found: Found) -> str:
    if found.technology:
        return found.technology
    config = read_adapter_config(found.folder)
    return "alora" if config.alora_invocation_tokens or config.invocation_string else "lora"


def _scan(source: str, selection: Selection, revision: str | None) -> tuple[list[Found], Repository | None]:
    """Find every adapter in a source. On the hub, its folder is a path in the repository until it is fetched."""
    path = Path(source)
    if os.path.isfile(path):
        raise AdapterError(f"{source}: {what_file_is(path)}", hint="give the adapter's folder, or a YAML manifest")
    if os.path.exists(path):
        ref = snapshot_of(path)
        label = str(ref) if ref else Path(os.path.abspath(path)).name
        name = (ref.path or ref.repo) if ref else os.path.abspath(path)
        folders = [Path(p).parent for p in files_below(path, _DEPTH) if Path(p).name == CONFIG]
        return list(_places(path, folders, name, ref or label, selection)), None
    ref = parse_ref(source, revision)
    repository = open_repository(ref, AdapterError)
    folders = [
        Path(p).parent.relative_to(ref.path)
        for p in repository.files
        if Path(p).name == CONFIG and Path(p).is_relative_to(ref.path)
    ]
    folders = [folder for folder in folders if len(folder.parts) <= _DEPTH]
    return list(_places(Path(ref.path), folders, ref.path or ref.repo, ref, selection)), repository


def _places(
    root: Path, folders: Sequence[Path], name: str, label: HubRef | str, selection: Selection
) -> Iterator[Found]:
    """Yield every adapter folder of a source, with the name, base and technology that its path implies."""
    above = tuple(Path(name).parts)
    for folder in sorted(folders, key=lambda f: f.parts):
        if isinstance(label, HubRef):
            source = str(label.at(f"{label.path}/{folder.as_posix()}" if folder.parts else label.path))
        else:
            source = f"{label}/{folder.as_posix()}" if folder.parts else label
        found = _place(above, folder.parts, selection)
        parent = next((p for p in folder.parents if p in folders), None) if folder.parts else None
        if parent is not None and not found.checkpoint:
            beneath = parent.as_posix() if parent.parts else "the source"
            found = replace(found, aside=f"it is inside the adapter of {beneath} (--include, or give its own path)")
        yield replace(found, folder=root / folder, source=source)


def _place(above: tuple[str, ...], parts: tuple[str, ...], selection: Selection) -> Found:
    """Read an adapter folder's path: a plain folder, or a library's <name>/<base>/<technology>.

    Args:
        above: the parts of the source's own path.
        parts: the parts of the folder's path in the source.
    """
    whole = (*above, *parts)
    *_, name, base, technology = ("", "", *whole)
    if technology in TECHNOLOGIES and name and len(whole) > 2:
        return Found(name, Path(), "", technology, base if parts else "")
    older = base in TECHNOLOGIES and name and (len(parts) > 1 or technology == selection.base_name)
    if older:  # the older layout: <name>/<technology>/<base>
        return Found(name, Path(), "", base, technology if parts else "")
    found = Found(whole[-1], Path(), "", checkpoint=bool(parts and _CHECKPOINT.fullmatch(parts[-1])))
    if len(parts) > 1 and not found.checkpoint:
        return replace(found, aside="it is nested deeper than a library's adapters (--include, or give its own path)")
    return found


def _fetched(repository: Repository, found: Sequence[Found]) -> list[Found]:
    """Fetch the kept adapters of a repository, and add the commit to their records."""
    prefixes = [f"{one.folder.as_posix()}/" if one.folder.parts else "" for one in _kept(found)]
    folder = repository.fetch([prefix + file for prefix in prefixes for file in ADAPTER_FILES], AdapterError)
    commit = replace(repository.ref, revision=folder.name)
    return [
        replace(one, folder=folder / one.folder, source=str(commit.at(one.folder.as_posix().strip("."))))
        if not one.aside
        else one
        for one in found
    ]


def _manifest(path: Path, selection: Selection) -> list[Found]:
    """Read a manifest: a YAML list of adapters, or under the key `adapters`, or a mapping by name (`ManifestEntry`).

    Paths are relative to the file. An entry {name, retired: true, substitute_token_id} reserves a removed adapter's
    slot and token.
    """
    data = read_yaml(path)
    records = data["adapters"] if isinstance(data, dict) and isinstance(data.get("adapters"), list) else data
    if isinstance(records, dict) and records and all(isinstance(value, dict) for value in records.values()):
        records = [{"name": name, **value} for name, value in records.items()]
    if not isinstance(records, list) or not records:
        raise AdapterError(f"{path}: contains no list of adapters", hint="each entry has `name`, `path`, `revision`")
    found = [_manifest_entry(path, number, record, selection) for number, record in enumerate(records, 1)]
    return _leave(found, lambda one: "" if one.retired or selection.wants(one.name) else _UNWANTED)


def _manifest_entry(path: Path, number: int, record: Any, selection: Selection) -> Found:
    where = f"{path}: entry {number}"
    hint = "each entry has `name`, `path`, `revision`"
    if isinstance(record, dict) and record.get("retired"):
        gone = checked(RetiredEntry, record, where, AdapterError, hint)
        return Found(gone.name, path, "", retired=True, substitute_token_id=gone.substitute_token_id)
    entry = checked(ManifestEntry, record, where, AdapterError, hint)
    local = path.parent / Path(entry.path).expanduser()
    source = str(local) if os.path.exists(local) else entry.path
    if entry.subfolder:
        place, at, revision = source.partition("@") if not os.path.exists(local) else (source, "", "")
        source = f"{place.rstrip('/')}/{entry.subfolder.strip('/')}{at}{revision}"
    here = _kept(_discover(source, Selection(selection.base_name, technology=selection.technology), entry.revision))
    if len(here) != 1:
        raise AdapterError(
            f"{where}: {entry.path} contains {len(here)} adapters, not one",
            hint="give the path of one adapter's folder",
        )
    note = ""
    if entry.type and (is_one := _technology(here[0])) != entry.type:
        note = f"{path.name} calls it {entry.type}; its adapter_config.json makes it {is_one}"
    name = entry.name or here[0].name
    return replace(here[0], name=name, base_name="", note=note, invocation_placement=entry.invocation_placement)
