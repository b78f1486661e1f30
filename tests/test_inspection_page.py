"""The page of an inspection: it renders, and asks nothing of anybody."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from inspected_models import SETTINGS, acting, inspected, page
from small_runs import SENTENCE, tiny_llama

from hf_focus import apply_focus
from hf_focus.inspection import inspect_model
from hf_focus.inspection_text import COLUMNS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Page(HTMLParser):
    """Checks that what is opened is closed, and collects attributes and text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def number_of_colors(image: Any) -> int:
    return len(image.convert("RGB").getcolors(2**24))


@pytest.fixture(scope="module")
def whole() -> str:
    return page(inspected(acting(tiny_llama()), SENTENCE, "x = f'{$y$}'\n\t# 漢字 \\alpha"), "a <model> & a text")


def test_the_page_stands_alone(whole: str) -> None:
    from PIL import Image

    text = re.sub(r"base64,[^\"]+", "", whole)
    assert not re.search(r"https?:|//|url\(|@import|<script", text)
    parsed = _Page(whole)
    assert "a <model> & a text" in "".join(parsed.words)
    sources = [value for tag, name, value in parsed.attributes if name in ("src", "href")]
    pictures = [value.removeprefix("data:image/png;base64,") for value in sources if value.startswith("data:image")]
    # The other one is the icon, which is empty
    assert len(pictures) == 5 == len(sources) - 1
    for picture in pictures:
        image = Image.open(BytesIO(base64.b64decode(picture, validate=True)))
        image.load()
        assert image.width > 1000
        assert number_of_colors(image) > 100, "not blank"
    assert len([1 for tag, name, value in parsed.attributes if (tag, name) == ("img", "alt") and value]) == 5
    for column in COLUMNS:
        assert column.name in parsed.words
        assert column.meaning in parsed.words


def test_the_page_says_when_focus_is_silent_or_not_measured(whole: str) -> None:
    untrained = page(inspect_model(apply_focus(tiny_llama(), SETTINGS)))
    assert "FocusA is silent" in untrained
    assert "FocusA is silent" not in whole
    assert "<img" not in untrained
    without = page(inspected(acting(tiny_llama(), refiner=False), map_tokens=5, num_maps=1))
    assert "The refiner</h2>" in whole
    assert "The refiner</h2>" not in without


def browse(html: str, folder: Path) -> tuple[Path, list[str]]:
    """Open a page in headless Chromium: its screenshot, and what came on the console."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars"
    done = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={folder / 'profile'}",
            f"--screenshot={folder / 'page.png'}",
            "--window-size=1200,4000",
            (folder / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder / "page.png", [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_the_page_renders_in_a_browser(whole: str, tmp_path: Path) -> None:
    from PIL import Image

    screenshot, console = browse(whole, tmp_path)
    assert console == []
    image = Image.open(screenshot)
    assert image.size == (1200, 4000)
    # Something is drawn all the way down, and it is no page of text alone
    bands = [image.crop((0, top, 1200, top + 500)) for top in range(0, 4000, 500)]
    assert all(number_of_colors(band) > 100 for band in bands)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_the_browser_would_tell_of_an_outside_request(tmp_path: Path) -> None:
    from hf_focus.inspection_page import TEMPLATE

    policy = re.search(r"<meta http-equiv=.*>", TEMPLATE).group()
    _, console = browse(f"<html><head>{policy}</head><img src='http://127.0.0.1:9/x.png'></html>", tmp_path)
    assert len(console) == 1
    assert "Content Security Policy" in console[0]
