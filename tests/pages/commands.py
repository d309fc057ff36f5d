"""Extract the commands of a page: shell blocks, indented commands, and inline commands.

A word in capitals is a placeholder (`MODEL`, `SOURCE...`), and `[--option]` is optional.
"""

import re
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("granite-switch", "pip", "vllm", "llama-server", "python", "echo", "VLLM_CPU_KVCACHE_SPACE=8")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:granite-switch|vllm serve|VLLM_\w+=\d+ vllm serve) [^`\n]+)`")
_MARK = re.compile(r"<!-- needs (.+?) -->\s*\Z")


def blocks(page: Path) -> list[list[str]]:
    """The page's commands in order, grouped: a fenced block runs in sequence, other commands are single."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    shells = [m for m in _FENCE.finditer(text) if m[1] in ("", "bash", "console", "sh")]
    found = [(m.start(), m[2].splitlines()) for m in shells]
    rest = _FENCE.sub(lambda match: " " * len(match[0]), text)
    found += [(m.start(), [m[1]]) for m in re.finditer(r"^ {4}(\S.*)$", rest, re.MULTILINE)]
    found += [(m.start(), [m[1]]) for m in _INLINE.finditer(rest)]
    return [[c for line in lines if (c := _command(line))] for _, lines in sorted(found)]


def _command(line: str) -> str:
    """A line without its prompt and comment; "" if it is not a command."""
    line = re.sub(r"\s+#\s.*$", "", line.removeprefix("$ ")).strip()
    return line if line.split(" ")[0] in PROGRAMS else ""


def snippets(page: Path) -> list[str]:
    """The page's self-contained Python blocks. Others are marked by a `needs` comment."""
    text = page.read_text(encoding="utf-8")
    return [m[2] for m in _FENCE.finditer(text) if m[1] == "python" and not _MARK.search(text[: m.start()])]


def filled(command: str, words: Mapping[str, str]) -> str:
    """A command with its placeholders replaced.

    Raises:
        ValueError: a placeholder is unknown.
    """
    command = re.sub(r"\s\[[^]]*\]", "", command)
    command = re.sub(r"\b([A-Z][A-Z]+)\b(\.\.\.)?(?![\w=])", lambda m: words.get(m[1], m[1]), command)
    if unknown := [w for w in re.findall(r"(?<![\w-])[A-Z]{3,}(?![\w=])", command) if w not in words.values()]:
        raise ValueError(f"{command}: what is {', '.join(unknown)}?")
    return command
