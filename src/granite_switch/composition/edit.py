"""Change a composed model: add, remove, update and rename adapters.

The model is split and composed again from its parts in a folder beside it, where unchanged files are linked; the two
folders are then swapped in one step.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from granite_switch.composition.adapters import Adapter, retired
from granite_switch.composition.card import model_card
from granite_switch.composition.composed import VERIFY, Composed, read_composed
from granite_switch.composition.plan import Plan, assemble, read_slots
from granite_switch.composition.sources import Source, discover_for, model_folder
from granite_switch.composition.write import write_model
from granite_switch.core.border import check_name
from granite_switch.core.files import in_hub_cache, inside
from granite_switch.core.layout import adapter_file
from granite_switch.core.model import read_model
from granite_switch.core.staging import check_target, held, link_or_copy, restore, staged
from granite_switch.errors import AdapterError, CheckpointError, OutputError

Change = Callable[[Composed], list[Adapter]]  # returns the slots of the changed model

_SMALL = 1 << 20  # bytes; smaller files are copied, not linked, so that editing one leaves the other unchanged


def add(
    model: Source,
    sources: Sequence[Source],
    *,
    output: Source | None = None,
    force: bool = False,
    create_io_yaml: bool = False,
    **selection: Any,
) -> Plan:
    """Add adapters to a composed model. Existing adapters keep their slots and token ids.

    Args:
        model: a composed model; a hub id needs an `output`.
        sources: PEFT adapter folders, library folders, YAML manifests or hub ids.
        output: a folder to create; by default the model is changed in place.
        force: replace an existing output.
        create_io_yaml: write a minimal io.yaml for adapters without one.
        selection: `revision`, `base_name`, `include`, `exclude`, `technology`, as for `compose`.

    Returns:
        The plan of the changed model.

    Raises:
        SwitchError: lists everything that is wrong; the model is then unchanged.
    """
    folder = folder_of(model, output)
    there = discover_for(read_model(folder)[1], sources, **selection)

    def change(old: Composed) -> list[Adapter]:
        if twice := [one.name for one in there.found if one.name in old.adapters and not one.retired]:
            raise AdapterError(
                f"{folder}: already has {', '.join(twice)}",
                hint="`granite-switch update` replaces an adapter; a YAML manifest gives it another name",
            )
        return [*old.slots, *read_slots(there.found, old.base)]

    plan = _edit(folder, output, force, change, create_io_yaml)
    return replace(plan, notes=(*plan.notes, *there.left))


def update(
    model: Source, sources: Sequence[Source], *, output: Source | None = None, force: bool = False, **selection: Any
) -> Plan:
    """Replace adapters of a composed model by others of the same name. Slots and token ids do not change.

    Args, returns, raises: as for `add`.
    """
    folder = folder_of(model, output)
    found = discover_for(read_model(folder)[1], sources, **selection).found

    def change(old: Composed) -> list[Adapter]:
        _must_have(old, [one.name for one in found], "`granite-switch add` adds new ones, --include selects some")
        new = {slot.name: slot for slot in read_slots(found, old.base)}
        return [slot if slot.spec.retired else new.get(slot.name, slot) for slot in old.slots]

    return _edit(folder, output, force, change)


def remove(model: Source, names: Sequence[str], *, output: Source | None = None, force: bool = False) -> Plan:
    """Remove adapters. Their slots and tokens are retired: the tokens return to the base and are not reused.

    Args:
        names: the adapters' names.
        model, output, force: as for `add`.
    """
    folder = folder_of(model, output)

    def change(old: Composed) -> list[Adapter]:
        _must_have(old, names)
        return [retired(slot.name, slot.spec.substitute_token_id) if slot.name in names else slot for slot in old.slots]

    return _edit(folder, output, force, change)


def rename(model: Source, old: str, new: str, *, output: Source | None = None, force: bool = False) -> Plan:
    """Rename an adapter and its control token. Slot and token id do not change.

    Args:
        old: the adapter's name.
        new: its new name.
        model, output, force: as for `add`.
    """
    folder = folder_of(model, output)
    check_name(new)

    def change(model: Composed) -> list[Adapter]:
        _must_have(model, [old])
        if new in {adapter.name for adapter in model.spec.adapters}:
            kind = "an" if new in model.adapters else "a removed"
            raise AdapterError(f"{folder}: {new} is the name of {kind} adapter", hint="choose another name")
        return [
            replace(slot, spec=replace(slot.spec, name=new), file=None)
            if slot.name == old and not slot.spec.retired
            else slot
            for slot in model.slots
        ]

    return _edit(folder, output, force, change)


def folder_of(model: Source, output: Source | None) -> Path:
    """Return the model's folder. The hub's cache is never changed in place, because every later load reads it."""
    path = Path(model)
    restore(path)
    if output is None and (not path.exists() or in_hub_cache(path)):
        kind = "is in the hub's cache" if path.exists() else "is not a local folder"
        raise OutputError(
            f"{model}: {kind}; only your own folders can be changed in place",
            hint="choose where to write the changed model with --output",
        )
    return model_folder(model)


def _must_have(model: Composed, names: Sequence[str], more: str = "") -> None:
    if missing := [name for name in names if name not in model.adapters]:
        there = f"adapters: {', '.join(model.adapters) or 'none'}"
        raise AdapterError(
            f"{model.folder}: has no adapter {', '.join(missing)}", hint=f"{there}; {more}" if more else there
        )


def _edit(
    folder: Path,
    output: Source | None,
    force: bool,
    change: Change,
    create_io_yaml: bool = False,
) -> Plan:
    """Write the changed model to `output`, or in place."""
    folder = folder.resolve()
    target = Path(output).absolute() if output is not None else folder
    if target.resolve() != folder:
        check_target(target, force=force)
        with held(folder), staged(target, force=force) as partial:
            return _write(folder, partial, change, create_io_yaml)
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: is read-only", hint="choose another folder with --output")
    with staged(folder, force=True) as partial:
        return _write(folder, partial, change, create_io_yaml)


def _write(folder: Path, partial: Path, change: Change, create_io_yaml: bool) -> Plan:
    old = read_composed(folder)
    slots = change(old)
    plan = assemble(old.base, slots, kept=old.spec, create_io_yaml=create_io_yaml)
    _check_kept(old, plan)
    write_model(plan, partial, same_rows=plan.spec.copied_rows == old.spec.copied_rows)
    kept = _carry_over(old, plan, partial)
    return replace(plan, warnings=(*plan.warnings, *kept))


def _check_kept(old: Composed, plan: Plan) -> None:
    """Check that unchanged adapters keep their records; config.json may have been edited."""
    changed = [
        before.name
        for before, after, old_slot, new_slot in zip(
            old.spec.adapters, plan.spec.adapters, old.slots, plan.slots, strict=False
        )
        if old_slot is new_slot and before != after
    ]
    if changed:
        raise CheckpointError(
            f"{old.folder / 'config.json'}: the records of {', '.join(changed)} were changed by hand",
            hint=f"restore the file; {VERIFY} {old.folder}",
        )


def _carry_over(old: Composed, plan: Plan, partial: Path) -> list[str]:
    """Copy the folder's other files, and return a warning if README.md was edited and is kept."""
    gone = {adapter_file(name) for name in old.adapters}
    same = {slot.name for slot in plan.slots if not slot.spec.retired and slot in old.slots}
    for parent, _, names in os.walk(old.folder):
        for name in names:
            source = Path(parent, name)
            relative = source.relative_to(old.folder)
            target = partial / relative
            config_of = relative.parts[1] if relative.parts[0] == "io_configs" and len(relative.parts) > 2 else ""
            if target.exists() or str(relative) in gone or (config_of and config_of not in same):
                continue
            inside(old.folder, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.stat().st_size > _SMALL:
                link_or_copy(source, target)
            else:
                shutil.copy(source, target)
    card = old.folder / "README.md"
    if card.is_file() and card.read_bytes() != model_card(old.spec, old.adapters).encode():
        shutil.copy(card, partial / "README.md")
        return [f"{card}: was edited by hand and is kept"]
    return []
