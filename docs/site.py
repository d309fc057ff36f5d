"""Hooks for `make docs`: README.md becomes the first page, and links that leave docs/ point to the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s]+)(\))")


def on_files(files: Files, config: Any) -> Files:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    def target(match: re.Match[str]) -> str:
        link = match[2]
        if page.file.src_uri == "index.md":
            link = link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"
        if link.startswith("../"):
            kind = "tree" if link.endswith("/") else "blob"
            link = f"{config.repo_url.rstrip('/')}/{kind}/main/{link.removeprefix('../')}"
        return f"{match[1]}{link}{match[3]}"

    return _LINK.sub(target, markdown)
