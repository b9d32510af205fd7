"""`headcount drift`: recorded refreshes and policies, as findings and as a report."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from recorded_stack import ENDPOINT, HISTORY, OUTPUTS, REFRESH, STATES
from typer.testing import CliRunner
from werkzeug import Request, Response

from headcount import audit, drift, stacks
from headcount.cli import app
from headcount.drift import Author, Change, Finding
from headcount.google import Place
from headcount.stacks import StackError

STATE = STATES[-1]
BUCKET = "headcount-local-headcount-local"
AGENT = "serviceAccount:service-710038136567@gcp-sa-aiplatform.iam.gserviceaccount.com"
SERVING = "serviceAccount:headcount-local@headcount-local.iam.gserviceaccount.com"


def changes() -> dict[str, list[str]]:
    return {str(one): list(map(str, one.changes)) or [one.kind] for one in drift.findings(REFRESH, "local")}


def test_a_recorded_refresh_is_said_in_words() -> None:
    assert changes() == {
        "API headcount-local/iam.googleapis.com": ["missing"],
        "endpoint endpoints/970367916": ["description is mine; it was Counts people; stack local"],
        f"bucket {BUCKET}": [
            'lifecycleRules is gone; it was [{"action": {"storageClass": "", "type": "Delete"}, "condition": {"ag…',
            "publicAccessPrevention is inherited; it was enforced",
        ],
        "access to the repository repositories/headcount-local/roles/artifactregistry.reader/" + AGENT: ["missing"],
        "model version models/headcount-local@1": ['aliases is gone; it was ["main"]'],
        "model version models/headcount-local@2": ["labels.stack is gone; it was local"],
        "rollout rollout": [
            "release main: traffic is 30; it was 0",
            "release next: maxReplicas is 3; it was 1",
            "release next: traffic is 70; it was 100",
        ],
    }


def test_a_release_that_is_gone_is_named() -> None:
    assert str(Change("models.next", "removed", 1, None)) == "release next is gone; it was 1"


def test_resources_that_did_not_change_are_no_findings() -> None:
    assert any(step["op"] == "refresh" for step in REFRESH["steps"])
    assert drift.findings({"steps": []}, "dev") == []


def test_what_the_next_up_does_is_listed_without_reads() -> None:
    urn = "urn:pulumi:dev::headcount::headcount:index:Foundation$gcp:storage/bucket:Bucket::bucket"
    steps = [{"op": op, "urn": urn} for op in ("same", "read", "refresh", "update")]
    assert drift.pending({"steps": steps}) == ["update bucket bucket"]


@pytest.mark.parametrize(
    ("path", "value"),
    [("a.b", 1), ("list[1].c", 2), ('a["x.y"]', 3), ("nothing", None), ("list[7]", None), ("a.b.c", None)],
)
def test_property_paths_of_pulumi_lead_to_values(path: str, value: object) -> None:
    assert drift.at({"a": {"b": 1, "x.y": 3}, "list": [0, {"c": 2}]}, path) == value


@settings(max_examples=25)
@given(
    st.text(),
    st.recursive(st.none() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)),
)
def test_no_path_and_no_value_breaks_it(path: str, value: Any) -> None:
    drift.at(value, path)
    assert "\n" not in str(Change(path.replace("\n", ""), "changed", value, value))


def test_a_secret_is_never_shown() -> None:
    secret = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270", "ciphertext": "v1:abc"}
    step = {
        "op": "update", "urn": "urn:pulumi:dev::headcount::vertex:index:ModelVersion::main",
        "detailedDiff": {"env.KEY": {"kind": "update"}},
        "oldState": {"type": "vertex:index:ModelVersion", "id": "a", "inputs": {"env": {"KEY": secret}}},
        "newState": {"outputs": {"env": {"KEY": secret}}},
    }  # fmt: skip
    written = drift.json_text(drift.findings({"steps": [step]}, "dev"), [], "dev")
    assert "ciphertext" not in written
    assert "env.KEY is [secret]; it was [secret]" in drift.text(drift.findings({"steps": [step]}, "dev"), [], "dev")


# --- what others added


def test_grants_that_the_stack_did_not_make_are_foreign() -> None:
    found = {one.id: one for one in drift.guarded(STATE)}
    bucket = found[BUCKET]
    every = {"role": "roles/storage.legacyBucketOwner", "members": ["projectOwner:710038136567"]}
    ours = {"role": "roles/storage.objectViewer", "members": [SERVING]}
    assert drift.foreign_grants(bucket, {"bindings": [every, ours]}) == []
    theirs = {"role": "roles/storage.objectViewer", "members": [SERVING, "allUsers"]}
    (one,) = drift.foreign_grants(bucket, {"bindings": [every, theirs]})
    assert str(one.changes[0]) == "roles/storage.objectViewer for allUsers was added: granted"
    assert one.repair == (
        f"gcloud storage buckets remove-iam-policy-binding gs://{BUCKET} --member allUsers --role "
        "roles/storage.objectViewer"
    )
    owner = {"role": "roles/storage.admin", "members": ["projectOwner:710038136567"]}
    assert len(drift.foreign_grants(bucket, {"bindings": [owner]})) == 1, "not one that every bucket has"


def test_every_resource_with_a_policy_is_read_where_google_has_it() -> None:
    google, sandbox = Place("p", "europe-west4"), Place("p", "europe-west4", "http://127.0.0.1:8790")
    guarded = [one for one in drift.guarded(STATE) if "-hc-models-" not in one.id]
    addresses = {one.type: drift.addressed(google, one) for one in guarded}
    base = "projects/headcount-local"
    assert addresses == {
        "gcp:storage/bucket:Bucket": ("GET", f"https://storage.googleapis.com/storage/v1/b/{BUCKET}/iam"),
        "gcp:artifactregistry/repository:Repository": (
            "GET",
            f"https://artifactregistry.googleapis.com/v1/{base}/locations/europe-west4/repositories/headcount-local"
            ":getIamPolicy",
        ),
        "gcp:serviceaccount/account:Account": (
            "POST",
            f"https://iam.googleapis.com/v1/{base}/serviceAccounts/headcount-local@headcount-local.iam.gserviceaccount"
            ".com:getIamPolicy",
        ),
        "gcp:vertex/aiEndpoint:AiEndpoint": (
            "POST",
            f"https://europe-west4-aiplatform.googleapis.com/v1beta1/{ENDPOINT}:getIamPolicy",
        ),
    }
    assert drift.addressed(sandbox, drift.guarded(STATE)[0])[1].startswith("http://127.0.0.1:8790/")


def test_a_model_that_others_deployed_is_foreign() -> None:
    ours = next(one for one in STATE["resources"] if one["type"] == "vertex:index:Rollout")["outputs"]["deployedModels"]
    deployed = [{"id": id_, "model": "projects/1/locations/r/models/m"} for id_ in (*ours.values(), "77")]
    (one,) = drift.foreign_models(STATE, {"deployedModels": deployed})
    assert str(one.changes[0]) == "deployed model 77 was added: models/m"
    assert one.repair.startswith("gcloud ai endpoints undeploy-model 970367916 --region europe-west4")


# --- who changed it


def test_the_audit_log_is_asked_for_each_kind_of_resource() -> None:
    filters = {str(one): audit.wanted(one, "p", "2026-01-01T00:00:00Z") for one in drift.findings(REFRESH, "local")}
    ends = {name: text.rpartition(" AND ")[2] for name, text in filters.items()}
    has = 'protoPayload.resourceName:"{}"'.format
    assert ends == {
        "API headcount-local/iam.googleapis.com": f"({has('iam.googleapis.com')})",
        "endpoint endpoints/970367916": f"({has('endpoints/970367916')})",
        f"bucket {BUCKET}": f"({has(f'buckets/{BUCKET}')})",
        "access to the repository repositories/headcount-local/roles/artifactregistry.reader/" + AGENT: (
            f"({has('repositories/headcount-local')})"
        ),
        "model version models/headcount-local@1": f"({has('models/headcount-local')})",
        "model version models/headcount-local@2": f"({has('models/headcount-local')})",
        "rollout rollout": f"({has('endpoints/970367916')})",
    }
    assert all('timestamp>"2026-01-01T00:00:00Z"' in text for text in filters.values())


def test_the_author_is_in_the_entry_as_google_writes_it() -> None:
    # Shortened from https://cloud.google.com/logging/docs/audit/understanding-audit-logs
    entry = {
        "protoPayload": {
            "@type": "type.googleapis.com/google.cloud.audit.AuditLog",
            "authenticationInfo": {"principalEmail": "user@example.com"},
            "methodName": "storage.setIamPermissions",
            "resourceName": "projects/_/buckets/b",
        },
        "timestamp": "2026-11-21T12:00:00.123456Z",
    }
    who = Author("user@example.com", "storage.setIamPermissions", "2026-11-21T12:00:00.123456Z")
    assert audit.author(entry) == who
    assert audit.author({"protoPayload": {"authenticationInfo": {}}}).who == "a caller without a name"
    finding = Finding("u::x", "gcp:storage/bucket:Bucket", "b", "missing", (), "repair", who)
    said = drift.text([finding], [], "dev")
    assert "    last changed by user@example.com at 2026-11-21T12:00:00Z, storage.setIamPermissions\n" in said


# --- the command


@pytest.fixture
def cloud(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stack whose Pulumi gives recorded answers, and whose Google is a server without foreign grants."""
    answers: dict[str, Any] = {"refresh": {"steps": []}, "preview": {"steps": []}, "log": {}, "policy": {}}
    answers["outputs"] = OUTPUTS | {"url": httpserver.url_for(f"/v1/{ENDPOINT}")}

    def said(request: Request) -> Response:
        kind = "log" if "entries:list" in request.path else "endpoint" if request.path.endswith(ENDPOINT) else "policy"
        status, body = answers.get(kind, {}).get("status", 200), answers.get(kind, {})
        return Response(json.dumps(body), status, content_type="application/json")

    httpserver.expect_request(re.compile(".*")).respond_with_handler(said)

    def digest(stack: str, command: str, *more: str) -> Any:
        found = answers[command]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(stacks, "outputs", lambda stack: answers["outputs"])
    monkeypatch.setattr(stacks, "digest", digest)
    exports = {"export": {"deployment": STATE}, "history": HISTORY[:1]}
    monkeypatch.setattr(stacks, "pulumi", lambda stack, *arguments: json.dumps(exports[arguments[1]]))
    return answers


