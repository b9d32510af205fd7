"""The page at GET / in a real browser: all that it promises."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import SIZES, add, choose, opened, settled
from conftest import Server
from helpers import PEOPLE, encode
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

BUS = "bus.jpg"
NOBODY = encode(Image.new("RGB", (64, 48), "grey"))

# In a browser


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Page]:
    yield from opened(chromium, server.url, "desktop")


@pytest.fixture(params=SIZES)
def sized(chromium: Browser, server: Server, request: pytest.FixtureRequest) -> Iterator[Page]:
    yield from opened(chromium, server.url, request.param)


def file(content: bytes, name: str, kind: str = "image/png") -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": content}


def count(page: Page) -> str:
    return page.locator("#count").inner_text()


def boxes(page: Page) -> list[list[float]]:
    """Left, top, right and bottom of the boxes that are drawn, in the picture's pixels."""
    names = ("x", "y", "width", "height")
    found = []
    for one in page.locator("rect.box").all():
        left, top, width, height = (float(one.get_attribute(name) or "nan") for name in names)
        found.append([left, top, left + width, top + height])
    return found


def asked(server: Server, picture: bytes, **parameters: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(server.predict, content=picture, params=parameters, timeout=60).json()
    return answer


def slide(page: Page, confidence: float) -> None:
    page.get_by_label("Confidence at least").fill(str(confidence))


def drag(page: Page, start: tuple[float, float], *to: tuple[float, float]) -> None:
    """Press the mouse, move it and release it. Places: fractions of the picture."""
    surface = page.locator("#boxes")
    surface.scroll_into_view_if_needed()
    box = surface.bounding_box()
    assert box
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, *to)]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


@pytest.mark.slow
def test_a_picture_goes_in_and_the_number_and_the_boxes_come_out(sized: Page, server: Server, data: Path) -> None:
    add(sized, data / "people" / BUS)
    expected = asked(server, (data / "people" / BUS).read_bytes())
    assert count(sized) == str(expected["count"]) == str(PEOPLE[BUS])
    assert sorted(boxes(sized)) == [pytest.approx(person["box"]) for person in sorted(expected["people"], key=box_of)]
    # They lie over the picture, whatever its size on the screen.
    image, drawing = (
        sized.get_by_role("img", name="people were counted").bounding_box(),
        sized.locator("#boxes").bounding_box(),
    )
    assert image == pytest.approx(drawing, abs=1)
    assert sized.locator("#boxes").get_attribute("viewBox") == "0 0 810 1080"
    assert sized.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "it fits the screen's width"
    assert sized.get_by_text("Take a photo").is_visible() == (sized.viewport_size == SIZES["phone"]["viewport"])


def box_of(person: dict[str, Any]) -> Any:
    return person["box"]


@pytest.mark.slow
def test_the_slider_counts_anew_without_asking_the_server(page: Page, server: Server, data: Path) -> None:
    picture = (data / "people" / BUS).read_bytes()
    add(page, data / "people" / BUS)
    page.get_by_label("Detail").select_option("fast")
    settled(page)
    page.route("**/predictions/**", lambda route: route.abort())
    counts = []
    for confidence in (0.05, 0.2, 0.25, 0.6, 0.9):
        slide(page, confidence)
        expected = asked(server, picture, confidence=confidence, detail="fast")["count"]
        assert (count(page), len(boxes(page))) == (str(expected), expected)
        counts.append(expected)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[4]


@pytest.mark.slow
def test_a_region_is_drawn_and_holds_for_all_pictures(sized: Page, server: Server, data: Path) -> None:
    add(sized, data / "people" / BUS, data / "people" / "zidane.jpg")
    sized.get_by_role("button", name="Draw").click()
    drag(sized, (0, 0.5), (0.2, 0.8), (0.6, 1))
    region = json.dumps([[0, 0.5], [0.6, 0.5], [0.6, 1], [0, 1]])
    expected = [asked(server, (data / "people" / name).read_bytes(), region=region)["count"] for name in PEOPLE]
    assert [count(sized), sized.locator("#total").inner_text()] == [str(expected[0]), str(sum(expected))]
    assert 0 < expected[0] < PEOPLE[BUS]
    assert sized.get_by_label("Or its corners").input_value() == "0,0.5 0.6,0.5 0.6,1 0,1"
    sized.get_by_role("button", name="Clear").click()
    assert count(sized) == str(PEOPLE[BUS])


