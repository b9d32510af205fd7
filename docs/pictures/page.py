"""Takes the README's picture of the page: `make picture`, beside `make serve`.

Chromium counts the crowd of square.py on http://127.0.0.1:8080, or on the server in the first argument.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from browser import add, launched
from PIL import Image
from square import square

TARGET = Path(__file__).with_name("page.webp")


def main(url: str = "http://127.0.0.1:8080") -> None:
    crowd = io.BytesIO()
    square().save(crowd, "JPEG", quality=92)
    with contextlib.contextmanager(launched)() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
        page.goto(url)
        add(page, {"name": "square.jpg", "mimeType": "image/jpeg", "buffer": crowd.getvalue()})
        shot = page.screenshot()
    Image.open(io.BytesIO(shot)).save(TARGET, quality=80, method=6)


if __name__ == "__main__":
    main(*sys.argv[1:])
