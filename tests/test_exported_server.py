"""Exported models before their clients: the handler, the front that describes the model, and the real server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exported_models
import grpc
import httpx
import jsonschema_rs
import pytest
from conftest import Server
from exported_models import predicted
from fake_storage import FakeStorage
from front_harness import Launched
from helpers import eventually
from hypothesis import given
from hypothesis import strategies as st
from test_handler import Context

from headcount.torchserve_grpc import METHOD, PredictionResponse, PredictionsRequest
from serving.exported.handler import ExportedHandler
from serving.exported.model_contract import Category, Contract, Example, InstanceError, Labels, Number, Picture, Values
from serving.exported.openapi import exported_openapi
from serving.exported.requests import TOGETHER
from serving.run_folder import RunFolder

GOOD = {"a": 1, "b": 2, "day": "mon"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.weather(tmp_path_factory.mktemp("model"))


# The handler


@pytest.fixture(scope="module")
def handler(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExportedHandler]:
    """A handler as TorchServe sets it up."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HEADCOUNT_RUN_FOLDER", str(RunFolder.create(tmp_path_factory.mktemp("run")).path))
        environment.setenv("HEADCOUNT_MODEL", str(model))
        environment.setenv("HEADCOUNT_MAX_INSTANCES", "100")
        one = ExportedHandler()
        one.initialize(Context(model))
        yield one


def ask(handler: ExportedHandler, body: bytes, content_type: str = "") -> tuple[int, Any]:
    name, context = "0" * 32, Context(Path())
    (handler.run_folder.spool / name).write_bytes(body)
    told = {"spooled": name, "size": len(body), "content_type": content_type, "query": "", "accept": "image/jpeg"}
    (answer,) = handler.handle([{"body": json.dumps(told).encode()}], context)
    assert context.types == {0: "application/json"}
    assert "decode;dur=" in context.headers["Server-Timing"] or context.statuses
    return context.statuses.get(0, 200), json.loads(answer)


def test_a_worker_is_registered_when_it_is_set_up(handler: ExportedHandler) -> None:
    assert handler.run_folder.worker_facts() == {"device": "cpu"}


def test_batches_keep_their_order_and_errors_stand_in_their_places(handler: ExportedHandler) -> None:
    instances: list[Any] = [GOOD | {"a": a} for a in range(2 * TOGETHER + 1)]
    instances[TOGETHER] = {"a": 1}
    status, answer = ask(handler, json.dumps({"instances": instances}).encode())
    assert status == 200
    for place, one in enumerate(answer["predictions"]):
        if place == TOGETHER:
            message = f"instances[{place}]: it lacks the column 'b'"
            assert one == {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": message}}
        else:
            assert one == predicted(place, 2, 10)


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"", "", "the body is not valid JSON"),
        (b"{", "application/json", "the body is not valid JSON"),
        (b'{"instances": []}', "", 'instances is empty; send {"instances": [{…}]}; /openapi.json describes an'),
        (b'{"instances": [{}], "signature_name": "x"}', "", "unknown field 'signature_name'"),
        (b'{"instances": [{}]}', "", "instances[0]: it lacks the column 'a'"),
        (json.dumps({"instances": [GOOD] * 101}).encode(), "", "101 instances in one request; at most 100"),
        (json.dumps({"instances": [GOOD], "parameters": {"annotate": True}}).encode(), "",
         "unknown parameter 'annotate'; the model weather takes none"),
        (b"\xff\xd8\xff", "image/jpeg", "this server has the model weather and counts no people in pictures"),
    ],
)  # fmt: skip
def test_a_request_that_is_refused(handler: ExportedHandler, body: bytes, kind: str, says: str) -> None:
    status, answer = ask(handler, body, kind)
    assert (status, set(answer)) == (400, {"error"})
    assert says in answer["error"]["message"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "day"]), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.binary(max_size=100)
    | st.fixed_dictionaries({"instances": JSON_VALUES | st.lists(JSON_VALUES | st.just(GOOD), max_size=4)}).map(
        lambda body: json.dumps(body).encode()
    )
)
def test_any_request_is_answered_with_predictions_or_errors(handler: ExportedHandler, body: bytes) -> None:
    status, answer = ask(handler, body)
    json.dumps(answer, allow_nan=False)
    if status == 200:
        instances = json.loads(body)["instances"]
        assert len(answer["predictions"]) == len(instances)
        for instance, one in zip(instances, answer["predictions"], strict=True):
            assert instance != GOOD or one == predicted(1, 2, 10)
    else:
        assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")