@pytest.mark.slow
def test_corners_are_set_one_by_one(page: Page, data: Path) -> None:
    add(page, data / "people" / BUS)
    page.get_by_role("button", name="Draw").click()
    for place in ((0.01, 0.5), (0.6, 0.5), (0.6, 0.98)):
        drag(page, place)
    assert int(count(page)) < PEOPLE[BUS]
    drag(page, (0.3, 0.1))  # so that the last side crosses the first one
    expect(page.get_by_role("alert")).to_have_text("The region's sides cross; draw it anew.")
    page.get_by_role("button", name="Undo corner").click()
    drag(page, (0.01, 0.98))
    page.get_by_role("button", name="Done").click()
    corners = [[float(part) for part in corner.split(",")]
               for corner in page.get_by_label("Or its corners").input_value().split()]  # fmt: skip
    assert corners == [
        pytest.approx(place, abs=0.005) for place in ((0.01, 0.5), (0.6, 0.5), (0.6, 0.98), (0.01, 0.98))
    ]
    assert count(page) == "3"


@pytest.mark.slow
def test_a_region_is_written_with_the_keyboard(page: Page, data: Path) -> None:
    add(page, data / "people" / BUS)
    corners = page.get_by_label("Or its corners")
    for text, problem in (
        ("0,0 1,1", "at least three corners"), ("0,0 1,1 1,0 0,1", "sides cross"), ("0,0 2,0 1,1", "fractions from 0"),
        ("0,0 0.5,0.5 1,1", "no area"), ("here", "Write the region as x,y x,y x,y"),
    ):  # fmt: skip
        corners.fill(text)
        corners.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(problem)
        assert count(page) == str(PEOPLE[BUS]), "the count is without it"
    corners.fill("0,0.5 0.6,0.5 0.6,1 0,1")
    corners.press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert count(page) == "3"


@pytest.mark.slow
@pytest.mark.needs("curl")
def test_the_curl_line_counts_what_the_page_shows(page: Page, data: Path, tmp_path: Path) -> None:
    name = "bus $(touch x) 'of' Madrid.jpg"
    (tmp_path / name).write_bytes((data / "people" / BUS).read_bytes())
    add(page, tmp_path / name)
    page.get_by_label("Detail").select_option("fast")
    settled(page)
    slide(page, 0.6)
    page.get_by_label("Or its corners").fill("0,0.5 0.6,0.5 0.6,1 0,1")
    page.get_by_label("Or its corners").press("Enter")
    line = page.locator("code").inner_text()
    run = subprocess.run(["sh", "-c", f"{line} -s"], cwd=tmp_path, capture_output=True, check=True)
    assert str(json.loads(run.stdout)["count"]) == count(page) == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert shlex.split(copied) == shlex.split(line)


@pytest.mark.slow
def test_several_pictures_make_a_table_and_files(page: Page, data: Path) -> None:
    pictures = [file((data / "people" / name).read_bytes(), name, "image/jpeg") for name in PEOPLE]
    add(page, *pictures, file(b"no picture", 'a "b", c.txt', "text/plain"))
    rows = page.get_by_role("region", name="Pictures", exact=True).locator("tbody tr")
    assert [row.locator("td").nth(2).inner_text() for row in rows.all()] == [*map(str, PEOPLE.values()), "–"]
    expect(rows.nth(2)).to_contain_text("this is not a picture that can be read; send the bytes of a JPEG")
    expect(page.locator("tfoot")).to_contain_text("3 pictures, 1 not counted")
    assert page.locator("#total").inner_text() == str(sum(PEOPLE.values()))
    for canvas in rows.locator("canvas").all()[:2]:
        assert canvas.evaluate("(canvas) => canvas.width") > 0, "there is a thumbnail"
    page.get_by_role("button", name="zidane.jpg", exact=True).click()
    assert [row.get_attribute("aria-current") for row in rows.all()] == ["false", "true", "false"]
    assert count(page) == str(PEOPLE["zidane.jpg"])
    slide(page, 0.5)
    shown = int(count(page))
    table = list(csv.DictReader(io.StringIO(downloaded(page, "Download CSV"))))
    assert [row["file"] for row in table] == [*PEOPLE, 'a "b", c.txt']
    assert (table[1]["count"], table[1]["width"], table[1]["looks"]) == (str(shown), "1280", "1")
    assert table[2]["error"].startswith("this is not a picture")
    content = json.loads(downloaded(page, "Download JSON"))
    assert content["parameters"] == {"confidence": 0.5, "detail": "auto"}
    assert content["total"]["pictures"] == 3
    assert content["total"]["failed"] == 1
    assert content["pictures"][1]["count"] == len(content["pictures"][1]["people"]) == shown
    page.get_by_role("button", name="Remove all").click()
    expect(page.get_by_role("region", name="Result")).to_be_hidden()


