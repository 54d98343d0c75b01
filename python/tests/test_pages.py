"""The documentation: the site builds without a warning, and names in the tables of docs/python exist."""

import pathlib
import re
import shutil
import subprocess
import sys

import tessera

ROOT = pathlib.Path(__file__).parents[2]


def test_the_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "python" / "reference" / "index.html").read_text()
    for name in tessera.__all__:
        assert f'id="tessera.{name}"' in reference, name
    for name in ("Problem.allowed_pairs", "TokenGrid.extent", "Plan.explain"):
        assert f'id="tessera.{name}"' in reference, name


def test_methods_in_the_pages_exist():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "python").glob("*.md"))
    named = set(re.findall(r'attention\([^)\n]*, "([a-z0-9-]+)"', text)) | set(re.findall(r'method="([a-z0-9-]+)', text))
    assert named and named <= set(tessera.methods())


def test_the_package_is_typed():
    folder = pathlib.Path(tessera.__file__).parent
    assert (folder / "py.typed").exists() and "class Plan" in (folder / "_core.pyi").read_text()
    for name in tessera.__all__:
        thing = getattr(tessera, name)
        assert getattr(thing, "__doc__", None), name


def test_types_hold(tmp_path):
    folder = pathlib.Path(tessera.__file__).parent
    shutil.copytree(folder, tmp_path / "tessera", ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"))
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--ignore-missing-imports", "-p", "tessera"]
    done = subprocess.run(
        [*command, "--disable-error-code=misc", "--cache-dir", tmp_path / "cache"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
