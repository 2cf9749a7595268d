"""examples/quickstart.ipynb, executed."""

from pathlib import Path

import pytest
from conftest import ROOT, TIMM_HAS_LOCAL_DIR, python_path

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

SHORTER = {"EPOCHS = 6": "EPOCHS = 1", "range(40)": "range(10)", "48:112:16": "64,80"}


@pytest.mark.slow
@pytest.mark.skipif(not TIMM_HAS_LOCAL_DIR, reason="timm knows no local-dir: yet")
def test_the_notebook_runs_and_shows_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", 4)
    for cell in notebook.cells:
        for text, other in SHORTER.items():
            cell.source = cell.source.replace(text, other)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]
    assert sorted(shown) == ["image/jpeg", "image/jpeg", "image/png", "image/png"]
    assert "'cross', 'disc', 'frame', 'ring', 'square', 'triangle'" in outputs[-1]["data"]["text/plain"]
    said = "".join(output.get("text", "") for output in outputs)
    assert "Error" not in said and "took" not in said
    assert str(tmp_path) not in said
    assert (tmp_path / "report.html").is_file() and (tmp_path / "model" / "config.json").is_file()
