"""The serving contract as an OpenAPI 3.1 document. A test sends each example to a server and compares the answers."""

from __future__ import annotations

from typing import Any, Final

from serving.contract import COUNT_HEADER, DETAILS, MAX_GRID, MAX_REGION_POINTS, PREDICT_ROUTE, Limits, Parameters

Json = dict[str, Any]

# A grey PNG of 32×24 pixels, with nobody in it.
_PICTURE: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAYCAAAAAC+OKDoAAAAFUlEQVR42mMsYsAPmBhGFYwqGHEKAK2lAKIWfsz0AAAAAElFTkSuQmCC"
)
_HALF: Final = [[0, 0.5], [1, 0.5], [1, 1], [0, 1]]


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def object_(required: str, **properties: Json) -> Json:
    """An object without other properties. required: their names, separated by spaces."""
    return {"type": "object", "required": required.split(), "additionalProperties": False, "properties": properties}


def number(low: float, high: float, **more: Any) -> Json:
    return {"type": "number", "minimum": low, "maximum": high, **more}


def error(description: str, **more: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": ref("Error")}}, **more}


INTEGER: Final[Json] = {"type": "integer"}
TEXT: Final[Json] = {"type": "string"}
BYTES: Final[Json] = {"schema": {"type": "string", "format": "binary"}}
_CELLS = f"0*([1-9][0-9]?|{MAX_GRID})"  # MAX_GRID has three digits

# For each parameter its schema, its description and an example.
PARAMETERS: Final[dict[str, tuple[Json, str, Any]]] = {
    "confidence": (
        number(0.01, 1, default=Parameters.confidence),
        "Least confidence of a person.",
        0.4,
    ),
    "iou": (
        number(0, 1, default=Parameters.iou),
        "Overlap (intersection over union) above which two boxes are one person.",
        0.6,
    ),
    "max_people": (
        {"type": "integer", "minimum": 0, "maximum": 1_000_000},
        "Longest list of people. The count is never capped.",
        10,
    ),
    "region": (
        {"type": "array", "minItems": 3, "maxItems": MAX_REGION_POINTS,
         "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": number(0, 1)}},
        "A polygon of points [x, y], fractions of width and height, whose sides do not cross. Those count whose foot "
        "point, the middle of the box's lower edge, is inside.",
        _HALF,
    ),
    "annotate": (
        {"type": "boolean", "default": Parameters.annotate},
        "Also answer with the picture, boxes drawn.",
        True,
    ),
    "detail": (
        {"type": "string", "enum": [*DETAILS], "default": Parameters.detail},
        "How closely to look: once at the whole picture (fast), closely at all of it (full), or closely where people "
        "may have been missed (auto).",
        "full",
    ),
    "grid": (
        {"type": "string", "pattern": f"^{_CELLS}x{_CELLS}$"},
        f"Columns and rows of a grid, each from 1 to {MAX_GRID}; the answer has the number of people in each cell.",
        "4x3",
    ),
    "candidates": (
        number(0.01, 1),
        "Also list those who have at least this confidence and less than `confidence`. They do not count.",
        0.1,
    ),
    "inline_errors": (
        {"type": "boolean", "default": Parameters.inline_errors},
        "Answer JSON with an error in place of each bad instance even if all instances are bad, with status 200.",
        True,
    ),
}  # fmt: skip


def openapi() -> Json:
    """The document of a server that counts people."""
    return document(
        "Counts the people in pictures: JPEG, PNG, WebP or GIF, by default at most "
        f"{Limits.max_pixels / 1e6:g} megapixels, {Limits.request_bytes / 1e6:g} MB and {Limits.instances} "
        "pictures a request. Boxes are pixels of the upright picture, as a viewer shows it, origin top left.",
        PREDICT_ROUTE,
        _predict(),
        _schemas(),
    )