def test_without_drift_it_ends_with_0_and_says_what_the_next_up_does(cloud: dict[str, Any]) -> None:
    run = CliRunner().invoke(app, ["drift", "local"])
    assert (run.exit_code, run.stderr) == (0, "")
    assert run.stdout == "Stack local does not drift: the world is as its state says.\n"
    urn = "urn:pulumi:dev::headcount::gcp:storage/bucket:Bucket::bucket"
    cloud["preview"] = {"steps": [{"op": "update", "urn": urn}]}
    run = CliRunner().invoke(app, ["drift", "local"])
    assert run.exit_code == 0
    assert run.stdout.endswith("file changed:\n    update bucket bucket\n")


def test_drift_ends_with_2_and_names_repair_and_author(cloud: dict[str, Any]) -> None:
    cloud["refresh"] = REFRESH
    payload = {"authenticationInfo": {"principalEmail": "ann@example.com"}, "methodName": "m"}
    cloud["log"] = {"entries": [{"timestamp": "2026-11-21T12:00:00Z", "protoPayload": payload}]}
    run = CliRunner().invoke(app, ["drift", "local"])
    assert run.exit_code == 2
    assert run.stdout.startswith("Stack local drifts: 7 differences")
    assert run.stdout.count("last changed by ann@example.com") == 7
    assert run.stdout.endswith("To repair it:\n    pulumi up --refresh -s local\n")
    said = json.loads(CliRunner().invoke(app, ["drift", "local", "--json"]).stdout)
    assert [one["author"]["who"] for one in said["drift"]] == ["ann@example.com"] * 7
    assert said["drift"][0].keys() >= {"urn", "type", "id", "resource", "kind", "changes", "repair"}


