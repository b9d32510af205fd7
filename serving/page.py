"""The page that counts in a browser, as the front and `headcount web` serve it."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent


class Page(NamedTuple):
    """headers: further ones, with names in lower case."""

    body: bytes
    content_type: str
    headers: dict[str, str]


def page(largest: int, where: str) -> Page:
    """The page. largest: bytes of a picture that can be sent as it is. where: who counts, in words."""
    text = (_HERE / "page.html").read_text()
    # Only the script and the style in the file may run, and they may talk only to the server that sent them.
    policy = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    filled = text.replace("{{LARGEST}}", str(largest)).replace("{{WHERE}}", html.escape(where))
    return Page(filled.encode(), "text/html; charset=utf-8", headers)


def _hash(text: str, element: str) -> str:
    """The source expression that allows the only such element of the page (CSP level 3, section 2.3.1)."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
