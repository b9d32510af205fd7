"""`headcount predict` and `headcount register`: the old tool's table, exit codes, batches, and a model in a bucket."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported_models
import pytest
import yaml
from exported_models import INSTANCES, predicted
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from helpers import free_port
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner, Result
from werkzeug import Request, Response

from headcount import endpoint, predictors, register_command
from headcount.cli import app
from headcount.predictors import batches, table
from infra.settings import read
from sandbox.testing import RunningSandbox
from serving.storage import fetch_model

OPENAPI: dict[str, Any] = {"paths": {"/ping": {"get": {}}, "/predictions/weather": {"post": {}}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.weather(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "instances.json"
    path.write_text("".join(json.dumps(one) + "\n" for one in INSTANCES))
    return path


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin, catch_exceptions=False)


# As guides to the census sample (github.com/GoogleCloudPlatform/cloudml-samples) recorded it from
# `gcloud ai-platform local predict`, except that the tool's Python 2 wrote [u'0'].
RECORDED = """\
CLASS_IDS  CLASSES  LOGISTIC              LOGITS                PROBABILITIES
[0]        ['0']    [0.0583675391972065]  [-2.780855178833008]  [0.9416324496269226, 0.0583675354719162]
"""


def test_the_table_is_the_old_tool_s() -> None:
    prediction = {
        "probabilities": [0.9416324496269226, 0.0583675354719162], "class_ids": [0], "logits": [-2.780855178833008],
        "classes": ["0"], "logistic": [0.0583675391972065],
    }  # fmt: skip
    assert table([prediction]) == RECORDED


def test_the_table_has_a_row_for_each_instance() -> None:
    error = {"error": {"message": "no"}}
    assert table([error, {"b": "x\ny", "a": None}, {"a": 1}]).splitlines() == ["A  B", "-  -", "   x\\ny", "1"]
    assert table([error]) == table([]) == ""


def test_a_model_predicts_here(model: Path, file: Path) -> None:
    done = run("--model", model, "--json-instances", file)
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "CLASS_IDS  CLASSES  SCORE", "[1]        ['wet']  [11.0]", "[0]        ['dry']  [-6.25]",
    ]  # fmt: skip
    done = run("--model", model, "--json-instances", "-", "--json", stdin=file.read_text())
    assert [json.loads(line) for line in done.stdout.splitlines()] == [predicted(1, 2, 10), predicted(-3.5, 0.25)]


def test_what_fails_is_told_with_its_line_and_the_rest_is_predicted(model: Path, file: Path) -> None:
    file.write_text(f'{json.dumps(INSTANCES[0])}\n\n{{"a": 1}}\n{{\n')
    done = run("--model", model, "--json-instances", file)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1:] == [
        "[1]        ['wet']  [11.0]",
        "-          -        -",
        "-          -        -",
    ]
    third, fourth = done.stderr.splitlines()
    assert third == f"headcount: {file}:3: it lacks the column 'b'"
    assert fourth.startswith(f"headcount: {file}:4: it is not JSON: ")
    done = run("--model", model, "--json-instances", file, "--json")
    good, missing, broken = map(json.loads, done.stdout.splitlines())
    assert good == predicted(1, 2, 10)
    assert missing == {"error": {"message": "it lacks the column 'b'"}}
    assert "is not JSON" in broken["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one of --model, --url, --stack and --endpoint"),
        (["--model", "x", "--url", "http://x"], "give one of --model"),
        (["--url", "localhost"], "'localhost' is not a server's URL"),
        (["--endpoint", "x"], "'x' is not an endpoint"),
    ],
)
def test_a_command_that_is_not_understood(file: Path, arguments: list[str], says: str) -> None:
    done = run("--json-instances", file, *arguments)
    assert done.exit_code == 2
    assert says in done.stderr


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), (b"\xff", "is not UTF-8")])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content:
        (tmp_path / "x").write_bytes(content)
    done = run("--model", tmp_path, "--json-instances", tmp_path / "x")
    assert done.exit_code == 2
    assert says in done.stderr


def test_a_folder_without_a_model_is_told(tmp_path: Path, file: Path) -> None:
    done = run("--model", tmp_path, "--json-instances", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.count("contract.json is absent; a model is a folder with model.pt2 and contract.json") == 1


# Servers and endpoints


@given(st.lists(st.text(max_size=30)), st.integers(1, 5), st.integers(1, 100))
def test_batches_keep_all_instances_in_order_within_the_limits(instances: list[str], most: int, room: int) -> None:
    found = list(batches(instances, most, room))
    assert [one for batch in found for one in batch] == instances
    for batch in found:
        assert 0 < len(batch) <= most
        assert len(batch) == 1 or len(json.dumps(batch)) <= room
    for batch, after in itertools.pairwise(found):
        assert len(batch) == most or len(json.dumps([*batch, after[0]])) > room, "one more would have fitted"


def weather_server(request: Request) -> Response:
    """Answers as a server with the model does: an error in place of an instance, or of a request that has no other."""
    answers: list[Any] = []
    for place, one in enumerate(json.loads(request.data)["instances"]):
        message = f"instances[{place}]: it lacks the column 'b'"
        good = predicted(one["a"], one["b"], 10 if one.get("day") else 0) if "b" in one else None
        answers.append(good or {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": message}})
    if all("error" in one for one in answers):
        return Response(json.dumps(answers[0]), 400)
    return Response(json.dumps({"predictions": answers}))


def test_a_server_is_asked_in_batches_at_the_route_that_it_names(
    httpserver: HTTPServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictors, "TOGETHER", 2)
    httpserver.expect_request("/openapi.json").respond_with_json(OPENAPI)
    httpserver.expect_request("/predictions/weather").respond_with_handler(weather_server)
    lines: list[Any] = [{"a": 1, "b": 0}, {"a": 2}, {"a": 3}, {"a": 4}, {"a": 5, "b": 0}]
    file.write_text("\n".join(map(json.dumps, lines)))
    done = run("--url", httpserver.url_for(""), "--json-instances", file, "--json")
    assert done.exit_code == 1
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert (answers[0], answers[4]) == (predicted(1, 0), predicted(5, 0))
    assert done.stderr.splitlines() == [f"headcount: {file}:{number}: it lacks the column 'b'" for number in (2, 3, 4)]
    done = run("--url", httpserver.url_for("/predictions/weather"), "--json-instances", file)
    assert len(done.stdout.splitlines()) == 6


def test_a_server_that_does_not_answer_is_told_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headcount.counters.PAUSES", ())
    done = run("--url", "http://127.0.0.1:1/predictions/weather", "--json-instances", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch("headcount: cannot reach .*; is the server up\\?\n", done.stderr)


def test_a_server_that_is_another_one_is_told(httpserver: HTTPServer, file: Path) -> None:
    httpserver.expect_request("/openapi.json").respond_with_json({})
    done = run("--url", httpserver.url_for("/"), "--json-instances", file)
    assert done.exit_code == 1
    assert "is no Headcount server; give its URL with the route" in done.stderr


def test_a_stack_s_endpoint_is_asked_within_its_payload_limit(
    httpserver: HTTPServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "outputs", lambda _: {"url": httpserver.url_for("/v1/e/1"), "maxRequestBytes": 1000})
    httpserver.expect_request("/v1/e/1:predict").respond_with_handler(weather_server)
    file.write_text("\n".join(json.dumps({"a": number, "b": 0}) for number in range(100)))
    done = run("--stack", "dev", "--json-instances", file, "--json")
    assert done.exit_code == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [predicted(number, 0) for number in range(100)]
    sizes = [len(request.data) for request, _ in httpserver.log]
    assert max(sizes) <= 1000 < sum(sizes)


def test_an_endpoint_that_passes_a_container_s_error_on_is_understood(
    httpserver: HTTPServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vertex AI answers the container's status, and its body as the message."""

    def vertex(request: Request) -> Response:
        answer = weather_server(request)
        if answer.status_code == 200:
            return answer
        return Response(json.dumps({"error": {"code": 400, "message": answer.get_data(as_text=True)}}), 400)

    monkeypatch.setattr(endpoint, "outputs", lambda _: {"url": httpserver.url_for("/v1/e/1"), "maxRequestBytes": 9000})
    httpserver.expect_request("/v1/e/1:predict").respond_with_handler(vertex)
    file.write_text('{"a": 1}\n{"a": 2}\n')
    done = run("--stack", "dev", "--json-instances", file)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"headcount: {file}:{line}: it lacks the column 'b'" for line in (1, 2)]


