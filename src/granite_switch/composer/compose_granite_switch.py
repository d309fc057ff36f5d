"""The composer command of releases up to 0.1.1: translates its options to today's commands, prints and runs them.

Built-in adapters are empty slots (`compose.slot`). Options that configured the old switch are ignored.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from granite_switch import cli
from granite_switch.cli.console import error, notes
from granite_switch.errors import AdapterError, SwitchError

if TYPE_CHECKING:
    from granite_switch.composition.base import Base

_BASE = "ibm-granite/granite-4.1-3b"
_OUTPUT = "./granite-with-all-aloras"
_LINEARS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINEARS += ("shared_mlp.input_linear", "shared_mlp.output_linear")

# ignored options, and why
_IGNORED = {
    "technology": "an adapter's adapter_config.json says whether it is LoRA or aLoRA; --technology-filter selects",
    "switch_head_dim": "the switch has no size to configure",
    "control_dims": "the switch has no size to configure",
    "ms_code_m": "the switch has no code to configure",
    "ms_memory_gain": "the switch has no gain to configure",
    "base_reset_token": "every model has <|return_to_base|>",
    "debug_fields": "config.json names each adapter's source",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the old command and return the exit code.

    Args:
        arguments: the command line's arguments; those of the process by default.
    """
    options, unknown = _parser().parse_known_args(arguments)
    if options.lora_alpha is None:
        options.lora_alpha = float(options.lora_rank)
    try:
        _refuse_unknown(unknown)
        ignored = [name for name in _IGNORED if getattr(options, name)]
        notes([f"--{name.replace('_', '-')} is ignored: {_IGNORED[name]}" for name in ignored])
        command = _command(options)
        added = [_added(options, name) for name in options.built_in_adapters]
        notes([f"this command is now: {shlex.join(line)}" for line in (command, *added)])
        if not options.built_in_adapters or options.list_adapters:
            return _run(command[1:])
        with TemporaryDirectory() as temporary:
            if options.adapters:
                return _run(command[1:]) or _add_empty(options)
            slots = _empty_slots(options, Path(temporary))
            return _run([*command[1:], *(part for slot in slots for part in ("--adapters", str(slot)))])
    except SwitchError as problem:
        error(problem)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m granite_switch.composer.compose_granite_switch", description=__doc__
    )
    parser.add_argument("--adapters", nargs="*", default=[], help="hub ids, folders or YAML manifests")
    parser.add_argument("--base-model", default=_BASE, help="folder or hub id")
    parser.add_argument("--target-model", default="", help="the base's folder in adapter libraries")
    parser.add_argument("--output", default=_OUTPUT, help="folder to create")
    parser.add_argument("--include-adapters", nargs="*", default=[], help="globs of names to take")
    parser.add_argument("--exclude-adapters", nargs="*", default=[], help="globs of names to leave out")
    parser.add_argument("--technology-filter", choices=["alora", "lora"], default="", help="take only these")
    parser.add_argument("--list-adapters", action="store_true", help="list the adapters in the sources and stop")
    parser.add_argument("--create-ioyaml", action="store_true", help="write a minimal io.yaml where there is none")
    parser.add_argument("--built-in-adapters", nargs="*", default=[], help="names of empty slots")
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of the empty slots")
    parser.add_argument("--lora-alpha", type=float, default=None, help="alpha of the empty slots; the rank by default")
    for name in ("technology", "switch-head-dim", "control-dims", "ms-code-m", "ms-memory-gain"):
        parser.add_argument(f"--{name}", default=None, help="ignored")
    for name in ("base-reset-token", "debug-fields"):
        parser.add_argument(f"--{name}", action="store_true", help="ignored")
    return parser


def _refuse_unknown(rest: Sequence[str]) -> None:
    audio = [part for part in rest if part.startswith(("--asr-", "--enable-audio"))]
    if audio:
        raise AdapterError(
            f"{', '.join(audio)}: audio cannot be composed",
            hint="transcribe with another model and send the text",
        )
    if rest:
        raise AdapterError(f"unknown arguments: {' '.join(rest)}", hint="--help lists the options")


def _command(options: argparse.Namespace) -> list[str]:
    """Return today's command for the old options, without the empty slots."""
    command = ["granite-switch", "compose", options.base_model]
    for option, values in (
        ("--adapters", options.adapters),
        ("--include", options.include_adapters),
        ("--exclude", options.exclude_adapters),
        ("--technology", [options.technology_filter] if options.technology_filter else []),
        ("--base-name", [options.target_model.rstrip("/").split("/")[-1]] if options.target_model else []),
        ("--output", [options.output]),
    ):
        command += [part for value in values for part in (option, value)]
    command += ["--create-io-yaml"] * options.create_ioyaml
    return command + ["--list"] * options.list_adapters


def _added(options: argparse.Namespace, name: str) -> list[str]:
    command = ["granite-switch", "add", options.output, "--new", name, "--rank", str(options.lora_rank)]
    return [*command, "--alpha", f"{options.lora_alpha:g}", "--targets", ",".join(_LINEARS[:7])]


def _settings(options: argparse.Namespace, base: "Base") -> dict[str, Any]:
    targets = [name for name in _LINEARS if any(path.endswith(f".{name}") for path in base.linears)]
    return {"rank": options.lora_rank, "alpha": options.lora_alpha, "targets": targets}


def _add_empty(options: argparse.Namespace) -> int:
    """Add the empty slots to the composed model."""
    from granite_switch.composition.composed import read_composed
    from granite_switch.composition.slot import add_empty

    settings = _settings(options, read_composed(Path(options.output)).base)
    for name in options.built_in_adapters:
        add_empty(options.output, name, **settings)
    return 0


def _empty_slots(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Write the empty slots as adapter folders, to be composed when there are no other adapters."""
    from granite_switch.composition.base import read_base
    from granite_switch.composition.slot import write_empty
    from granite_switch.composition.sources import base_folder

    base = read_base(base_folder(options.base_model))
    settings = _settings(options, base)
    return [write_empty(base, folder / name, **settings) for name in options.built_in_adapters]


def _run(arguments: list[str]) -> int:
    try:
        cli.main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
