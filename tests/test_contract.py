"""The serving contract by itself: parameters, regions, and requests of every shape."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Polygon

from serving.contract import Limits, Parameters, Request, RequestError, parse_request, setting

LIMITS = Limits(instances=4, buckets=frozenset({"ours"}))
SQUARE = [[0, 0], [1, 0], [1, 1], [0, 1]]


def parse(content: object) -> Request:
    return parse_request(json.dumps(content).encode(), "application/json", "", "", LIMITS)


def b64(data: bytes) -> dict[str, Any]:
    return {"image": {"b64": base64.b64encode(data).decode()}}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("confidence", -1, "from 0.01 to 1"), ("confidence", 2, "from 0.01 to 1"),
        ("confidence", math.nan, "from 0.01 to 1"), ("confidence", "nan", "from 0.01 to 1"),
        ("confidence", "high", "'high'"), ("confidence", True, "True"), ("confidence", 10**400, "0.01 to 1"),
        ("confidence", None, "None"), ("iou", -0.1, "from 0 to 1"), ("iou", [0.5], "from 0 to 1"),
        ("max_people", -1, "from 0"), ("max_people", 1.5, "whole number"), ("annotate", "perhaps", "true or false"),
        ("annotate", 2, "true or false"), ("certainty", 1, "unknown parameter 'certainty'; there are confidence"),
        ("region", "[[0,0],[1", "as JSON"), ("region", [[0, 0], [1, 1]], "has 2 points"),
        ("region", [], "has 0 points"),
        ("region", {"x": 1}, "a list of at least three points"), ("region", [[0, 0, 0]] * 3, "at least three points"),
        ("region", [[0, 0], [1, 0], [1, 1.5]], "region's y"), ("region", [[0, 0], [math.inf, 0], [1, 1]], "region's x"),
        ("region", [[0, 0], [1, 1], [1, 0], [0, 1]], "crosses itself: side 1 meets side 3"),
        ("region", [[0, 0], [1, 0], [0.5, 0], [0.5, 1]], "crosses itself: side 1 meets side 2"),
        ("region", [[0.05, 0.9], [0.05, 0.5], [0.05, 0.7], [1, 0.7]], "crosses itself: side 1 meets side 2"),
        ("region", [[0.5, 0], [0.5, 1], [0, 0], [1, 0]], "crosses itself: side 1 meets side 3"),
        ("detail", "close", "detail is 'close'; it must be fast, full or auto"), ("detail", None, "fast, full or auto"),
        ("detail", ["full"], "fast, full or auto"), ("detail", "FULL", "fast, full or auto"),
        ("candidates", 0, "from 0.01 to 1"),
        ("grid", "4", "must be COLUMNSxROWS, each from 1 to 100, such as 4x3"), ("grid", "0x3", "each from 1 to 100"),
        ("grid", "4x101", "each from 1 to 100"), ("grid", "4x3x2", "COLUMNSxROWS"), ("grid", [4, 3], "COLUMNSxROWS"),
        ("grid", "4x-3", "COLUMNSxROWS"), ("grid", "٤x٣", "COLUMNSxROWS"), ("grid", "4x3\n", "COLUMNSxROWS"),
        ("region", [[0, 0], [0.5, 0.5], [1, 1]], "no area"), ("region", [[0.5, 0.5]] * 101, "at most 100"),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_named_with_what_would_do(name: str, value: object, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Parameters.parse({name: value})
    assert says in str(caught.value)
    assert caught.value.code == 400
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "meant"), [("true", True), ("TRUE", True), ("1", True), ("false", False), ("0", False)]
)
def test_a_truth_value_is_written_in_several_ways(text: str, meant: bool) -> None:
    assert Parameters.parse({"annotate": text}).annotate is meant


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"confidence": 0.5, "iou": 1, "max_people": 0},
        {"region": SQUARE, "annotate": True},
        {"detail": "full", "grid": "4x3", "candidates": 0.1},
        {"region": [[0, 0], [1, 0], [1, 1], [0.5, 0.5], [0, 1]]},
    ],
)
def test_a_query_string_says_what_json_says(given: dict[str, object]) -> None:
    parameters = Parameters.parse(given)
    assert Parameters.parse(parameters.as_query()) == parameters
    assert Parameters.parse(json.loads(json.dumps(parameters.as_json()))) == parameters
    defaults = Parameters()
    for name in Parameters.__dataclass_fields__:
        if name not in given:
            assert getattr(parameters, name) == getattr(defaults, name)


@st.composite
def stars(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Points round a centre in the order of their angle: a polygon that cannot cross itself."""
    count = draw(st.integers(3, 12))
    # Less than half a turn between neighbours, or the polygon would not go round its centre.
    steps = [draw(st.floats(0.7, 1.3)) for _ in range(count)]
    at, points = 0.0, []
    for step in steps:
        at += 2 * math.pi * step / sum(steps)
        radius = draw(st.floats(0.1, 0.5))
        points.append((0.5 + radius * math.cos(at), 0.5 + radius * math.sin(at)))
    return points


