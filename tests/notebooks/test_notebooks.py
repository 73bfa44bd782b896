"""Every notebook runs from top to bottom, and what is stored in it is what a run gives."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes: a notebook is read in the browser and lives in the repository
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def outputs(cell: Any) -> list[str]:
    """The kinds of output of a cell, in order; printed text counts once, however it was cut, and warnings do not."""
    kinds = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            kinds += ["text"] if output.name == "stdout" else []
        elif output.output_type == "display_data":  # figures, and what rich prints
            kinds.append("figure" if "image/png" in output.data else "text")
        else:
            kinds.append(output.output_type)
    return [kind for kind, _ in groupby(kinds)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_can_be_read_as_it_lies(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < LARGEST
    assert notebook.cells[0].cell_type == "markdown"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(outputs(cell) for cell in code), "commit the notebook with its outputs"
    assert not any("error" in outputs(cell) for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert "/tmp/" not in path.read_text()
    assert "/home/" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_gives_what_is_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    stored = [outputs(cell) for cell in notebook.cells]
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert [outputs(cell) for cell in notebook.cells] == stored
