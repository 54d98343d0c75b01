# SPDX-License-Identifier: Apache-2.0
"""Options of the integration tests: where the binary lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --tessera."""
    parser.addoption("--tessera", default=None, help="path of the tessera binary (default: $TESSERA_CLI, "
                                                     "build/release/bin/tessera)")


@pytest.fixture(scope="session")
def tessera(request: pytest.FixtureRequest) -> Path:
    """The binary under test."""
    given = request.config.getoption("--tessera") or os.environ.get("TESSERA_CLI")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "build" / "release" / "bin" / "tessera"
    if not path.is_file():
        pytest.fail(f"{path} is not there: build it, or name it with --tessera or TESSERA_CLI")
    return path