def document(description: str, route: str, predict: Json, schemas: Json) -> Json:
    """A document with one operation that predicts. schemas: those of its requests and answers."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headcount", "version": "1", "description": description},
        "paths": {route: {"post": predict}, "/ping": {"get": _ping()}, "/metrics": {"get": _metrics()}},
        "components": {
            "schemas": schemas
            | {
                "Error": object_(
                    "error", error=object_("code status message", code=INTEGER, status=TEXT, message=TEXT)
                ),
                "Health": object_("status", status={"type": "string", "enum": ["Healthy", "Unhealthy", "Draining"]}),
            }
        },
    }


def errors() -> Json:
    """The answers to a prediction request that fails."""
    again = {"Retry-After": {"description": "Seconds after which to ask again.", "schema": INTEGER}}
    return {
        "400": error("The request or its instance is wrong. The message says what to do."),
        "408": error("The body took too long."),
        "413": error("The body is too large."),
        "429": error("There are too many requests at once.", headers=again),
        "500": error("The server failed. Its log says why."),
        "503": error("No worker is ready.", headers=again),
        "504": error("The answer took too long."),
    }


def _predict() -> Json:
    nobody = {
        "count": 0, "people": [], "image": {"width": 32, "height": 24}, "looks": 1,
        "model": {"name": "yolov5n", "version": "4f180cf23ba0"},
    }  # fmt: skip
    message = "instances[1]: this is not a picture that can be read; send the bytes of a JPEG, PNG, WebP or GIF file"
    bad = {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": message}}
    one = {"image": {"b64": _PICTURE}}
    given = {"confidence": 0.4, "region": _HALF, "grid": "2x1", "candidates": 0.3}
    requests = {
        "one": ("One picture", {"instances": [one]}),
        "parameters": ("A picture with parameters", {"instances": [one], "parameters": given}),
        "bad": ("A bad instance among good ones", {"instances": [one, {"image": {"b64": "bm8gcGljdHVyZQ=="}}]}),
    }
    answers = {"one": [nobody], "parameters": [nobody | {"grid": [[0, 0]], "candidates": []}], "bad": [nobody, bad]}
    picture = BYTES["schema"] | {"description": "The picture. Its field may have any name."}
    return {
        "operationId": "count",
        "summary": "Count the people in pictures",
        "description": "The body is a picture, a form with one picture, or JSON as Vertex AI sends it. Parameters are "
        "in the query, in the form's fields or in the JSON's `parameters`, which win over the query.",
        "parameters": [_in_query(name, *described) for name, described in PARAMETERS.items()],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(("image/jpeg", "image/png", "image/webp", "image/gif"), BYTES),
                "application/octet-stream": BYTES,
                "multipart/form-data": {"schema": {"type": "object", "required": ["image"],
                                                   "properties": {"image": picture}}},
                "application/json": {
                    "schema": ref("Request"),
                    "examples": {name: {"summary": text, "value": value} for name, (text, value) in requests.items()},
                },
            },
        },
        "responses": {
            "200": {
                "description": "A prediction for a picture, predictions for JSON, or for a picture with the header "
                "`Accept: image/jpeg` the picture with the boxes drawn.",
                "headers": {
                    COUNT_HEADER: {"description": "People in all pictures of the request.", "schema": INTEGER},
                    "X-Request-Id": {"description": "As it was sent, or a new one.", "schema": TEXT},
                },
                "content": {
                    "application/json": {
                        "schema": {"anyOf": [ref("Prediction"), ref("Predictions")]},
                        "examples": {name: {"value": {"predictions": value}} for name, value in answers.items()},
                    },
                    "image/jpeg": BYTES,
                },
            },
            **errors(),
        },
    }  # fmt: skip


def _nullable(name: str, schema: Json) -> Json:
    """In JSON, null stands for no value where the default is none."""
    none = getattr(Parameters, name) is None
    return schema | {"type": [schema["type"], "null"]} if none else schema


def _in_query(name: str, schema: Json, description: str, example: Any) -> Json:
    # A list is written as JSON, too.
    carried = ({"content": {"application/json": {"schema": schema, "example": example}}} if schema["type"] == "array"
               else {"schema": schema, "example": example})  # fmt: skip
    return {"name": name, "in": "query", "description": description, **carried}


def _ping() -> Json:
    content = {"application/json": {"schema": ref("Health")}}
    return {
        "operationId": "ping",
        "summary": "Whether a worker can really predict",
        "responses": {
            "200": {"description": "One can.", "content": content},
            "503": {"description": "None can, or the server is shutting down.", "content": content},
        },
    }


def _metrics() -> Json:
    content = {"text/plain": {"schema": TEXT}}
    return {
        "operationId": "metrics",
        "summary": "Metrics for Prometheus",
        "responses": {"200": {"description": "In Prometheus' text format.", "content": content}},
    }


def _schemas() -> Json:
    base64, people = {"type": "string", "contentEncoding": "base64"}, {"type": "array", "items": ref("Person")}
    box = {"type": "array", "minItems": 4, "maxItems": 4, "items": {"type": "number"},
           "description": "Left, top, right, bottom."}  # fmt: skip
    uri = TEXT | {"pattern": "^gs://", "description": "An object of a bucket that the deployment allows."}
    parameters = {
        name: _nullable(name, schema) | {"description": text, "examples": [example]}
        for name, (schema, text, example) in PARAMETERS.items()
    }
    return {
        "Parameters": {"type": "object", "additionalProperties": False, "properties": parameters},
        "Request": object_(
            "instances",
            instances={"type": "array", "minItems": 1, "items": ref("Instance")},
            parameters={"anyOf": [ref("Parameters"), {"type": "null"}]},
        ),
        "Instance": {"anyOf": [
            object_("image", image={"anyOf": [object_("b64", b64=base64), object_("uri", uri=uri)]}),
            object_("b64", b64=base64 | {"description": "As batch prediction jobs send the files of a list."}),
        ]},
        "Person": object_("box confidence", box=box, confidence=number(0, 1)),
        "Prediction": object_(
            "count people image looks model",
            count=INTEGER | {"minimum": 0},
            people=people | {"description": "Most confident first."},
            image=object_("width height", width=INTEGER, height=INTEGER),
            looks=INTEGER
            | {"minimum": 1, "description": "Times that the network looked at the picture or a part of it."},
            model=object_("name version", name=TEXT, version=TEXT),
            grid={"type": "array", "items": {"type": "array", "items": INTEGER},
                  "description": "People in each cell, row by row from the top."},
            candidates=people | {"description": "Less confident than those who count; if asked for."},
            annotated=object_("b64", b64=base64 | {"contentMediaType": "image/jpeg"}),
            note=TEXT | {"description": "What the caller should know of how it was counted."},
        ),
        "Predictions": object_(
            "predictions",
            predictions={"type": "array", "items": {"anyOf": [ref("Prediction"), ref("Error")]},
                         "description": "One for each instance, in order."},
        ),
    }  # fmt: skip
