"""The OpenAPI document says what the server does: every example is sent to it, and schemathesis sends others."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from conftest import Server
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serving.contract import DETAILS, PREDICT_ROUTE, Parameters, RequestError
from serving.openapi import PARAMETERS, openapi

DOCUMENT = openapi()
OPERATION = DOCUMENT["paths"][PREDICT_ROUTE]["post"]
ANSWER = OPERATION["responses"]["200"]["content"]["application/json"]
REQUESTS = OPERATION["requestBody"]["content"]["application/json"]["examples"]


def validate(name: str, value: object) -> None:
    """Fails unless the value is what the document calls so."""
    jsonschema_rs.validate({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}, value)


def test_it_describes_every_parameter_as_the_contract_has_it() -> None:
    assert set(PARAMETERS) == set(Parameters.__dataclass_fields__)
    for name, (schema, _, example) in PARAMETERS.items():
        assert schema.get("default") == (getattr(Parameters, name) or schema.get("default"))
        Parameters.parse({name: example})
    assert PARAMETERS["detail"][0]["enum"] == [*DETAILS]
    assert [one["name"] for one in OPERATION["parameters"]] == [*PARAMETERS]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_it_forbids_is_refused(name: str) -> None:
    """And what lies just inside its bounds is not."""
    schema = PARAMETERS[name][0]
    for bound, beyond in (("minimum", -0.001), ("maximum", 0.001)):
        if bound in schema:
            Parameters.parse({name: schema[bound]})
            with pytest.raises(RequestError, match=name):
                Parameters.parse({name: schema[bound] + beyond})
    if "pattern" in schema:
        for text, good in (("1x1", True), ("100x100", True), ("007x3", True), ("0x1", False), ("101x1", False)):
            assert jsonschema_rs.is_valid(schema, text) == good
            if good:
                Parameters.parse({name: text})
            else:
                with pytest.raises(RequestError, match=name):
                    Parameters.parse({name: text})


@pytest.mark.slow
def test_it_is_served(server: Server) -> None:
    answer = httpx.get(f"{server.url}/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == DOCUMENT


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUESTS)
def test_an_example_is_answered_as_it_says(server: Server, name: str) -> None:
    answer = httpx.post(server.predict, json=REQUESTS[name]["value"])
    assert answer.status_code == 200
    expected = deepcopy(ANSWER["examples"][name]["value"])
    said = answer.json()
    for one in (expected, said):
        validate("Predictions", one)
        for prediction in one["predictions"]:
            prediction.pop("model", None)  # another machine may serve another one
    assert said == expected


@pytest.mark.slow
@pytest.mark.parametrize("parameter", OPERATION["parameters"], ids=lambda parameter: parameter["name"])
def test_an_example_of_a_parameter_works_in_the_query(server: Server, bus: bytes, parameter: dict[str, Any]) -> None:
    example = parameter["example"] if "example" in parameter else parameter["content"]["application/json"]["example"]
    text = example if isinstance(example, str) else json.dumps(example)
    answer = httpx.post(server.predict, content=bus, params={parameter["name"]: text}, timeout=60)
    assert answer.status_code == 200
    validate("Prediction", answer.json())
    added = {"annotate": "annotated", "grid": "grid", "candidates": "candidates"}.get(parameter["name"])
    assert added is None or added in answer.json()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "headers"),
    [(b"", {}), (b"no picture", {}), (b"{", {"Content-Type": "application/json"}), (b'{"instances": []}', {})],
)
def test_an_error_is_what_it_calls_one(server: Server, content: bytes, headers: dict[str, str]) -> None:
    answer = httpx.post(server.predict, content=content, headers=headers)
    assert str(answer.status_code) in OPERATION["responses"]
    validate("Error", answer.json())


@pytest.mark.slow
def test_the_other_routes_answer_as_it_says(server: Server) -> None:
    validate("Health", httpx.get(f"{server.url}/ping").json())
    assert httpx.get(f"{server.url}/metrics").headers["content-type"].startswith("text/plain")


SCHEMA = schemathesis.openapi.from_dict(openapi())


@pytest.mark.slow
@SCHEMA.parametrize()
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_answers_as_the_document_allows(case: schemathesis.Case[Any], server: Server) -> None:
    """Whatever schemathesis makes up, good and bad.

    A schema cannot say that a region's sides must not cross, or that bytes must be a picture. Nor can it say that with
    inline_errors bad instances are answered in their places.
    """
    excluded: list[Any] = [positive_data_acceptance]
    if "inline_errors" in f"{case.query!r} {case.body!r}":
        excluded.append(negative_data_rejection)
    case.call_and_validate(base_url=server.url, excluded_checks=excluded)
