"""The sandbox's Model Registry keeps Vertex AI's rules for models, versions and aliases."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.testing import LOCATION, RunningSandbox

SPEC = {"imageUri": "image@sha256:" + "0" * 64, "predictRoute": "/predict", "healthRoute": "/ping"}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


@pytest.fixture
def name() -> str:
    """A model id that no other test uses."""
    return f"model-{next(_numbers)}"


def upload(sandbox: RunningSandbox, name: str, **model: Any) -> Any:
    return sandbox.do(
        "POST",
        "models:upload",
        {"modelId": name, "model": {"displayName": name, "containerSpec": SPEC, **model}},
    )


def upload_version(sandbox: RunningSandbox, name: str, **model: Any) -> Any:
    parent = f"{LOCATION}/models/{name}"
    body = {"parentModel": parent, "model": {"displayName": name, "containerSpec": SPEC, **model}}
    return sandbox.do("POST", "models:upload", body)


def versions(sandbox: RunningSandbox, name: str) -> dict[str, list[str]]:
    listed = sandbox.do("GET", f"models/{name}:listVersions")["models"]
    return {m["versionId"]: sorted(m.get("versionAliases", [])) for m in listed}


def refusal(answer: tuple[int, Any]) -> tuple[int, str]:
    status, body = answer
    assert body["error"]["code"] == status
    return status, body["error"]["status"]


def test_first_version_holds_default(sandbox: RunningSandbox, name: str) -> None:
    operation = upload(sandbox, name, versionAliases=["blue"])
    assert operation["response"]["modelVersionId"] == "1"
    assert versions(sandbox, name) == {"1": ["blue", "default"]}


def test_versions_are_read_by_number_by_alias_and_by_default(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name, versionDescription="first")
    upload_version(sandbox, name, versionDescription="second", versionAliases=["next"])
    read = {v: sandbox.do("GET", f"models/{name}{v}")["versionDescription"] for v in ("", "@1", "@2", "@next")}
    assert read == {"": "first", "@1": "first", "@2": "second", "@next": "second"}
    # Only listVersions has the version in the name.
    assert sandbox.do("GET", f"models/{name}@2")["name"].endswith(f"/models/{name}")
    listed = sandbox.do("GET", f"models/{name}:listVersions")["models"]
    assert [m["name"].rpartition("/")[2] for m in listed] == [f"{name}@1", f"{name}@2"]
    assert refusal(sandbox.ask("GET", f"models/{name}@3")) == (404, "NOT_FOUND")
    assert refusal(sandbox.ask("GET", f"models/{name}@nobody")) == (404, "NOT_FOUND")


def test_an_alias_names_one_version(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name, versionAliases=["live"])
    upload_version(sandbox, name, versionAliases=["live", "default"])
    assert versions(sandbox, name) == {"1": [], "2": ["default", "live"]}
    sandbox.do("POST", f"models/{name}@1:mergeVersionAliases", {"versionAliases": ["live", "old"]})
    assert versions(sandbox, name) == {"1": ["live", "old"], "2": ["default"]}
    sandbox.do("POST", f"models/{name}@old:mergeVersionAliases", {"versionAliases": ["-live", "-never-had"]})
    assert versions(sandbox, name) == {"1": ["old"], "2": ["default"]}


def test_default_moves_but_does_not_go(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    upload_version(sandbox, name)
    path = f"models/{name}@1:mergeVersionAliases"
    assert refusal(sandbox.ask("POST", path, {"versionAliases": ["-default"]})) == (
        400,
        "FAILED_PRECONDITION",
    )
    sandbox.do("POST", f"models/{name}@2:mergeVersionAliases", {"versionAliases": ["default"]})
    assert versions(sandbox, name) == {"1": [], "2": ["default"]}
    assert sandbox.do("GET", f"models/{name}")["versionId"] == "2"


@pytest.mark.parametrize("alias", ["1st", "Upper", "a", "ends-", "under_score", "x" * 129])
def test_aliases_follow_the_pattern(sandbox: RunningSandbox, name: str, alias: str) -> None:
    upload(sandbox, name)
    body = {"versionAliases": [alias]}
    answer = sandbox.ask("POST", f"models/{name}@1:mergeVersionAliases", body)
    assert refusal(answer) == (400, "INVALID_ARGUMENT")
    assert alias in answer[1]["error"]["message"]


@pytest.mark.parametrize("wrong", ["1digit", "-hyphen", "UPPER", "dot.dot", "x" * 64])
def test_model_ids_follow_the_pattern(sandbox: RunningSandbox, wrong: str) -> None:
    body = {"modelId": wrong, "model": {"displayName": "m", "containerSpec": SPEC}}
    assert refusal(sandbox.ask("POST", "models:upload", body)) == (400, "INVALID_ARGUMENT")


def test_an_id_is_used_once(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    body = {"modelId": name, "model": {"displayName": "m", "containerSpec": SPEC}}
    assert refusal(sandbox.ask("POST", "models:upload", body)) == (409, "ALREADY_EXISTS")


def test_a_version_needs_its_model(sandbox: RunningSandbox) -> None:
    body = {"parentModel": f"{LOCATION}/models/nobody", "model": {"displayName": "m", "containerSpec": SPEC}}
    assert refusal(sandbox.ask("POST", "models:upload", body)) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {**SPEC, "ports": [{"containerPort": 70000}]},
        {**SPEC, "predictRoute": "predict"},
        {**SPEC, "env": [{"name": "1A", "value": "x"}]},
        {**SPEC, "deploymentTimeout": "7201s"},
    ],
)
def test_container_specs_are_checked(sandbox: RunningSandbox, spec: Any) -> None:
    body = {"model": {"displayName": "m", "containerSpec": spec}}
    assert refusal(sandbox.ask("POST", "models:upload", body)) == (400, "INVALID_ARGUMENT")


def test_versions_uploaded_at_once_get_numbers_of_their_own(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    threads = [threading.Thread(target=upload_version, args=(sandbox, name)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions(sandbox, name), key=int) == [str(n) for n in range(1, 10)]


def test_updates_belong_to_the_model_or_to_the_version(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name, labels={"of": "version"})
    sandbox.do(
        "PATCH",
        f"models/{name}",
        {"displayName": "new", "labels": {"by": "model"}},
        updateMask="displayName,labels",
    )
    sandbox.do("PATCH", f"models/{name}@1", {"versionDescription": "v"}, updateMask="version_description")
    read = sandbox.do("GET", f"models/{name}@1")
    assert read["displayName"] == "new"
    assert read["versionDescription"] == "v"
    assert read["labels"] == {"of": "version", "by": "model"}  # merged, as Vertex AI answers
    body = {"displayName": "x", "versionDescription": "x"}
    for path, mask in ((f"models/{name}@1", "displayName"), (f"models/{name}", "versionDescription")):
        assert refusal(sandbox.ask("PATCH", path, body, updateMask=mask)) == (400, "FAILED_PRECONDITION")


def test_a_container_spec_does_not_change(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    body = {"containerSpec": {**SPEC, "predictRoute": "/other"}}
    for path in (f"models/{name}", f"models/{name}@1"):
        assert refusal(sandbox.ask("PATCH", path, body, updateMask="containerSpec")) == (
            400,
            "INVALID_ARGUMENT",
        )
    assert sandbox.do("GET", f"models/{name}")["containerSpec"] == SPEC


def test_an_old_etag_is_refused(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    old = sandbox.do("GET", f"models/{name}")["etag"]
    sandbox.do("PATCH", f"models/{name}", {"description": "one", "etag": old}, updateMask="description")
    answer = sandbox.ask("PATCH", f"models/{name}", {"description": "two", "etag": old}, updateMask="description")
    assert refusal(answer) == (409, "ABORTED")


def test_deleting_versions(sandbox: RunningSandbox, name: str) -> None:
    upload(sandbox, name)
    delete = f"models/{name}@{{}}:deleteVersion"
    assert refusal(sandbox.ask("DELETE", delete.format(1))) == (400, "FAILED_PRECONDITION")  # the only one
    upload_version(sandbox, name)
    assert refusal(sandbox.ask("DELETE", delete.format(1))) == (400, "FAILED_PRECONDITION")  # the default one
    sandbox.do("DELETE", delete.format(2))
    assert versions(sandbox, name) == {"1": ["default"]}
    assert upload_version(sandbox, name)["response"]["modelVersionId"] == "3"  # a number is never used again
    sandbox.do("DELETE", f"models/{name}")
    assert refusal(sandbox.ask("GET", f"models/{name}")) == (404, "NOT_FOUND")
    assert refusal(sandbox.ask("DELETE", f"models/{name}")) == (404, "NOT_FOUND")


def test_answers_name_projects_by_number_and_requests_may(sandbox: RunningSandbox, name: str) -> None:
    mine = "projects/a-project/secrets/key"
    upload(sandbox, name, containerSpec={**SPEC, "env": [{"name": "KEY", "value": mine}]})
    read = sandbox.do("GET", f"models/{name}")
    number = read["name"].split("/")[1]
    assert number.isdigit()
    assert read["containerSpec"]["env"][0]["value"] == mine  # only names change
    assert sandbox.do("GET", f"v1/{read['name']}") == read
    body = {"parentModel": read["name"], "model": {"displayName": name, "containerSpec": SPEC}}
    sandbox.do("POST", f"v1/projects/{number}/locations/europe-west4/models:upload", body)
    assert sandbox.do("GET", f"models/{name}@2")["name"] == read["name"]


def test_lists_are_filtered_ordered_and_paged(sandbox: RunningSandbox) -> None:
    for number in range(5):
        upload(sandbox, f"paged-{number}", labels={"group": "paged", "parity": "odd" if number % 2 else "even"})
    query = {"filter": "labels.group=paged", "orderBy": "create_time desc", "pageSize": 2}
    names, token = [], ""
    while True:
        page = sandbox.do("GET", "models", **query, pageToken=token)
        names += [m["displayName"] for m in page["models"]]
        if not (token := page.get("nextPageToken", "")):
            break
    assert names == [f"paged-{n}" for n in (4, 3, 2, 1, 0)]

    def found(text: str) -> list[str]:
        return [m["displayName"] for m in sandbox.do("GET", "models", filter=text).get("models", [])]

    assert found('display_name="paged-3"') == ["paged-3"]
    assert found("labels.group=paged AND labels.parity=odd") == ["paged-1", "paged-3"]
    assert found("labels:group AND displayName!=paged-0") == ["paged-1", "paged-2", "paged-3", "paged-4"]
    assert found("model=paged-2") == ["paged-2"]
    assert refusal(sandbox.ask("GET", "models", filter="artifact_uri=x")) == (400, "INVALID_ARGUMENT")