def test_over_grpc_the_bytes_are_the_json(handler: ExportedHandler) -> None:
    body, context = json.dumps({"instances": [GOOD]}).encode(), Context(Path())
    first, second = handler.handle([{"data": body}, {"data": body, "annotate": b"true"}], context)
    assert json.loads(first) == {"predictions": [predicted(1, 2, 10)]}
    assert "takes none" in json.loads(second)["error"]["message"]


@pytest.mark.parametrize("damage", [lambda f: (f / "model.pt2").unlink(), lambda f: (f / "model.pt2").write_bytes(b"")])
def test_a_model_that_cannot_be_served_is_the_launcher_s_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    folder, run = exported_models.weather(tmp_path / "model"), RunFolder.create(tmp_path)
    damage(folder)
    monkeypatch.setenv("HEADCOUNT_RUN_FOLDER", str(run.path))
    monkeypatch.setenv("HEADCOUNT_MODEL", str(folder))
    with pytest.raises(Exception, match=r"model\.pt2"):
        ExportedHandler().initialize(Context(folder))
    assert "model.pt2" in str(run.failure())


# The document


EVERYTHING = Contract(
    "everything", "1" * 64,
    (Number("n", "int64", minimum=0), Number("m", "float32", (2, 2)), Category("c", ("x", "y")), Picture("p", (1, 2))),
    (Values("id", (1,), "int64"), Labels("label", "id", ("no", "yes")), Values("all", (2, 2))),
    (Example({"n": 1, "m": [1, 2, 3, 4], "c": None, "p": [[1, 2]]},
             {"id": [1], "label": ["yes"], "all": [[1.0, 2.0], [3.0, 4.0]]}),), ("key",),
)  # fmt: skip


def validator(document: Any, schema: str) -> Any:
    return jsonschema_rs.validator_for({**document, "$ref": f"#/components/schemas/{schema}"})


def test_the_document_describes_what_the_contract_takes() -> None:
    document = exported_openapi(EVERYTHING, "/v1/everything")
    assert list(document["paths"]) == ["/v1/everything", "/ping", "/metrics"]
    request = validator(document, "Request")
    good = dict(EVERYTHING.examples[0].instance)
    taken: list[dict[str, Any]] = [
        {}, {"key": "x"}, {"m": [[1, 2], [3, 4]]}, {"c": "z"}, {"p": {"b64": "eA=="}}, {"n": 2**53},
    ]  # fmt: skip
    for change in taken:
        assert request.is_valid({"instances": [good | change]})
    wrong: list[dict[str, Any]] = [
        {"n": -1}, {"n": 1.5}, {"n": None}, {"m": [1]}, {"c": 1}, {"p": "eA=="}, {"p": [[1, 256]]}, {"x": 1},
    ]  # fmt: skip
    for refused in wrong:
        assert not request.is_valid({"instances": [good | refused]})
        with pytest.raises(InstanceError):
            EVERYTHING.read(good | refused)
    assert not request.is_valid({"instances": [{}]})
    answers = validator(document, "Predictions")
    error = {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "no"}}
    assert answers.is_valid({"predictions": [EVERYTHING.examples[0].prediction, error]})
    assert not answers.is_valid({"predictions": [{"id": [1], "label": ["maybe"], "all": [[1, 2], [3, 4]]}]})


# The launcher, with a stand-in for TorchServe


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **more: stack.enter_context(Launched(tmp_path, *arguments, **more))


def test_a_launcher_serves_a_folder_and_says_what_it_has(start: Callable[..., Launched], model: Path) -> None:
    one = start("--model", str(model))
    assert one.line("ready")["model"] == "weather"
    post = one.http.post(one.line("ready")["url"] + "/predictions/weather", content=b"{}")
    assert post.status_code == 200, "the stand-in answers everything"
    document = one.get("/openapi.json").json()
    assert next(iter(document["paths"])) == "/predictions/weather"
    assert document["paths"]["/predictions/weather"]["post"]["summary"] == "Predict with the model weather"
    page = one.get("/")
    assert (page.status_code, page.json()["error"]["status"]) == (404, "NOT_FOUND")
    assert "the page counts people, and this server has the model weather" in page.json()["error"]["message"]
    assert "POST JSON instances to /predictions/weather" in one.get("/x").json()["error"]["message"]
    (settings,) = one.run_folder().glob("torchserve.properties")
    assert '{"weather": {"' in settings.read_text()


