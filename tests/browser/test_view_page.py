# SPDX-License-Identifier: Apache-2.0
"""The page of `tessera view` in a browser: heads, cells, zoom, two methods side by side; colours for every eye."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Page

MODEL = Path(__file__).resolve().parents[2] / "models" / "tessera-bytes"
METHODS = ["window:left=255,right=0", "xattention:block=64"]
# A text in which every place says where it is.
TEXT = "".join(f"[{at:06d}]" for at in range(0, 2040, 8))


@pytest.fixture(scope="module")
def shown(tessera: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What the command says, and its page: 2,041 tokens in cells of 8."""
    folder = tmp_path_factory.mktemp("view")
    prompt = folder / "prompt.txt"
    prompt.write_text(TEXT)
    path = folder / "view.html"
    command = [tessera, "view", "--model", MODEL, "--prompt", prompt, "--methods", ",".join(METHODS), "--cells", "256",
               "--html", path, "--json"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), path


def open_view(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")


def settle(page: Page) -> None:
    """Waits for the next two frames."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pixel(page: Page, canvas: str, x: float, y: float) -> list[int]:
    """Colour at shares (x, y) of a canvas."""
    return page.evaluate(
        "([id, x, y]) => { const c = document.getElementById(id); return [...c.getContext('2d').getImageData("
        "Math.floor(x * c.width), Math.floor(y * c.height), 1, 1).data.slice(0, 3)]; }", [canvas, x, y])  # fmt: skip


def is_blue(colour: list[int]) -> bool:
    """Kept, whatever the attention under it."""
    return colour[2] > 1.5 * colour[0]


def is_grey(colour: list[int]) -> bool:
    """Skipped."""
    return max(colour) - min(colour) <= 2 and max(colour) < 250


def hover(page: Page, canvas: str, x: float, y: float) -> None:
    page.locator(f"#{canvas}").scroll_into_view_if_needed()
    box = page.locator(f"#{canvas}").bounding_box()
    assert box
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    settle(page)


def test_heads_are_there_and_can_be_chosen(page: Page, shown: tuple[dict, Path]) -> None:
    """A thumbnail per head; a click shows that head with its numbers."""
    summary, path = shown
    open_view(page, path)
    assert page.locator("#heads button").count() == 16
    assert page.locator("#attention-title").inner_text() == "layer 0, head 0"
    for index in (6, 13):
        before = page.evaluate("document.getElementById('attention').toDataURL()")
        page.locator(f"#heads button[data-index='{index}']").click()
        page.wait_for_function("title => document.getElementById('attention-title').textContent === title",
                               arg=f"layer {index // 4}, head {index % 4}")  # fmt: skip
        settle(page)
        assert page.evaluate("document.getElementById('attention').toDataURL()") != before
        for side, row in zip(("left", "right"), summary["heads"][2 * index : 2 * index + 2], strict=True):
            assert page.locator(f"#{side}-title").inner_text() == row["method"]
            numbers = page.locator(f"#{side}-numbers").inner_text()
            assert f"density {100 * row['density']:.1f} %" in numbers
            assert f"mass {row['mass']:.3f}" in numbers
        assert page.locator(f"#heads button[data-index='{index}']").get_attribute("aria-pressed") == "true"


def test_plans_are_drawn_where_they_are(page: Page, shown: tuple[dict, Path]) -> None:
    """The window is kept, the rest below it skipped, the future empty."""
    open_view(page, shown[1])
    assert is_blue(pixel(page, "left", 0.68, 0.72))
    assert is_grey(pixel(page, "left", 0.3, 0.72))
    for canvas in ("attention", "left", "right"):
        assert pixel(page, canvas, 0.8, 0.3) == [255, 255, 255]
    # Beside it the recovered mass: the first tiles lie inside the window and recover all of theirs.
    assert pixel(page, "left-mass", 0.93, 0.05) == [11, 83, 148]
    page.select_option("#shade-choice", "plan")
    settle(page)
    assert pixel(page, "left", 0.68, 0.72) == [86, 160, 225]
    assert pixel(page, "left", 0.3, 0.72) == [232, 232, 232]


def test_tokens_on_hover(page: Page, shown: tuple[dict, Path]) -> None:
    """The cell under the pointer: its tokens, its mass, what each method does; a click holds it."""
    open_view(page, shown[1])
    hover(page, "attention", 0.5, 0.75)
    queries = page.locator("#at-queries").inner_text()
    keys = page.locator("#at-keys").inner_text()
    for line, place in ((queries, 0.75), (keys, 0.5)):
        first = int(re.match(r"([\d,]+) to", line)[1].replace(",", ""))
        assert abs(first - place * 2041) <= 16, line
        # Token 0 begins the sequence; the bytes of the text follow.
        text = TEXT[first - 1 : first + 7]
        assert f"“{text}”" in line
    assert "of the mass of its queries" in page.locator("#at-attention").inner_text()
    assert page.locator("#at-left").inner_text().startswith("skipped; the query tile recovers 0.")
    hover(page, "right", 0.74, 0.75)
    assert page.locator("#at-left").inner_text().startswith("kept 100 %; ")
    box = page.locator("#right").bounding_box()
    page.mouse.click(box["x"] + 0.74 * box["width"], box["y"] + 0.75 * box["height"])
    held = page.locator("#at-keys").inner_text()
    hover(page, "right", 0.1, 0.9)
    assert page.locator("#at-keys").inner_text() == held
    hover(page, "left", 0.9, 0.1)
    page.keyboard.press("Escape")
    hover(page, "left", 0.9, 0.11)
    assert "not allowed" in page.locator("#at-attention").inner_text()


def test_zoom_goes_down_to_tiles(page: Page, shown: tuple[dict, Path]) -> None:
    """Wheel, buttons, drag, keys; all pictures move together; the coarse levels serve the overview."""
    open_view(page, shown[1])

    def span() -> list[int]:
        numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", page.locator("#range").inner_text())]
        return [numbers[1] - numbers[0] + 1, numbers[3] - numbers[2] + 1]

    assert span() == [2041, 2041]
    whole = [page.evaluate(f"document.getElementById('{id}').toDataURL()") for id in ("attention", "left", "right")]
    hover(page, "left", 0.4, 0.6)
    page.mouse.wheel(0, -480)
    settle(page)
    for length in span():
        assert abs(length - 2041 / 4) <= 3
    zoomed = [page.evaluate(f"document.getElementById('{id}').toDataURL()") for id in ("attention", "left", "right")]
    assert all(a != b for a, b in zip(whole, zoomed, strict=True))
    # What is under the pointer stays there.
    first_query = int(re.search(r"queries ([\d,]+)", page.locator("#range").inner_text())[1].replace(",", ""))
    assert abs(first_query - (0.6 * 2041 - 0.6 * 2041 / 4)) <= 16
    for _ in range(12):
        page.locator("#zoom-in").click()
    settle(page)
    for length in span():
        assert 60 <= length <= 90, "eight cells of eight tokens"
    assert page.locator("#left").get_attribute("data-level") == "0"
    before = page.locator("#range").inner_text()
    box = page.locator("#right").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 140, steps=4)
    page.mouse.up()
    settle(page)
    assert page.locator("#range").inner_text() != before
    page.mouse.move(5, 5)  # no cell is pointed at
    page.locator("#left").focus()
    page.keyboard.press("0")
    settle(page)
    assert span() == [2041, 2041]
    assert [page.evaluate(f"document.getElementById('{id}').toDataURL()") for id in ("attention", "right")] == whole[::2]


def test_methods_can_be_exchanged(page: Page, shown: tuple[dict, Path]) -> None:
    """The right method on the left gives the right picture."""
    open_view(page, shown[1])
    right = page.evaluate("document.getElementById('right').toDataURL()")
    assert page.evaluate("document.getElementById('left').toDataURL()") != right
    page.select_option("#left-choice", "1")
    settle(page)
    assert page.evaluate("document.getElementById('left').toDataURL()") == right
    assert page.locator("#left-title").inner_text() == METHODS[1]


def test_table_sorts_and_chooses(page: Page, shown: tuple[dict, Path]) -> None:
    """A row of the table leads to its head."""
    summary, path = shown
    open_view(page, path)
    assert page.locator("#rows tbody tr").count() == len(summary["heads"])
    page.locator("#rows th", has_text="mass").first.click()
    values = [float(text) for text in page.locator("#rows tbody td:nth-child(5)").all_text_contents()]
    assert values == sorted(values)
    layer, head = page.locator("#rows tbody tr").first.locator("td").all_text_contents()[:2]
    page.locator("#rows tbody tr").first.click()
    page.wait_for_function("title => document.getElementById('attention-title').textContent === title",
                           arg=f"layer {layer}, head {head}")  # fmt: skip


def test_pooled_and_corrected_cells(tessera: Path, tmp_path: Path, page: Page) -> None:
    """Methods that approximate what they leave out show it in two more colours; a screenshot is kept."""
    path = tmp_path / "qkv.safetensors"
    values = [((i * 2654435761) % 2001 - 1000) / 500 for i in range(256 * 16)]
    data = struct.pack(f"<{len(values)}f", *values)
    header = json.dumps({name: {"dtype": "F32", "shape": [1, 1, 256, 16],
                                "data_offsets": [i * len(data), (i + 1) * len(data)]}
                         for i, name in enumerate("qkv")}).encode()  # fmt: skip
    path.write_bytes(struct.pack("<Q", len(header)) + header + 3 * data)
    html = tmp_path / "view.html"
    subprocess.run([tessera, "view", "--qkv", path, "--methods", "psa:block_q=16,block_k=16,pisa:block=16,density=0.25",
                    "--html", html], check=True, capture_output=True)  # fmt: skip
    open_view(page, html)
    page.select_option("#shade-choice", "plan")
    settle(page)
    legend = page.locator("#classes").inner_text().split()
    assert legend == ["kept", "skipped", "pooled", "corrected"]

    def colours(canvas: str) -> set[tuple[int, ...]]:
        return {tuple(pixel(page, canvas, (x + 0.5) / 32, (y + 0.5) / 32)) for x in range(32) for y in range(32)}

    assert any(abs(r - 248) < 3 and abs(b - 62) < 3 for r, _, b in colours("left")), "pooled"
    assert any(abs(r - 170) < 3 and abs(g - 80) < 3 for r, g, _ in colours("right")), "corrected"
    assert not any(tuple(colour) == (232, 232, 232) for colour in colours("right")), "PISA skips nothing"
    screenshot = Path(os.environ.get("TESSERA_SCREENSHOTS", tmp_path)) / "view.png"
    page.screenshot(path=screenshot, full_page=True)
    assert screenshot.stat().st_size > 20_000


def test_colours_can_be_told_apart(page: Page, shown: tuple[dict, Path]) -> None:
    """Protanopia, deuteranopia and tritanopia (Machado, Oliveira and Fernandes 2009, severity 1) keep the classes apart."""
    open_view(page, shown[1])
    classes = dict(page.evaluate("classes"))
    simulations = {
        "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    }  # fmt: skip

    def linear(x: float) -> float:
        x /= 255
        return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4

    def lab(rgb: list[float]) -> list[float]:
        white = (0.95047, 1.0, 1.08883)
        to_xyz = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
        xyz = [sum(m * max(0.0, c) for m, c in zip(row, rgb, strict=True)) / w for row, w in zip(to_xyz, white, strict=True)]
        f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz]
        return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]

    for name, matrix in simulations.items():
        seen = {}
        for label, colour in classes.items():
            rgb = [linear(c) for c in colour]
            seen[label] = lab([sum(m * c for m, c in zip(row, rgb, strict=True)) for row in matrix])
        for a, b in itertools.combinations(seen, 2):
            distance = sum((x - y) ** 2 for x, y in zip(seen[a], seen[b], strict=True)) ** 0.5
            assert distance > 20, f"{a} and {b} look alike with {name}: {distance:.1f}"
