"""Damage to files: to values in structured files, to bytes in others, and to the file as a whole."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Random = random.Random

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3.5, 4.0, -0.0, 2**31, 2**63, 2**70, 10**400, 1e400, float("nan")),
    *(
        "",
        "a",
        "4",
        "*.q_proj",
        "(a+)+$",
        "../../x",
        "/etc/passwd",
        "a/b",
        "x\nlicense: mit",
        "<|a|>",
        "\x00",
        "\ud800",
    ),
    *("é", "lora", "none", "base", "{{ 1 / 0 }}", "x" * 5000, [], {}, [[]], [None], [-1], ["x"], {"": None}, {"x": 4}),
)


def node(data: Any, draw: Random) -> tuple[Any, Any] | None:
    """A random place in nested data: its container and its key."""
    places: list[tuple[Any, Any]] = []
    level = [data]
    for _ in range(600):  # YAML can refer to itself
        items = [item for item in level if isinstance(item, dict | list)]
        level = []
        for item in items:
            keys = list(item) if isinstance(item, dict) else range(len(item))
            some = keys if len(keys) <= 40 else draw.sample(list(keys), 40)  # do not let the vocabulary dominate
            places += [(item, key) for key in some]
            level += [item[key] for key in some]
    return draw.choice(places) if places else None


def structure(data: Any, draw: Random) -> Any:
    """Data with one change: a value replaced, moved, nudged, repeated, removed, added or nested."""
    place = node(data, draw)
    if place is None or draw.random() < 0.02:
        return draw.choice(VALUES)
    container, key = place
    old = container[key]
    way = draw.randrange(8)
    if way <= 2:
        container[key] = draw.choice(VALUES)
    elif way == 3 and isinstance(old, int | float):
        container[key] = old + draw.choice((-1, 1, 2**20)) if abs(old) < 2**60 else 1
    elif way == 4:
        other = node(data, draw)
        container[key] = json.loads(json.dumps(other[0][other[1]])) if other else None
    elif way == 5:
        del container[key]
    elif way == 6:
        nested: Any = old
        for _ in range(draw.choice((1, 2, 99, 500))):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        container[key] = nested
    elif isinstance(container, dict):
        container[draw.choice(("x", "use_dora", "__metadata__", "../x", "", str(key) + "2"))] = draw.choice(VALUES)
    else:
        container.insert(draw.randrange(len(container) + 1), draw.choice((*VALUES, old)))
    return data


def text_of(data: Any) -> bytes:
    """JSON text, even of data nested too deeply for the encoder."""
    try:
        return json.dumps(data, ensure_ascii=True).encode()
    except RecursionError:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000


def json_file(data: bytes, draw: Random) -> bytes:
    return text_of(structure(json.loads(data), draw))


def yaml_file(data: bytes, draw: Random) -> bytes:
    if draw.random() < 0.3:
        return draw.choice(
            (b"!!python/object/apply:os.system ['true']", b"a: &a [*a]", b"? [a]\n: b", b"\t- x", b"- *b")
        )
    try:
        return yaml.safe_dump(structure(yaml.safe_load(data), draw)).encode()
    except (yaml.YAMLError, RecursionError, UnicodeError):
        return b"[" * 5000


def safetensors_file(data: bytes, draw: Random) -> bytes:
    """A safetensors file with a changed header, header length or data."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    way = draw.randrange(6)
    if way <= 2:
        header = text_of(structure(json.loads(header), draw))
        return len(header).to_bytes(8, "little") + header + body
    if way == 3:
        changed = draw.choice((0, 1, length - 1, length + 1, length + 8, 100_000_001, 2**63, 2**64 - 1))
        return changed.to_bytes(8, "little") + header + body
    if way == 4:
        return data[: draw.randrange(len(data))] if draw.random() < 0.5 else data + bytes(draw.randrange(1, 9))
    at = draw.randrange(max(1, len(body) - 4))
    return data[: 8 + length] + body[:at] + draw.choice((b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f")) + body[at + 4 :]


def any_file(data: bytes, draw: Random) -> bytes:
    """Bytes changed, cut, repeated, inserted or removed."""
    at, size = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 100))
    return draw.choice((
        data[:at], data[:at] + data[at + size :], data[:at] + draw.randbytes(size) + data[at + size :],
        data[:at] + data[max(0, at - size) : at] + data[at:], data[:at] + b'{"[\\' + data[at:], b"", data * 2,
        b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"),
    ))  # fmt: skip


def gguf_file(data: bytes, draw: Random) -> bytes:
    """The keys, and not the tensors behind them."""
    at = draw.randrange(24, 20_000)
    return any_file(data[:at], draw) + data[at:] if draw.random() < 0.5 else data[:at] + any_file(data[at:], draw)


READERS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": json_file, ".yaml": yaml_file, ".safetensors": safetensors_file, ".gguf": gguf_file
}  # fmt: skip


def place(path: Path, draw: Random) -> str:
    """Replace a file by nothing, a folder, a link, a pipe or another file."""
    way = draw.choice(("nothing", "folder", "link out", "link to itself", "pipe", "another"))
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "link out":
        path.symlink_to("/etc/hostname")
    elif way == "link to itself":
        path.symlink_to(path.name)
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "another" and (others := [p for p in sorted(path.parent.iterdir()) if p.is_file()]):
        os.link(draw.choice(others), path)
    return way


def mutate(folder: Path, draw: Random) -> str:
    """Change one file of a folder, perhaps more than once. Returns a description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = draw.choice(files)
    name = str(path.relative_to(folder))
    if draw.random() < 0.04:
        return f"{name}: {place(path, draw)}"
    data = path.read_bytes()
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        change = any_file if draw.random() < 0.15 else READERS.get(path.suffix, any_file)
        try:
            data = change(data, draw)
        except (ValueError, RecursionError, OverflowError, MemoryError, yaml.YAMLError):
            data = any_file(data, draw)  # the content no longer matches the name
            change = any_file
        done.append(change.__name__)
        if len(data) > 1 << 20:
            break
    path.unlink()  # it may be a link to the original
    path.write_bytes(data)
    return f"{name}: {', '.join(done)}"