def downloaded(page: Page, button: str) -> str:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button).click()
    return Path(waiting.value.path()).read_text()


@pytest.mark.slow
def test_errors_are_told_in_words(page: Page) -> None:
    add(page, file(b"no picture", "a.png"))
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"^a.png: this is not a picture that can be read"))
    assert count(page) == "–"
    page.get_by_role("button", name="Remove all").click()
    answers: list[tuple[Callable[[Route], None], str]] = [
        (
            lambda route: route.fulfill(status=502, body="<html>"),
            "The server answered HTTP 502, and not as Headcount does.",
        ),
        (
            lambda route: route.fulfill(status=200, body="[]"),
            "The server answered HTTP 200, and not as Headcount does.",
        ),
        (lambda route: route.abort(), "The server cannot be reached; is it running?"),
    ]
    for answer, said in answers:
        page.route("**/predictions/**", answer)
        add(page, file(NOBODY, "b.png"))
        expect(page.get_by_role("alert")).to_have_text(f"b.png: {said}")
        page.unroute("**/predictions/**")
        page.get_by_role("button", name="Remove all").click()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_pictures_are_chosen_with_the_keyboard(page: Page, key: str) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose pictures")).to_be_focused()
    page.on("filechooser", lambda _: None)
    page.evaluate("0")  # Chromium shows the dialog to the test only once it knows of it, and Enter acts at once
    with page.expect_file_chooser() as waiting:
        page.keyboard.press(key)
    waiting.value.set_files([file(NOBODY, "a.png")])  # type: ignore[arg-type]
    settled(page)
    assert count(page) == "0"


@pytest.mark.slow
def test_a_file_without_a_byte_is_not_sent(page: Page) -> None:
    add(page, file(b"", "a.png"))
    expect(page.get_by_role("alert")).to_have_text("a.png: The file is empty.")


@pytest.mark.slow
def test_what_failed_is_tried_again(page: Page, data: Path) -> None:
    add(page, file(NOBODY, "a.png"))
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    page.route("**/predictions/**", lambda route: route.abort())
    add(page, data / "people" / BUS)
    page.unroute("**/predictions/**")
    page.get_by_role("button", name="Try again").click()
    settled(page)
    assert (count(page), page.locator("#total").inner_text()) == (str(PEOPLE[BUS]), str(PEOPLE[BUS]))
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()


@pytest.mark.slow
def test_removed_pictures_hold_up_no_others(page: Page) -> None:
    """Those that the server still counts, too."""
    waiting: list[Route] = []
    page.route("**/predictions/**", lambda route: waiting.append(route))
    choose(page, *(file(NOBODY, name) for name in ("a.png", "b.png", "c.png")))
    expect(page.locator("#doing")).to_contain_text("3 pictures")
    with page.expect_event("requestfailed"):
        page.get_by_role("button", name="Remove a.png").click()
    expect(page.get_by_role("button", name="b.png", exact=True)).to_be_focused()
    page.get_by_role("button", name="Remove all").click()
    expect(page.get_by_label("Choose pictures")).to_be_focused()
    page.unroute("**/predictions/**")
    add(page, file(NOBODY, "d.png"))
    assert count(page) == "0"
    expect(page.locator("tbody tr")).to_have_count(1)


@pytest.mark.slow
def test_the_picture_that_is_added_or_chosen_is_in_sight(sized: Page, data: Path) -> None:
    add(sized, data / "people" / BUS)
    add(sized, *(file(b"no picture", f"{i}.txt") for i in range(5)))
    add(sized, data / "people" / "zidane.jpg")
    assert count(sized) == str(PEOPLE["zidane.jpg"])
    sized.get_by_role("button", name=BUS, exact=True).click()
    assert count(sized) == str(PEOPLE[BUS])
    expect(sized.locator("#count")).to_be_in_viewport()
    sized.get_by_role("button", name="4.txt", exact=True).click()
    expect(sized.get_by_role("alert")).to_be_in_viewport()


