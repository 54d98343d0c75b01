# SPDX-License-Identifier: Apache-2.0
"""The page of `tessera eval` in a browser: curves with intervals, fronts, tables that sort."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Page

MODEL = Path(__file__).resolve().parents[2] / "models" / "tessera-bytes"
METHODS = ["dense", "streaming:n_init=4,n_local=100", "window:left=40,right=0"]
TASKS = ["passkey", "copy", "perplexity"]
LENGTHS = [512, 1024]


@pytest.fixture(scope="module")
def report(tessera: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The JSON and the page of one run."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "text.txt"
    text.write_text("The licence applies to the work, and to its parts </script> alike. " * 100)
    path = folder / "eval.html"
    command = [tessera, "eval", "--model", MODEL, "--tasks", ",".join(TASKS), "--lengths", ",".join(map(str, LENGTHS)),
               "--methods", ",".join(METHODS), "--samples", "3", "--text", text, "--html", path, "--json"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), path


def open_report(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")


def points(page: Page, chart: str) -> dict[str, list]:
    """Points of a chart by label."""
    return page.evaluate("id => Object.fromEntries(Chart.getChart(id).data.datasets.map(set => [set.label, set.data]))",
                         chart)  # fmt: skip


def test_curves_have_their_points_and_intervals(page: Page, report: tuple[dict, Path]) -> None:
    """A curve per task and method; a whisker reaches from the lower to the upper end at the length of its point."""
    document, path = report
    open_report(page, path)
    assert page.locator("#length-charts figcaption").all_text_contents() == TASKS
    for i, task in enumerate(TASKS):
        drawn = points(page, f"length-{i}")
        for method in METHODS:
            rows = [row for row in document["results"] if (row["task"], row["method"]) == (task, method)]
            assert [row["len"] for row in rows] == LENGTHS
            assert [point["y"] for point in drawn[method]] == pytest.approx([row["score"]["mean"] for row in rows])
            for point, length in zip(drawn[method], LENGTHS, strict=True):
                assert point["x"] == pytest.approx(length, rel=0.1)
            whiskers = drawn[f"{method}: interval"]
            expected = [end for row in rows for end in (row["score"]["low"], row["score"]["high"])]
            ends = [point for k, point in enumerate(whiskers) if k % 3 < 2]
            assert [point["y"] for point in ends] == pytest.approx(expected)
            assert [point["x"] for point in ends] == pytest.approx([p["x"] for p in drawn[method] for _ in "lh"])
        inked = page.evaluate(
            "id => { const c = document.getElementById(id); const d = c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }",
            f"length-{i}",
        )
        assert inked > 500, task


def test_fronts_follow_the_choices(page: Page, report: tuple[dict, Path]) -> None:
    """One point per method; the front is what no other method beats; perplexity is better when lower."""
    document, path = report
    open_report(page, path)

    def rows_of(task: str, length: int) -> list[dict]:
        return [row for row in document["results"] if (row["task"], row["len"]) == (task, length)]

    drawn = points(page, "score-density")
    for method in METHODS:
        scores = [row["score"]["mean"] for task in TASKS[:2] for row in rows_of(task, 1024) if row["method"] == method]
        assert drawn[method][0]["y"] == pytest.approx(sum(scores) / 2)
    page.select_option("#task-choice", "perplexity")
    page.select_option("#length-choice", "512")
    for chart, cost in (("score-density", lambda row: row["density"]),
                        ("score-time", lambda row: row["prefill_ms"] + row["decode_ms"]),
                        ("score-cache", lambda row: row["cache_mb"])):  # fmt: skip
        drawn = points(page, chart)
        rows = rows_of("perplexity", 512)
        for row in rows:
            assert drawn[row["method"]] == [{"x": pytest.approx(cost(row)), "y": pytest.approx(row["score"]["mean"]),
                                             "method": row["method"]}]  # fmt: skip
        front = [(point["x"], point["y"]) for point in drawn["Pareto front"]]
        best = min(rows, key=lambda row: (row["score"]["mean"], cost(row)))
        assert front == sorted(front)
        assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)
        assert front[-1] == pytest.approx((cost(best), best["score"]["mean"]))


def test_decoding_has_its_own_density(page: Page, tessera: Path, tmp_path: Path) -> None:
    """Where only decoding is sparse, the front is drawn over what decoding read."""
    path = tmp_path / "decode.html"
    command = [tessera, "eval", "--model", MODEL, "--tasks", "mqar", "--lengths", "512", "--methods", ",".join(METHODS[:2]),
               "--samples", "1", "--phase", "decode", "--html", path, "--json"]  # fmt: skip
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["results"]
    open_report(page, path)
    drawn = points(page, "score-density")
    for method, row in zip(METHODS[:2], rows, strict=True):
        assert drawn[method][0]["x"] == pytest.approx(row["decode_density"])
    assert rows[1]["decode_density"] < 0.5 < rows[0]["decode_density"]


def test_tables_sort(page: Page, report: tuple[dict, Path]) -> None:
    """A click on a head sorts upwards, a second one downwards; dense attention loses nothing against itself."""
    document, path = report
    open_report(page, path)
    assert page.locator("#rows tbody tr").count() == len(document["results"])
    head = page.locator('#rows th:text-is("density")')
    column = page.evaluate("[...document.querySelectorAll('#rows th')].map(th => th.textContent).indexOf('density')")
    for direction in ("ascending", "descending"):
        head.click()
        assert head.get_attribute("aria-sort") == direction
        values = [float(text) for text in page.locator(f"#rows tbody td:nth-child({column + 1})").all_text_contents()]
        assert values == sorted(values, reverse=direction == "descending")
    verdicts = [line.locator("td").all_text_contents() for line in page.locator("#verdict tbody tr").all()]
    assert [line[0] for line in verdicts] == METHODS
    assert verdicts[0][3:5] == ["0", "0"]
    window = [row for row in document["results"] if row["method"] == METHODS[2] and row["task"] != "perplexity"]
    assert float(verdicts[2][4]) == pytest.approx(min(row["difference"]["mean"] for row in window), abs=0.01)


def test_says_how_to_repeat(page: Page, report: tuple[dict, Path]) -> None:
    """The command stands on the page."""
    document, path = report
    open_report(page, path)
    assert page.locator("#command").inner_text() == document["command"]
    assert document["command"].startswith("tessera eval --model ")
    assert page.locator("#partial").is_hidden()
