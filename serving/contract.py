"""The serving contract: what a request may say, and what answers look like. No torch, no server.

REST: raw picture bytes, multipart, or `{"instances": […], "parameters": {…}}` as Vertex AI sends it
(https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import python_multipart

Point = tuple[float, float]

# Google's names for HTTP statuses: https://cloud.google.com/apis/design/errors
STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    411: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    431: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
PREDICT_ROUTE = "/predictions/people"
COUNT_HEADER = "X-Headcount-Count"
MAX_REGION_POINTS = 100
MAX_GRID = 100  # columns, and rows
# One look at the whole picture; closer looks at all of it, at its own resolution; closer looks where the first lets
# expect people whom it missed.
DETAILS = ("fast", "full", "auto")


class RequestError(Exception):
    """A request that is refused: an HTTP status and a sentence that says how to repair it."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code

    def as_json(self) -> dict[str, Any]:
        return error_json(self.code, str(self))


def error_json(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "status": STATUS.get(code, "UNKNOWN"), "message": message}}


def setting(name: str, default: int, least: int = 1) -> int:
    """A whole number from the environment. Raises ValueError naming the variable."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"{name} is {text!r}; set it to a whole number of at least {least}, e.g. {default}")
    return int(text)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; each has an environment variable of its own.

    instances: pictures a request. request_bytes: size of a body, and of a picture read from a bucket.
    max_pixels: width × height of a picture. looks, look_seconds: closer looks at all pictures of a request together,
    and the time that they may take. buckets: the Cloud Storage buckets that may be read.
    """

    instances: int = 128
    request_bytes: int = 32_000_000
    max_pixels: int = 50_000_000
    looks: int = 256
    look_seconds: int = 45  # shared endpoints of Vertex AI wait 60 s for an answer
    buckets: frozenset[str] = frozenset()

    @classmethod
    def from_environment(cls) -> Limits:
        """HEADCOUNT_MAX_INSTANCES, _MAX_REQUEST_BYTES, _MAX_PIXELS, _MAX_LOOKS, _LOOK_SECONDS, _BUCKETS (a,b)."""
        buckets = os.environ.get("HEADCOUNT_BUCKETS", "")
        return cls(
            instances=setting("HEADCOUNT_MAX_INSTANCES", cls.instances),
            request_bytes=setting("HEADCOUNT_MAX_REQUEST_BYTES", cls.request_bytes),
            max_pixels=setting("HEADCOUNT_MAX_PIXELS", cls.max_pixels),
            looks=setting("HEADCOUNT_MAX_LOOKS", cls.looks),
            look_seconds=setting("HEADCOUNT_LOOK_SECONDS", cls.look_seconds),
            buckets=frozenset(b.strip().removeprefix("gs://").strip("/") for b in buckets.split(",") if b.strip()),
        )


@dataclass(frozen=True)
class Parameters:
    """How to count.

    confidence: least confidence of a person, 0.01…1. iou: overlap above which two boxes are one person, 0…1.
    max_people: longest list of boxes, the count is never capped. region: polygon of at least three (x, y)
    in fractions of width and height; those count whose foot point (middle of the lower edge) lies inside.
    annotate: also answer with the picture, boxes drawn. detail: how closely the picture is looked at, see DETAILS.
    grid: columns and rows of a grid over the picture; the answer has the number of people in each cell, by their foot
    points, as for a region. candidates: also answer with those who have at least this confidence, 0.01…1, and less than
    `confidence`; they do not count. inline_errors: a request whose instances are all bad is answered with an error in
    place of each, as one with some good ones is, and not refused: a batch prediction job asks a refused request again,
    and loses the reasons.
    """

    confidence: float = 0.25
    iou: float = 0.45
    max_people: int | None = None
    region: tuple[Point, ...] | None = None
    annotate: bool = False
    detail: str = "auto"
    grid: tuple[int, int] | None = None
    candidates: float | None = None
    inline_errors: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Parameters:
        """From JSON values or from the texts of a query string. Raises RequestError naming the parameter."""
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            raise RequestError(f"unknown parameter {unknown[0]!r}; there are {', '.join(cls.__dataclass_fields__)}")
        values: dict[str, Any] = {}
        if "confidence" in given:
            values["confidence"] = _number("confidence", given["confidence"], 0.01, 1)
        if "iou" in given:
            values["iou"] = _number("iou", given["iou"], 0, 1)
        if given.get("max_people") is not None:
            number = _number("max_people", given["max_people"], 0, 1_000_000)
            if number != int(number):
                raise RequestError(f"max_people is {given['max_people']!r}; it must be a whole number")
            values["max_people"] = int(number)
        if given.get("region") is not None:
            values["region"] = _region(given["region"])
        if "annotate" in given:
            values["annotate"] = _boolean("annotate", given["annotate"])
        if "detail" in given:
            values["detail"] = _detail(given["detail"])
        if given.get("grid") is not None:
            values["grid"] = _grid(given["grid"])
        if given.get("candidates") is not None:
            values["candidates"] = _number("candidates", given["candidates"], 0.01, 1)
        if "inline_errors" in given:
            values["inline_errors"] = _boolean("inline_errors", given["inline_errors"])
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """The parameters that differ from the defaults, as a JSON request carries them."""
        given = {k: v for k, v in asdict(self).items() if v != getattr(Parameters, k)}
        if self.grid is not None:
            given["grid"] = "{}x{}".format(*self.grid)
        return given

    def as_query(self) -> dict[str, str]:
        """The parameters that differ from the defaults, as a query string carries them."""
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.as_json().items()}


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # false for NaN too
        raise RequestError(f"{name} is {_short(value)}; it must be a number from {low:g} to {high:g}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {_short(value)}; it must be true or false")
    return value


