"""docs/notebook.ipynb runs as it stands, in a kernel: training in it has a running event loop around it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def shown(notebook) -> list[int]:
    """How many videos each cell of code shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pages = [[out.data.get("text/html", "") for out in cell.outputs if "data" in out] for cell in cells]
    return [sum(page.count("<video") for page in cell) for cell in pages]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_videos(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    written = shown(notebook)
    assert [*map(bool, written)] == [True, True, False, True]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(notebook) == written


if __name__ == "__main__":  # execute it anew, with its outputs
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.output_type != "stream" or out.name == "stdout"]
    nbformat.write(notebook, NOTEBOOK)
