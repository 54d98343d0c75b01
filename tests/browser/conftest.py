# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium (Debian's) and the binary whose pages it opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


@pytest.fixture(scope="session")
def tessera() -> Path:
    """The binary under test."""
    path = Path(os.environ.get("TESSERA_CLI", Path(__file__).resolve().parents[2] / "build/release/bin/tessera"))
    if not path.is_file():
        pytest.fail(f"{path} is not there: build it, or name it with TESSERA_CLI")
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all pages."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("chromium is not there: scripts/install-packages.sh browser")
    with sync_playwright() as playwright:
        # Without its sandbox, which containers do not allow; the pages are ours and have no network.
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not report an error nor ask for anything beyond its own file."""
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": 1300, "height": 1500})
    opened.on("pageerror", lambda error: faults.append(f"error: {error}"))
    opened.on("console", lambda message: faults.append(f"console: {message.text}") if message.type == "error" else None)
    opened.on("request", lambda request: faults.append(f"request: {request.url}")
              if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    yield opened
    opened.close()
    assert not faults, "\n".join(faults)
