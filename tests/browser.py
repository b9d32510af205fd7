"""The page in Chromium: opened at a phone's or a desktop's size, and given pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from playwright.sync_api import Browser, Page, expect, sync_playwright

SIZES: dict[str, dict[str, Any]] = {
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"},
    "desktop": {"viewport": {"width": 1280, "height": 900}},
}


def launched() -> Iterator[Browser]:
    """Chromium without a window, until the iterator ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=machine.chromium())
        yield browser
        browser.close()


def opened(browser: Browser, url: str, size: str) -> Iterator[Page]:
    """The page, which must have violated no policy and thrown no error when the iterator ends."""
    context = browser.new_context(**SIZES[size])
    wrong: list[str] = []
    one = context.new_page()
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda message: wrong.append(message.text) if "Security" in message.text else None)
    one.goto(url)
    yield one
    context.close()
    assert wrong == []


def add(page: Page, *files: Path | str | dict[str, Any]) -> None:
    """Choose files, and wait until all of them are counted, or not."""
    choose(page, *files)
    settled(page)


def choose(page: Page, *files: Path | str | dict[str, Any]) -> None:
    page.get_by_label("Choose pictures").set_input_files(list(files))  # type: ignore[arg-type]


def settled(page: Page) -> None:
    expect(page.get_by_role("region", name="Pictures", exact=True)).not_to_contain_text("…", timeout=60_000)
    expect(page.locator("#busy")).to_be_hidden()
