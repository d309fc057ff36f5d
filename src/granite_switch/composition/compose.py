"""Compose a base model and adapters into one checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from granite_switch.composition.base import read_base
from granite_switch.composition.hub import snapshot_of
from granite_switch.composition.plan import Plan, assemble, read_slots
from granite_switch.composition.proof import Prover
from granite_switch.composition.sources import Selection, Source, base_folder, discover, own_name, placed
from granite_switch.composition.write import write_model
from granite_switch.core.progress import Progress
from granite_switch.core.staging import check_target, staged


def compose(
    base: Source,
    adapters: Sequence[Source],
    output: Source,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Compose a base model and adapters into a checkpoint at `output`.

    Args:
        base: local folder or hub id of a model.
        adapters: PEFT adapter folders, library folders, YAML manifests or hub ids.
        output: the folder to create; it appears only when it is complete.
        force: replace an existing folder.
        progress: called for each piece that is written.
        options: as for `prepare`.

    Returns:
        The plan that was carried out.

    Raises:
        SwitchError: lists everything that is wrong and how to fix it; no partial output is left.
    """
    check_target(Path(output), force=force)
    with Prover() as prover:  # begins to import transformers
        planned = prepare(base, adapters, **options)
        with staged(Path(output), force=force) as folder:
            write_model(planned, folder, progress, prover=prover)
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
    """Read and check everything without writing; return the plan.

    Args:
        base: local folder or hub id of a model.
        adapters: PEFT adapter folders, library folders, YAML manifests or hub ids.
        revision: revision of hub repositories that are given without one (`owner/repo@revision`).
        adapter_revision: the same, for repositories of adapters only.
        base_name: the base's folder name in adapter libraries; defaults to the base's own name.
        include: globs of adapter names to take; all by default.
        exclude: globs of adapter names to leave out.
        technology: "alora" or "lora", to take only one. By default aLoRA is preferred if an adapter comes as both.
        generatable: let the model generate control tokens.
        create_io_yaml: write a minimal io.yaml for adapters without one.
        place: adapter name -> "prefix" or "suffix": where the chat template writes a missing invocation text.
    """
    folder = base_folder(base, revision)
    name = base_name or own_name(base, folder)
    there = discover(adapters, Selection(name, include, exclude, technology), adapter_revision or revision)
    found = placed(there.found, place or {})
    snapshot = snapshot_of(folder)
    read = read_base(folder)
    planned = assemble(
        read,
        read_slots(found, read),
        base_model=str(replace(snapshot, revision=None)) if snapshot else name,
        base_commit=(snapshot.revision or "") if snapshot else "",
        generatable=generatable,
        create_io_yaml=create_io_yaml,
    )
    return replace(planned, notes=(*planned.notes, *there.left))