@given(stars(), st.booleans())
def test_a_region_that_does_not_cross_itself_is_accepted(points: list[tuple[float, float]], back: bool) -> None:
    points = points[::-1] if back else points
    assert Parameters.parse({"region": points}).region == tuple(points)


@given(stars().filter(lambda points: len(points) >= 4), st.data())
def test_a_region_that_crosses_itself_is_refused(points: list[tuple[float, float]], data: st.DataObject) -> None:
    # In a convex polygon the two sides beside an exchanged pair of neighbours always cross.
    convex = [(0.5 + 0.4 * math.cos(a), 0.5 + 0.4 * math.sin(a))
              for a in sorted(math.atan2(y - 0.5, x - 0.5) for x, y in points)]  # fmt: skip
    i = data.draw(st.integers(0, len(convex) - 2))
    convex[i], convex[i + 1] = convex[i + 1], convex[i]
    with pytest.raises(RequestError, match="crosses itself"):
        Parameters.parse({"region": convex})


GRID = st.tuples(*[st.integers(0, 8).map(lambda i: i / 8)] * 2)  # exact in binary, and often on one line


@settings(max_examples=500)
@given(st.lists(GRID, min_size=3, max_size=7))
def test_a_region_is_accepted_where_shapely_calls_it_valid(points: list[tuple[float, float]]) -> None:
    try:
        region = Parameters.parse({"region": points}).region
    except RequestError:
        region = None
    assert (region is not None) == Polygon(points).is_valid
    assert region is None or Polygon(region).equals(Polygon(points))


def test_a_region_may_be_closed_as_geojson_closes_it() -> None:
    assert Parameters.parse({"region": [*SQUARE, SQUARE[0]]}) == Parameters.parse({"region": SQUARE})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*Parameters.__dataclass_fields__, "x"]), ANYTHING, max_size=3))
def test_any_parameters_are_understood_or_refused(given: dict[str, Any]) -> None:
    try:
        parameters = Parameters.parse(given)
    except RequestError as error:
        json.dumps(error.as_json()).encode()
    else:
        assert 0.01 <= parameters.confidence <= 1


