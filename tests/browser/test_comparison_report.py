# SPDX-License-Identifier: Apache-2.0
"""The page of `tessera compare` in a browser: charts have their points, choices change them, the table sorts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Page

METHODS = ["streaming", "xattention:block=64", "oracle-topk:block_q=64,block_k=64", "pisa"]


@pytest.fixture(scope="module")
def report(tessera: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The JSON and the page of one run."""
    path = tmp_path_factory.mktemp("report") / "compare.html"
    command = [tessera, "compare", "--methods", ",".join(METHODS), "--lengths", "512,1024", "--data",
               "vertical-slash,blocks", "--heads", "2", "--kv-heads", "1", "--dim", "32", "--densities", "0.5,0.3",
               "--repeats", "1", "--html", path, "--json"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), path


def open_report(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")


def points(page: Page, chart: str) -> dict[str, list]:
    """Points of a chart by label."""
    return page.evaluate("id => Object.fromEntries(Chart.getChart(id).data.datasets.map(set => [set.label, set.data]))",
                         chart)  # fmt: skip


def test_charts_have_their_points(page: Page, report: tuple[dict, Path]) -> None:
    """Every measurement of the chosen case is a point where its rows say."""
    document, path = report
    open_report(page, path)
    assert page.locator("#data-choice").input_value() == "vertical-slash"
    assert page.locator("#length-choice").input_value() == "1024"
    drawn = points(page, "mass-density")
    for method in METHODS[:3]:
        rows = [row for row in document["rows"]
                if (row["data"], row["len"], row["method"]) == ("vertical-slash", 1024, method)]  # fmt: skip
        assert len(rows) >= 2
        expected = sorted((row["executed_density"], row["error"]["softmax_mass"]) for row in rows)
        for axis, values in zip("xy", zip(*expected, strict=True), strict=True):
            assert [point[axis] for point in drawn[method]] == pytest.approx(values), method
    front = [(point["x"], point["y"]) for point in points(page, "error-density")["Pareto front"]]
    assert front and front == sorted(front)
    assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)
    assert all(len(bars) >= 1 for bars in points(page, "ledger").values())
    # Something is painted, not only computed.
    for chart in ("error-density", "error-speed", "error-flops", "mass-density", "ledger", "length-error"):
        inked = page.evaluate(
            "id => { const c = document.getElementById(id); const d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }",
            chart,
        )
        assert inked > 500, chart


def test_choices_redraw(page: Page, report: tuple[dict, Path]) -> None:
    """Another kind of data or budget gives other points."""
    _, path = report
    open_report(page, path)
    before = points(page, "error-speed")
    page.select_option("#data-choice", "blocks")
    assert points(page, "error-speed") != before
    before = points(page, "length-error")
    page.select_option("#density-choice", "0.5")
    assert points(page, "length-error") != before


def test_table_sorts(page: Page, report: tuple[dict, Path]) -> None:
    """A click on a head sorts upwards, a second one downwards."""
    document, path = report
    open_report(page, path)
    assert page.locator("#rows tbody tr").count() == len(document["rows"])
    head = page.locator("#rows th", has_text="speed-up")
    column = page.evaluate("[...document.querySelectorAll('#rows th')].map(th => th.textContent).indexOf('speed-up')")
    for direction in ("ascending", "descending"):
        head.click()
        assert head.get_attribute("aria-sort") == direction
        values = [float(text) for text in page.locator(f"#rows tbody td:nth-child({column + 1})").all_text_contents()]
        assert values == sorted(values, reverse=direction == "descending")


def test_says_what_was_left_out_and_how_to_repeat(page: Page, report: tuple[dict, Path]) -> None:
    """PISA is bidirectional: the page says so; the command stands on it."""
    document, path = report
    open_report(page, path)
    assert {skip["method"] for skip in document["skipped"]} == {"pisa"}
    assert "pisa: causal is true" in page.locator("#skipped").inner_text()
    assert page.locator("#command").inner_text() == document["command"]
    assert document["command"].startswith("tessera compare --methods streaming,")