def test_an_audit_log_that_cannot_be_read_is_no_error(cloud: dict[str, Any]) -> None:
    cloud["refresh"], cloud["log"] = REFRESH, {"status": 403, "error": {"message": "Not you."}}
    run = CliRunner().invoke(app, ["drift", "local"])
    assert run.exit_code == 2
    assert "Who changed it is not known: " in run.stdout
    assert "answers 403: Not you." in run.stdout


def test_a_policy_that_cannot_be_read_leaves_the_answer_open(cloud: dict[str, Any]) -> None:
    cloud["policy"] = {"status": 403, "error": {"message": "Not you."}}
    run = CliRunner().invoke(app, ["drift", "local"])
    assert run.exit_code == 1
    assert run.stderr.count("Not compared: ") == len(drift.guarded(STATE))
    cloud["refresh"] = REFRESH
    assert CliRunner().invoke(app, ["drift", "local"]).exit_code == 2


def test_errors_of_pulumi_end_with_1(cloud: dict[str, Any]) -> None:
    cloud["preview"] = StackError("a setting is wrong")
    run = CliRunner().invoke(app, ["drift", "local"])
    assert (run.exit_code, run.stderr) == (1, "The next `pulumi up` fails: a setting is wrong\n")
    cloud["refresh"] = StackError("no credentials")
    run = CliRunner().invoke(app, ["drift", "local"])
    assert (run.exit_code, run.stdout, run.stderr) == (1, "", "no credentials\n")
