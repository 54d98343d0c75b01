"""Every example runs: scripts as a process of their own, the notebook cell by cell."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "python"
# The examples find the package that the tests found.
ENVIRONMENT = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_script(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(notebook, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, ENVIRONMENT[name] if name == "PYTHONPATH" else "module://matplotlib_inline.backend_inline")
    page = nbformat.read(notebook, as_version=4)
    NotebookClient(page, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    kinds = [kind for cell in page.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert kinds.count("text/html") >= 4 and "image/png" in kinds
    assert all(not cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)  # kept without outputs