@given(
    st.binary(max_size=300)
    | st.builds(lambda v: json.dumps(v).encode(), st.fixed_dictionaries({"instances": ANYTHING}) | ANYTHING),
    st.sampled_from(["", "image/jpeg", "application/json", "multipart/form-data", "multipart/form-data; boundary=x"]),
    st.text(max_size=30),
)  # fmt: skip
def test_any_body_is_understood_or_refused(body: bytes, content_type: str, query: str) -> None:
    try:
        assert parse_request(body, content_type, query, "", LIMITS).instances
    except RequestError as error:
        json.dumps(error.as_json(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"[1]", "is a JSON list, not an object"), (b'"x"', "JSON string"), (b"null", "JSON null"),
        (b"{", "not valid JSON"), (b"[" * 100_000, "not valid JSON"), (b"\xff\xfe{", "not valid JSON"),
        (b"{}", "instances is missing"), (b'{"instances": []}', "instances is empty"),
        (b'{"instances": {}}', "instances is not a list"), (b'{"instances": [1], "x": 1}', "unknown field 'x'"),
        (b'{"instances": [1,1,1,1,1]}', "5 instances in one request; at most 4"),
        (b'{"instances": [1], "parameters": []}', "parameters is a JSON list"), (b"", "not valid JSON"),
    ],
)  # fmt: skip
def test_json_of_the_wrong_shape_is_told_the_right_one(body: bytes, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, "application/json", "", "", LIMITS)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (7, 'must be {"image"'), ({}, 'must be {"image"'), ({"image": {}}, 'must be {"image"'),
        ({"image": {"b64": "", "uri": ""}}, 'must be {"image"'), ({"b64": "AA==", "key": 1}, 'must be {"image"'),
        ({"image": {"b64": "AA="}}, "not base64"), ({"image": {"b64": "A A="}}, "not base64"),
        ({"image": {"b64": "ä==="}}, "not base64"), ({"image": {"b64": 5}}, "not base64"),
        ({"image": {"uri": "gs://theirs/a.jpg"}}, "bucket 'theirs'"), ({"image": {"uri": 5}}, "only gs://"),
        ({"image": {"uri": "gs://ours"}}, "only gs://"), ({"image": {"uri": "gs://ours/"}}, "only gs://"),
        ({"image": {"uri": "gs://ours/a\nb"}}, "only gs://"), ({"image": {"uri": "gs://ours/\ud800"}}, "only gs://"),
        ({"image": {"uri": "gs://ours@theirs/a"}}, "only gs://"), ({"image": {"uri": "gs://OURS/a"}}, "only gs://"),
        *(({"image": {"uri": uri}}, "only gs://") for uri in (
            "http://ours/a", "https://storage.googleapis.com/ours/a", "file:///etc/passwd", "/etc/passwd", "s3://ours/a",
        )),
    ],
)  # fmt: skip
def test_a_bad_instance_leaves_the_others_and_is_named(value: object, says: str) -> None:
    first, bad, last = parse({"instances": [b64(b"one"), value, b64(b"two")]}).instances
    assert (first.data, last.data) == (b"one", b"two")
    assert bad.error is not None
    assert str(bad.error).startswith("instances[1]")
    assert says in str(bad.error)
    json.dumps(bad.error.as_json(), ensure_ascii=False).encode()


def test_a_file_of_a_list_of_a_batch_prediction_job_is_a_picture() -> None:
    found = parse({"instances": [{"b64": "b25l"}, {"b64": "!"}], "parameters": {"inline_errors": True}})
    assert found.instances[0].data == b"one"
    assert str(found.instances[1].error).startswith("instances[1].b64 is not base64")
    assert found.parameters.inline_errors


def test_json_is_recognised_without_its_header() -> None:
    body = json.dumps({"instances": [b64(b"one")], "parameters": {"confidence": 0.5}}).encode()
    for content_type in ("application/json; charset=utf-8", "", "application/x-www-form-urlencoded"):
        request = parse_request(b" \n" + body, content_type, "iou=0.3", "", LIMITS)
        assert request.instances[0].data == b"one"
        assert request.parameters == Parameters(confidence=0.5, iou=0.3)
        assert not request.single
    assert parse_request(body, "image/png", "", "", LIMITS).instances[0].data == body


def multipart(*parts: str) -> bytes:
    return "".join(f"--x\r\nContent-Disposition: form-data; {part}\r\n" for part in parts).encode() + b"--x--\r\n"


def test_a_form_carries_one_file_and_parameters() -> None:
    kind = 'multipart/form-data; boundary="x"'
    file = 'name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\npicture'
    field = 'name="confidence"\r\n\r\n0.5'
    request = parse_request(multipart(file, field), kind, "", "image/jpeg", LIMITS)
    assert request.instances[0].data == b"picture"
    assert request.parameters.confidence == 0.5
    assert request.single
    assert request.picture_wanted
    for parts in ((field,), (file, file)):
        with pytest.raises(RequestError, match="send exactly one"):
            parse_request(multipart(*parts), kind, "", "", LIMITS)
    for body, bad in ((multipart(file), "multipart/form-data"), (b"no form at all", kind)):
        with pytest.raises(RequestError, match="multipart body"):
            parse_request(body, bad, "", "", LIMITS)


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "²"])
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HEADCOUNT_MAX_PIXELS", text)
    with pytest.raises(ValueError, match=r"HEADCOUNT_MAX_PIXELS is .*whole number of at least 1"):
        setting("HEADCOUNT_MAX_PIXELS", 5)


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCOUNT_MAX_INSTANCES", "3")
    monkeypatch.setenv("HEADCOUNT_MAX_LOOKS", "7")
    monkeypatch.setenv("HEADCOUNT_LOOK_SECONDS", "9")
    monkeypatch.setenv("HEADCOUNT_BUCKETS", "one, gs://two/,")
    assert Limits.from_environment() == Limits(instances=3, looks=7, look_seconds=9, buckets=frozenset({"one", "two"}))
