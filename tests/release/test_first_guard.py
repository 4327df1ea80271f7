"""The notebook of docs/ runs from top to bottom, and its guard is served as it judges."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow
DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_first_guard(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_GUARD", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = nbformat.read(DOCS / "first_guard.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    cells = [
        "found = (verdict.response_unsafe, verdict.categories, answered['results'][0])",
        "print('SEEN', found[2]['flagged'], abs(found[2]['category_scores']['unsafe'] - found[0]) < 1e-4)",
    ]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    resources = {"metadata": {"path": str(DOCS)}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    (said,) = notebook.cells[-1].outputs
    assert said.text.startswith("SEEN ")
    assert said.text.endswith("True\n"), said.text
    assert (tmp_path / "evaluation/results.html").is_file()