@pytest.mark.slow
def test_a_busy_server_is_asked_again(page: Page) -> None:
    left = [{"status": 503, "headers": {"Retry-After": "1"}, "body": "{}"}]
    page.route("**/predictions/**", lambda route: route.fulfill(**left.pop()) if left else route.continue_())
    add(page, file(NOBODY, "a.png"))
    assert (count(page), left) == ("0", [])


@pytest.mark.slow
def test_a_file_s_name_is_never_markup(page: Page) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    add(page, file(NOBODY, name))
    expect(page.get_by_role("button", name=name, exact=True)).to_be_visible()
    assert page.locator("img").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page: Page, data: Path, event: str) -> None:
    content = base64.b64encode((data / "people" / BUS).read_bytes()).decode()
    page.evaluate(
        """([event, content]) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0)), given = new DataTransfer();
          given.items.add(new File([bytes], "given.jpg", {type: "image/jpeg"}));
          document.body.dispatchEvent(event === "drop"
            ? new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: given, bubbles: true, cancelable: true}));
        }""",
        [event, content],
    )
    expect(page.get_by_role("button", name="given.jpg", exact=True)).to_be_visible()
    settled(page)
    assert count(page) == str(PEOPLE[BUS])


@pytest.mark.slow
def test_another_detail_asks_again(page: Page, server: Server, bus: bytes) -> None:
    few = Image.open(io.BytesIO(bus)).resize((162, 216), Image.Resampling.BOX)
    crowd = Image.new("RGB", (1296, 864))
    for x in range(0, 1296, 162):
        for y in range(0, 864, 216):
            crowd.paste(few, (x, y))
    picture = encode(crowd)
    add(page, file(picture, "crowd.png"))
    counts = {}
    for detail in ("fast", "full", "auto"):
        page.get_by_label("Detail").select_option(detail)
        settled(page)
        expected = asked(server, picture, detail=detail)
        assert count(page) == str(expected["count"])
        looks = expected["looks"]
        expect(page.get_by_role("region", name="Result")).to_contain_text(f"{looks} look{'s' if looks > 1 else ''}")
        counts[detail] = expected["count"]
    assert counts["full"] > counts["fast"]


@pytest.mark.slow
def test_a_picture_that_is_too_large_to_send_is_made_smaller(page: Page, server: Server, data: Path) -> None:
    """As behind an endpoint, which takes a picture of 1 MB."""
    most = 60_000
    html = httpx.get(server.url)
    body = html.text.replace('content="32000000"', f'content="{most}"')
    page.route(f"{server.url}/", lambda route: route.fulfill(body=body, headers=dict(html.headers)))
    page.reload()
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_buffer) if request.method == "POST" else None)
    add(page, data / "people" / BUS)
    assert abs(int(count(page)) - PEOPLE[BUS]) <= 1
    (small,) = sent
    assert small is not None
    assert len(small) <= most < (data / "people" / BUS).stat().st_size
    width, height = Image.open(io.BytesIO(small)).size
    expect(page.get_by_text(f"made smaller before it was sent, {width}×{height} of 810×1080")).to_be_visible()
    box = page.locator("#boxes").bounding_box()
    assert box
    assert box["width"] / box["height"] == pytest.approx(810 / 1080, abs=0.01)
    add(page, file(os.urandom(most + 1), "raw.png"))
    expect(page.get_by_role("alert")).to_contain_text(
        "0.1 MB, 0.0600 MB can be sent, and this browser cannot make it smaller"
    )


@pytest.mark.slow
def test_the_browser_keeps_to_the_policy(chromium: Browser, server: Server) -> None:
    """No other place can be asked, and no markup becomes code, if there ever was a way to bring it in."""
    with chromium.new_context() as context:
        page = context.new_page()
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text))
        page.goto(server.url)
        other = server.url.replace("127.0.0.1", "localhost")
        assert page.evaluate("(url) => fetch(url).then(() => 'fetched', () => 'refused')", other) == "refused"
        page.evaluate(
            """() => {
              document.body.innerHTML = '<img src=x onerror="window.ran = 1"><style>* {}</style>';
              const code = document.createElement("script");
              code.text = "window.ran = 1";
              document.body.append(code);
            }"""
        )
        assert page.evaluate("() => window.ran") is None
        assert [kind for kind in ("connect-src", "img-src", "style-src", "script-src") if kind in str(refused)] == [
            "connect-src", "img-src", "style-src", "script-src",
        ]  # fmt: skip
