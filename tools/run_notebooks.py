#!/usr/bin/env python
"""Execute notebooks and store them with their outputs.

    python tools/run_notebooks.py                         # all of notebooks/, minutes
    python tools/run_notebooks.py notebooks/own_data.ipynb

They run in a temporary folder, so paths in their outputs are relative.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
_CELL_SECONDS = 1800


def run_notebook(
    path: Path, folder: Path, parameters: Mapping[str, object] | None = None
) -> nbformat.NotebookNode:
    """Execute a notebook and return it with its outputs.

    Args:
        path: the notebook.
        folder: working directory.
        parameters: values instead of those of the cell with the tag ``parameters``.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        KeyError: if the cell does not set one of `parameters`.
    """
    notebook = nbformat.read(path, as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    original = cell.source
    for name, value in (parameters or {}).items():
        if f"{name} = " not in original:
            raise KeyError(f"{path.name} has no parameter {name}")
        cell.source += f"\n{name} = {value!r}"
    # `dsrcnn` in a shell finds the program of this environment, activated or not.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": search, "PYTHONWARNINGS": "ignore"}
    client = nbclient.NotebookClient(
        notebook,
        timeout=_CELL_SECONDS,
        kernel_name="python3",
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(cwd=str(folder), env=environment)
    cell.source = original
    return notebook


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = run_notebook(path, Path(folder))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which differ in every run
            for output in cell.get("outputs", []):
                if "image/jpeg" in output.get("data", {}):  # smaller
                    output["data"].pop("image/png", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