def _detail(value: Any) -> str:
    if not isinstance(value, str) or value not in DETAILS:
        raise RequestError(f"detail is {_short(value)}; it must be {', '.join(DETAILS[:-1])} or {DETAILS[-1]}")
    return value


def _grid(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"0*(\d{1,3})x0*(\d{1,3})", value, re.ASCII) if isinstance(value, str) else None
    columns, rows = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= columns <= MAX_GRID and 1 <= rows <= MAX_GRID):
        raise RequestError(f"grid is {_short(value)}; it must be COLUMNSxROWS, each from 1 to {MAX_GRID}, such as 4x3")
    return columns, rows


def _region(value: Any) -> tuple[Point, ...]:
    shape = "it must be a list of at least three points [x, y], fractions of width and height from 0 to 1"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RequestError(f"region is {_short(value)}; {shape}, as JSON") from None
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise RequestError(f"region is {_short(value)}; {shape}")
    if len(value) < 3:
        raise RequestError(f"region has {len(value)} points; {shape}")
    if len(value) > MAX_REGION_POINTS:
        raise RequestError(f"region has {len(value)} points; at most {MAX_REGION_POINTS} are accepted")
    given = [(_number("a region's x", x, 0, 1), _number("a region's y", y, 0, 1)) for x, y in value]
    # Some programs write a polygon's first point a second time as its last.
    points = tuple(given[i] for i in range(len(given)) if given[i] != given[(i + 1) % len(given)])
    sides = [(points[i], points[(i + 1) % len(points)]) for i in range(len(points))]
    if all(abs(_turn(*side, points[(i + 2) % len(points)])) < 1e-9 for i, side in enumerate(sides)):
        raise RequestError("region has no area; its points lie on a line")
    for i, side in enumerate(sides):
        for j in range(i + 1, len(sides)):
            if j == i + 1 or (i == 0 and j == len(sides) - 1):
                first, second = (side, sides[j]) if j == i + 1 else (sides[j], side)
                meet = _turns_back(*first, second[1])
            else:
                meet = _touch(*side, *sides[j])
            if meet:
                raise RequestError(f"region crosses itself: side {i + 1} meets side {j + 1}; reorder its points")
    return points


def _turn(a: Point, b: Point, c: Point) -> float:
    """Twice the area of the triangle abc: positive for a turn to the one side, negative to the other."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _turns_back(a: Point, b: Point, c: Point) -> bool:
    """Whether the segment bc runs along ab, back to where it came from."""
    return _turn(a, b, c) == 0 and (a[0] - b[0]) * (c[0] - b[0]) + (a[1] - b[1]) * (c[1] - b[1]) > 0


def _touch(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the closed segments ab and cd share a point."""

    def within(p: Point, q: Point, r: Point) -> bool:
        return min(p[0], q[0]) <= r[0] <= max(p[0], q[0]) and min(p[1], q[1]) <= r[1] <= max(p[1], q[1])

    d1, d2, d3, d4 = _turn(c, d, a), _turn(c, d, b), _turn(a, b, c), _turn(a, b, d)
    if d1 * d2 < 0 and d3 * d4 < 0:
        return True
    on_a_side = ((d1, c, d, a), (d2, c, d, b), (d3, a, b, c), (d4, a, b, d))
    return any(s == 0 and within(p, q, r) for s, p, q, r in on_a_side)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


class Person(NamedTuple):
    """box: left, top, right, bottom in pixels of the upright picture. confidence: 0…1."""

    box: tuple[float, float, float, float]
    confidence: float

    def as_json(self) -> dict[str, Any]:
        return {"box": [round(side, 1) for side in self.box], "confidence": round(self.confidence, 3)}


@dataclass(frozen=True)
class Instance:
    """One picture of a request: its bytes, or where to read them, or why there are none."""

    data: bytes | memoryview | None = None
    uri: str | None = None
    error: RequestError | None = None


@dataclass(frozen=True)
class Request:
    """A parsed request. single: answer with one object instead of a list of predictions."""

    instances: list[Instance]
    parameters: Parameters = field(default_factory=Parameters)
    single: bool = False
    picture_wanted: bool = False  # Accept: image/jpeg


