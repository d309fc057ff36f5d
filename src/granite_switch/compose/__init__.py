"""Compose a base model and adapters into one checkpoint, as a stream of files."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from granite_switch.compose.hub import snapshot_of
from granite_switch.compose.plan import Plan, plan
from granite_switch.compose.sources import Selection, base_folder, discover, own_name, placed
from granite_switch.compose.write import write_model
from granite_switch.core.staging import check_target, staged

__all__ = ["Plan", "compose", "prepare"]

Source = str | PathLike[str]


def compose(
    base: Source,
    adapters: Sequence[Source],
    output: Source,
    *,
    force: bool = False,
    on_bytes: Callable[[int], Any] | None = None,
    **options: Any,
) -> Plan:
    """Compose a base model and adapters into a checkpoint at `output`.

    Args:
        base: local folder or hub id of a Granite model.
        adapters: PEFT adapter folders, library folders, YAML manifests or hub ids.
        output: the folder to make. It appears only when it is complete.
        force: replace an existing folder.
        on_bytes: called with the number of bytes after each piece that is copied.
        options: as for `prepare`.

    Returns:
        What was composed.

    Raises:
        SwitchError: with all that is wrong and what to do; nothing is left over.
    """
    check_target(Path(output), force=force)
    planned = prepare(base, adapters, **options)
    with staged(Path(output), force=force) as folder:
        write_model(planned, folder, on_bytes)
    return planned


def prepare(
    base: Source,
    adapters: Sequence[Source],
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    base_name: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    technology: str = "",
    generatable: bool = False,
    create_io_yaml: bool = False,
    place: Mapping[str, str] | None = None,
) -> Plan:
    """Read and check everything, and write nothing.

    Args:
        base: local folder or hub id of a Granite model.
        adapters: PEFT adapter folders, library folders, YAML manifests or hub ids.
        revision: of every hub repository that is given without one (`owner/repo@revision`).
        adapter_revision: of those of adapters.
        base_name: the base's folder in adapter libraries; the base's own name by default.
        include: globs of adapter names to take; all by default.
        exclude: globs of adapter names to leave out.
        technology: "alora" or "lora", where only one is wanted. Of both, aLoRA is preferred.
        generatable: let the model generate control tokens.
        create_io_yaml: write a minimal io.yaml for adapters without one.
        place: adapter's name -> "prefix" or "suffix": where the chat template writes a missing invocation text.
    """
    folder = base_folder(str(base), revision)
    name = base_name or own_name(str(base), folder)
    selection = Selection(name, tuple(include), tuple(exclude), technology)
    there = discover([str(source) for source in adapters], selection, adapter_revision or revision)
    snapshot = snapshot_of(folder)
    planned = plan(
        folder,
        placed(there.found, place or {}),
        base_name=name,
        base_source=str(replace(snapshot, revision=None)) if snapshot else name,
        base_commit=(snapshot.revision or "") if snapshot else "",
        generatable=generatable,
        create_io_yaml=create_io_yaml,
    )
    return replace(planned, notes=(*planned.notes, *map(str, there.left)))


class _Callable(ModuleType):
    """Importing this package binds it to the name `granite_switch.compose`, which is to be the function too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return compose(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
