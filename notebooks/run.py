"""Run the notebooks from start to end: NAME.py (jupytext's percent format) becomes NAME.ipynb, with outputs.

    python notebooks/run.py            # all that can run on this machine
    python notebooks/run.py 1 4        # some, by number
    python notebooks/run.py --check    # run, but write nothing

A notebook that needs a missing program (`# needs: PROGRAM` in its first lines) is reported and left as it is.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
_NOISE = re.compile(r"\x1b\[[0-9;]*m|.*(Loading weights|it/s\]).*\n?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for source in sorted(HERE.glob("[0-9]*.py")):
        if options.numbers and source.name[0] not in options.numbers:
            continue
        if missing := needed(source):
            print(f"{source.stem}: not run, {missing} is missing", flush=True)
            continue
        start = time.monotonic()
        notebook = run(source)
        if not options.check:
            nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.stem}: {time.monotonic() - start:.0f} s", flush=True)


def needed(source: Path) -> str:
    """The missing program that a notebook needs; "" if nothing is missing."""
    match = re.search(r"^# needs: (\S+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match and not (HERE.parent / match[1]).exists() else ""


def run(source: Path) -> nbformat.NotebookNode:
    """The notebook with outputs from a fresh kernel of this Python.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = read(source)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}})
    client.coalesce_streams = True  # else how a text is cut depends on the machine
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
        if cell.cell_type == "code":
            cell.outputs = [cleaned(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook without outputs. Cell ids are numbers, so the same text gives the same file."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    return notebook


def cleaned(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if "text" in output:
        output["text"] = _NOISE.sub("", output["text"])
    return output


if __name__ == "__main__":
    sys.exit(main())