# Models in a bucket


@pytest.fixture(scope="module")
def sandbox() -> Any:
    with RunningSandbox() as running:
        client = storage.Client("a-project", AnonymousCredentials(), client_options={"api_endpoint": running.url})  # type: ignore[no-untyped-call]
        client.create_bucket("a-project-hc-models-dev")
        client.close()
        yield running


Register = Callable[..., Result]


@pytest.fixture
def register(sandbox: RunningSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Register:
    """Registers with stack dev, which is deployed on the sandbox, from a checkout of its own."""
    found = {
        "url": f"{sandbox.url}/v1/{sandbox.location}/endpoints/1", "endpoint": f"{sandbox.location}/endpoints/1",
        "modelBucket": "gs://a-project-hc-models-dev",
    }  # fmt: skip
    (tmp_path / "Pulumi.yaml").write_text("name: headcount\n")
    (tmp_path / "Pulumi.dev.yaml").write_text("config: {}\n")
    monkeypatch.chdir(tmp_path)

    def registered(folder: Path, **changed: Any) -> Result:
        monkeypatch.setattr(register_command, "outputs", lambda _: found | changed)
        command = ["register", str(folder), "--stack", "dev"]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return registered


def test_a_registered_model_is_a_release_that_can_be_served(
    register: Register, sandbox: RunningSandbox, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = register(model)
    assert done.exit_code == 0, done.stderr
    assert "pulumi up -s dev" in done.stderr
    releases = yaml.safe_load(done.stdout)["headcount:releases"]
    settings = read({"gcp:project": "a-project", "gcp:region": "europe-west4",
                     "headcount:releases": json.dumps(releases)}, "dev")  # fmt: skip
    release = settings.releases["weather"]
    assert (release.image, release.traffic) == ("build", 100)
    assert release.model.startswith(f"gs://{settings.names.model_bucket}/weather/")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", sandbox.url)
    fetched = fetch_model(release.model, tmp_path)
    for name in ("model.pt2", "contract.json"):
        assert (fetched / name).read_bytes() == (model / name).read_bytes()
    again = register(model)
    assert (again.exit_code, again.stdout) == (0, done.stdout), "the same content has the same folder"


def test_a_kill_between_the_files_is_repaired_by_the_next_registration(
    register: Register, sandbox: RunningSandbox, tmp_path: Path
) -> None:
    folder = exported_models.weather(tmp_path / "other")
    exported_models.change_contract(folder, {"origin": {"seed": 2}})
    first = yaml.safe_load(register(folder).stdout)["headcount:releases"]["weather"]["model"]
    client = storage.Client("a-project", AnonymousCredentials(), client_options={"api_endpoint": sandbox.url})  # type: ignore[no-untyped-call]
    contract = client.bucket("a-project-hc-models-dev").blob(first.partition("-dev/")[2] + "/contract.json")
    contract.delete()
    assert register(folder).exit_code == 0
    assert contract.exists()
    client.close()


def test_a_model_that_cannot_be_served_is_not_uploaded(register: Register, tmp_path: Path) -> None:
    folder = exported_models.weather(tmp_path / "damaged")
    (folder / "model.pt2").write_bytes(b"x")
    done = register(folder)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is not the program of" in done.stderr


def test_a_bucket_that_is_absent_is_told(register: Register, model: Path) -> None:
    done = register(model, modelBucket="")
    assert (done.exit_code, done.stderr) == (1, "The stack has no bucket for models yet: run `pulumi up` first.\n")
    done = register(model, modelBucket="gs://a-project-absent")
    assert done.exit_code == 1
    assert done.stderr == "gs://a-project-absent does not exist: correct the name.\n"


def test_a_bucket_that_cannot_be_reached_is_told(
    register: Register, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headcount.bucket.TRY_SECONDS", 0.1)
    done = register(model, url=f"http://127.0.0.1:{free_port()}/v1/a")
    assert done.exit_code == 1
    assert re.match(r"gs://\S+ cannot be reached: .*Connection refused", done.stderr)
    done = register(model, url="https://europe-west4-aiplatform.googleapis.com/v1/a")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "There are no Google credentials: run `gcloud auth application-default login`.\n"
