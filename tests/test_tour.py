"""The notebook runs from top to bottom and shows what it showed; `python tests/test_tour.py` runs it and writes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pages
import pytest

TOUR = pages.ROOT / "examples" / "tour.ipynb"


def run(notebook: Any, folder: Path) -> Any:
    """A copy of the notebook with the outputs of now; a cell that fails or warns of an error raises."""
    from nbclient import NotebookClient

    done = copy.deepcopy(notebook)
    client = NotebookClient(
        done, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    quiet = "ignore:IProgress not found"  # advice of tqdm, with a path of this machine
    client.execute(env={**pages.environment(), "PYTHONWARNINGS": quiet})
    for cell in done.cells:
        cell.metadata = {}
    done.metadata = notebook.metadata
    return done


def words(notebook: Any) -> list[list[Any]]:
    """Of each cell what it prints, and of what kinds its results are; pictures differ in their last bits."""
    return [
        [output.get("text") or sorted(output.get("data", {})) for output in cell.get("outputs", [])]
        for cell in notebook.cells
    ]


def tables(notebook: Any) -> list[str]:
    """What the results say as plain text, pictures apart."""
    found = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [data["text/plain"] for data in found if "text/plain" in data and "image/png" not in data]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the client and its kernel are others' code
def test_the_tour_shows_what_it_showed(tmp_path: Path) -> None:
    """Every cell runs; figures, tables and kinds of pictures are those of the file."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `test`")
    pytest.importorskip("ipykernel", reason="the extra `test`")
    notebook = nbformat.read(TOUR, 4)
    done = run(notebook, tmp_path)
    assert words(done) == words(notebook)
    assert tables(done) == tables(notebook)


def test_the_tour_is_small_and_names_no_machine() -> None:
    """Anybody's checkout may hold it: below 150 kB, no path of the machine that ran it, no warning, no error."""
    text = TOUR.read_text(encoding="utf-8")
    assert len(text) < 150_000
    assert not any(
        word in text for word in (str(Path.home()), "/tmp", "site-packages", "stderr", "Traceback")
    )
    assert text.count('"image/png"') >= 2


if __name__ == "__main__":
    import tempfile

    import nbformat

    with tempfile.TemporaryDirectory() as name:
        nbformat.write(run(nbformat.read(TOUR, 4), Path(name)), TOUR)
