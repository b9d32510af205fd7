"""The page at GET / as it is sent, without a browser: its policy, and the setting that switches it off."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import front_harness
import httpx
import pytest
from helpers import eventually

from serving.page import page as make_page


def sources(policy: str) -> dict[str, str]:
    """The sources of a Content-Security-Policy by directive."""
    return dict(one.strip().split(" ", 1) for one in policy.split(";"))


def test_nothing_but_its_own_script_and_style_runs_in_the_page() -> None:
    body, kind, headers = make_page(1000, "a <server>")
    text = body.decode()
    assert kind == "text/html; charset=utf-8"
    allowed = sources(headers["content-security-policy"])
    assert allowed["default-src"] == "'none'"
    assert allowed["connect-src"] == "'self'"
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed[f"{element}-src"] == f"'sha256-{digest}'"
        assert text.count(f"<{element}") == 1
    assert "They go to a &lt;server&gt; and" in text
    assert 'content="1000"' in text
    assert "{{" not in text
    # Addresses of other places: the name of an XML vocabulary is none.
    assert re.findall(r"https?://[^\"'` ]+", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize(("setting", "status"), [("on", 200), ("", 200), ("off", 404)])
def test_a_setting_switches_the_page(tmp_path: Path, setting: str, status: int) -> None:
    with front_harness.Launched(tmp_path, HEADCOUNT_PAGE=setting) as launched:
        assert eventually(lambda: re.search(r"http://127\.0\.0\.1:\d+", launched.log.read_text()))
        found = re.search(r"http://127\.0\.0\.1:\d+", launched.log.read_text())
        assert found
        assert eventually(lambda: listens(found[0]))
        assert httpx.get(found[0], trust_env=False).status_code == status


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/ping", trust_env=False)
    except httpx.TransportError:
        return False
    return True


def test_a_setting_that_is_neither_on_nor_off_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.launcher", "--archive", str(tmp_path)],
        env=os.environ | {"HEADCOUNT_PAGE": "no", "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "HEADCOUNT_PAGE is 'no'; it must be on or off" in done.stdout.splitlines()[-1]