def test_a_model_in_a_bucket_is_served_at_vertex_ai_s_route(start: Callable[..., Launched], model: Path) -> None:
    files = {f"ours/weather/{file.name}": file.read_bytes() for file in model.iterdir()}
    with FakeStorage(files) as storage:
        one = start(AIP_STORAGE_URI="gs://ours/weather", AIP_PREDICT_ROUTE="/v1/p", STORAGE_EMULATOR_HOST=storage.url)
        url = one.line("ready")["url"]
        for route in ("/v1/p", "/predictions/weather"):
            assert one.http.post(url + route, content=b"{}").status_code == 200
        assert next(iter(one.get("/openapi.json").json()["paths"])) == "/v1/p"


def test_a_damaged_model_ends_the_launcher_with_the_reason(start: Callable[..., Launched], tmp_path: Path) -> None:
    folder = exported_models.weather(tmp_path / "model")
    (folder / "contract.json").write_text("{}")
    one = start(AIP_STORAGE_URI=str(folder))
    assert one.process.wait() == 1
    assert one.lines()[-1]["message"] == f"cannot serve: {folder}/contract.json: the field 'format' is absent"


def test_people_at_a_terminal_are_told_how_to_predict(start: Callable[..., Launched], model: Path) -> None:
    one = start("--model", str(model), "--console")
    assert eventually(lambda: "--json-instances FILE" in one.log.read_text() or one.process.poll() is not None)
    assert "Headcount serves the model weather at http://127.0.0.1:" in one.log.read_text()


# TorchServe itself


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server without the archive of people."""
    log = tmp_path_factory.mktemp("server") / "log"
    one = Server(Path("unused"), {"HEADCOUNT_WORKERS": "1", "HEADCOUNT_MAX_REQUEST_BYTES": "10000"}, log)
    one.arguments = ("--model", str(model))
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.stop()


@pytest.mark.slow
def test_the_real_server_predicts_over_rest(server: Server) -> None:
    url = f"{server.url}/predictions/weather"
    answer = httpx.post(url, json={"instances": [GOOD, {"a": 1}, GOOD | {"a": 4}]}, timeout=60)
    assert answer.status_code == 200
    first, second, third = answer.json()["predictions"]
    assert (first, third) == (predicted(1, 2, 10), predicted(4, 2, 10))
    assert second["error"]["code"] == 400
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert validator(document, "Predictions").is_valid(answer.json())
    example = document["paths"]["/predictions/weather"]["post"]["requestBody"]["content"]["application/json"][
        "examples"
    ]
    assert httpx.post(url, json=example["trained"]["value"], timeout=60).status_code == 200
    large = httpx.post(url, content=b"x" * 10_001, timeout=60)
    assert (large.status_code, large.json()["error"]["code"]) == (413, 413)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'headcount_requests_total{status="413"} 1.0' in metrics
    assert any(line["message"] == "predicted" and line["status"] == 200 for line in server.log_lines())


@pytest.mark.slow
def test_the_real_server_predicts_over_grpc(server: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        call = channel.unary_unary(METHOD, PredictionsRequest.SerializeToString, PredictionResponse.FromString)
        body = json.dumps({"instances": [GOOD]}).encode()
        answer = call(PredictionsRequest(model_name="weather", input={"data": body}), timeout=60)
    assert json.loads(answer.prediction) == {"predictions": [predicted(1, 2, 10)]}


def test_an_image_for_cpus_leaves_a_gpu_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCOUNT_RUN_FOLDER", str(RunFolder.create(tmp_path).path))
    monkeypatch.setenv("HEADCOUNT_MODEL", str(model))
    monkeypatch.setenv("HEADCOUNT_ACCELERATOR", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    one = ExportedHandler()
    one.initialize(Context(model))
    assert one.run_folder.worker_facts() == {"device": "cpu"}