def parse_request(body: bytes | memoryview, content_type: str, query: str, accept: str, limits: Limits) -> Request:
    """A request as it came over HTTP. Raises RequestError."""
    kind = content_type.partition(";")[0].strip().lower()
    texts = dict(parse_qsl(query, keep_blank_values=True))
    picture_wanted = any(part.partition(";")[0].strip() == "image/jpeg" for part in accept.split(","))
    if kind == "multipart/form-data":
        data, fields = _multipart(body, content_type)
        return Request([Instance(data)], Parameters.parse(texts | fields), True, picture_wanted)
    # No picture format begins with a brace, and clients forget the header.
    if kind == "application/json" or (not kind.startswith("image/") and bytes(body[:64]).lstrip()[:1] == b"{"):
        return _json_request(body, texts, limits)
    if not len(body):
        raise RequestError("the body is empty; send the bytes of a picture, or JSON with instances")
    return Request([Instance(body)], Parameters.parse(texts), True, picture_wanted)


def _json_request(body: bytes | memoryview, texts: Mapping[str, str], limits: Limits) -> Request:
    shape = 'send {"instances": [{"image": {"b64": "…"}}], "parameters": {…}}'
    instances, given = json_instances(body, shape, limits)
    return Request([_instance(i, value, limits) for i, value in enumerate(instances)],
                   Parameters.parse({**texts, **given}))  # fmt: skip


def json_instances(body: bytes | memoryview, shape: str, limits: Limits) -> tuple[list[Any], dict[str, Any]]:
    """The instances and parameters of a JSON request. shape: how it must look, in words. Raises RequestError."""
    try:
        content = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({error}); {shape}") from None
    if not isinstance(content, dict):
        raise RequestError(f"the body is a JSON {_json_kind(content)}, not an object; {shape}")
    if unknown := sorted(set(content) - {"instances", "parameters"}):
        raise RequestError(f"unknown field {unknown[0]!r}; {shape}")
    instances = content.get("instances")
    if not isinstance(instances, list) or not instances:
        state = "missing" if "instances" not in content else "empty" if instances == [] else "not a list"
        raise RequestError(f"instances is {state}; {shape}")
    if len(instances) > limits.instances:
        raise RequestError(
            f"{len(instances)} instances in one request; at most {limits.instances} are accepted: send several "
            "requests, or raise HEADCOUNT_MAX_INSTANCES where the server runs"
        )
    given = content.get("parameters")
    if given is not None and not isinstance(given, dict):
        raise RequestError(f"parameters is a JSON {_json_kind(given)}, not an object")
    return instances, given or {}


def _instance(i: int, value: Any, limits: Limits) -> Instance:
    where = f"instances[{i}]"
    try:
        # A batch prediction job sends the files of a list without a name around them:
        # https://cloud.google.com/vertex-ai/docs/predictions/get-batch-predictions
        bare = isinstance(value, dict) and set(value) == {"b64"}
        image = value if bare else value.get("image") if isinstance(value, dict) else None
        if not isinstance(image, dict) or set(image) not in ({"b64"}, {"uri"}) or not (bare or set(value) == {"image"}):
            raise RequestError(
                f'{where} must be {{"image": {{"b64": "…"}}}} or {{"image": {{"uri": "gs://bucket/object"}}}}'
            )
        if "b64" in image:
            try:
                return Instance(base64.b64decode(image["b64"], validate=True))
            except (binascii.Error, TypeError, ValueError):
                raise RequestError(
                    f"{where}{'' if bare else '.image'}.b64 is not base64; encode the file's bytes (RFC 4648)"
                ) from None
        return Instance(uri=_uri(f"{where}.image.uri", image["uri"], limits))
    except RequestError as error:
        return Instance(error=error)


def _uri(where: str, uri: Any, limits: Limits) -> str:
    # No line breaks, and no lone surrogates: nothing with those can be asked for.
    pattern = r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])/([^\r\n\ud800-\udfff]+)"
    match = re.fullmatch(pattern, uri) if isinstance(uri, str) else None
    if not match:
        raise RequestError(f"{where} is {_short(uri)}; only gs://bucket/object can be read")
    if match[1] not in limits.buckets:
        raise RequestError(
            f"{where}: bucket {match[1]!r} is not one this server may read; "
            "add it to HEADCOUNT_BUCKETS where the server runs"
        )
    return match[0]


def _multipart(body: bytes | memoryview, content_type: str) -> tuple[bytes, dict[str, str]]:
    files: list[bytes] = []
    fields: dict[str, str] = {}

    def on_file(part: Any) -> None:
        part.file_object.seek(0)
        files.append(part.file_object.read())

    def on_field(part: Any) -> None:
        fields[part.field_name.decode(errors="replace")] = (part.value or b"").decode(errors="replace")

    try:
        headers = {"Content-Type": content_type.encode("latin-1", "replace")}
        parser = python_multipart.create_form_parser(
            headers, on_field, on_file, config={"MAX_MEMORY_FILE_SIZE": 1 << 30}
        )
        parser.write(bytes(body))
        parser.finalize()
    except Exception as error:
        raise RequestError(
            f"the multipart body cannot be read ({error}); send one file, e.g. curl -F image=@FILE"
        ) from None
    if len(files) != 1:
        raise RequestError(f"the multipart body has {len(files)} files; send exactly one, e.g. curl -F image=@FILE")
    return files[0], fields


def _json_kind(value: Any) -> str:
    kinds = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
