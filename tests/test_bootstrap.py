"""The bootstrap under Pulumi's mocks: who may become which account, and what each may do."""

import asyncio
import json
import runpy
from typing import Any

import pulumi
import pytest

from infra.bootstrap import settings as bootstrap

CONFIG = {
    "gcp:project": "my-project",
    "gcp:region": "europe-west4",
    "headcount-bootstrap:repository": "my-team/headcount",
    "headcount-bootstrap:repositoryId": "123",
    "headcount-bootstrap:ownerId": "45",
    "headcount-bootstrap:environments": '["dev", "qa"]',
}
READ_ONLY = ("browser", "Viewer", "viewer", "reader", "securityReviewer", "cryptoKeyDecrypter", "objectViewer")


class Recorder(pulumi.runtime.Mocks):
    def __init__(self) -> None:
        self.asked: list[pulumi.runtime.MockResourceArgs] = []

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str, dict[str, Any]]:
        self.asked.append(args)
        outputs = dict(args.inputs)
        match args.typ.rpartition(":")[2]:
            case "Account":
                email = f"{args.inputs['accountId']}@my-project.iam.gserviceaccount.com"
                outputs |= {"email": email, "name": f"accounts/{email}", "member": f"serviceAccount:{email}"}
            case "Bucket":
                outputs |= {"url": f"gs://{args.inputs['name']}"}
            case "WorkloadIdentityPool":
                outputs |= {"name": "projects/42/locations/global/workloadIdentityPools/headcount"}
            case "WorkloadIdentityPoolProvider":
                outputs |= {"name": "projects/42/locations/global/workloadIdentityPools/headcount/providers/github"}
        return f"{args.name}_id", outputs

    def call(self, args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]]]:
        return {"accessToken": "ya29.token"}, []

    def inputs(self, kind: str) -> list[dict[str, Any]]:
        return [a.inputs for a in self.asked if a.typ.endswith(f":{kind}")]


def run(monkeypatch: pytest.MonkeyPatch, **more: str) -> tuple[Recorder, dict[str, Any]]:
    async def usable(*_: object) -> None: ...

    async def number(*_: object) -> str:
        return "42"

    monkeypatch.setattr("infra.apis.until_usable", usable)
    monkeypatch.setattr("infra.apis.project_number", number)
    config = CONFIG | {f"headcount-bootstrap:{key}": value for key, value in more.items()}
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    recorder, outputs = Recorder(), dict[str, Any]()
    asyncio.set_event_loop(asyncio.new_event_loop())
    pulumi.runtime.set_mocks(recorder, project="headcount-bootstrap", stack="dev", preview=False)
    monkeypatch.setattr(pulumi, "export", outputs.__setitem__)

    @pulumi.runtime.test  # type: ignore[untyped-decorator]
    def whole() -> pulumi.Output[Any]:
        runpy.run_module("infra.bootstrap.__main__")
        return pulumi.Output.all(**outputs).apply(outputs.update)

    whole()
    return recorder, outputs


def test_the_previewer_can_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = run(monkeypatch)
    email = "serviceAccount:headcount-previewer@my-project.iam.gserviceaccount.com"
    kinds = ("IAMMember", "BucketIAMMember", "CryptoKeyIAMMember")
    roles = [one["role"] for kind in kinds for one in recorder.inputs(kind) if one["member"] == email]
    assert len(roles) == 10
    assert not [role for role in roles if not role.endswith(READ_ONLY)]


def test_a_job_becomes_an_account_by_its_branch_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, _ = run(monkeypatch)
    pool = "principalSet://iam.googleapis.com/projects/42/locations/global/workloadIdentityPools/headcount"
    federated = [one for one in recorder.inputs("IAMMember") if one["role"] == "roles/iam.workloadIdentityUser"]
    assert {one["serviceAccountId"].split("@")[0]: one["member"] for one in federated} == {
        "accounts/headcount-previewer": f"{pool}/attribute.access/preview",
        "accounts/headcount-deployer": f"{pool}/attribute.access/deploy",
    }
    (provider,) = recorder.inputs("WorkloadIdentityPoolProvider")
    assert provider["attributeCondition"] == (
        "assertion.repository == 'my-team/headcount' && assertion.repository_id == '123' && "
        "assertion.repository_owner_id == '45'"
    )
    assert provider["attributeMapping"]["attribute.access"] == (
        "assertion.ref == 'refs/heads/main' && has(assertion.environment) && "
        "assertion.environment in ['dev', 'qa'] ? 'deploy' : 'preview'"
    )
    assert provider["oidc"] == {"issuerUri": "https://token.actions.githubusercontent.com"}


def test_the_state_is_private_versioned_and_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, outputs = run(monkeypatch)
    (bucket,) = recorder.inputs("Bucket")
    assert bucket["publicAccessPrevention"] == "enforced"
    assert bucket["uniformBucketLevelAccess"] is True
    assert bucket["versioning"] == {"enabled": True}
    assert "retentionPolicy" not in bucket, "it would refuse to overwrite the state"
    assert bucket["softDeletePolicy"] == {"retentionDurationSeconds": 30 * 24 * 3600}
    (rule,) = bucket["lifecycleRules"]
    assert rule["condition"] == {"numNewerVersions": 50, "daysSinceNoncurrentTime": 90, "withState": "ARCHIVED"}
    assert outputs["backend"] == "gs://my-project-headcount-state"
    assert outputs["secretsProvider"] == "gcpkms://state_id"


def test_the_workflows_are_told_by_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    _, outputs = run(monkeypatch)
    commands = outputs["variables"]
    assert len(commands) == 2 * 2 * 3
    account = "headcount-{}@my-project.iam.gserviceaccount.com"
    assert f"gh variable set GCP_SERVICE_ACCOUNT --env dev --body {account.format('deployer')}" in commands
    assert f"gh variable set GCP_SERVICE_ACCOUNT --env preview-dev --body {account.format('previewer')}" in commands


def test_on_gitlab_the_claims_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, outputs = run(monkeypatch, forge="gitlab", repository="group/sub/headcount")
    (provider,) = recorder.inputs("WorkloadIdentityPoolProvider")
    assert "assertion.project_path == 'group/sub/headcount'" in provider["attributeCondition"]
    assert provider["attributeMapping"]["attribute.access"].startswith(
        "assertion.ref_type == 'branch' && assertion.ref"
    )
    assert outputs["variables"][0].startswith("glab variable set")


@pytest.mark.parametrize(
    ("changed", "repair"),
    [
        ({"gcp:project": ""}, "pulumi config set gcp:project my-project -s dev"),
        ({"headcount-bootstrap:repositoryId": "me"}, "gh api repos/OWNER/NAME --jq .id"),
        ({"headcount-bootstrap:repository": "headcount"}, "set headcount-bootstrap:repository my-team/headcount"),
        ({"headcount-bootstrap:environments": "[]"}, 'headcount-bootstrap:environments: ["prod"]'),
        ({"headcount-bootstrap:repo": "x"}, "pulumi config rm headcount-bootstrap:repo -s dev"),
        ({"headcount-bootstrap:branch": "main'"}, "set headcount-bootstrap:branch"),
    ],
)
def test_wrong_settings_say_how_to_repair_them(changed: dict[str, str], repair: str) -> None:
    with pytest.raises(pulumi.RunError) as error:
        bootstrap.read(CONFIG | changed, "dev")
    assert repair in str(error.value)
    assert "is missing" not in str(error.value)


def test_a_setting_that_is_not_there_is_missing_and_settings_of_others_are_ignored() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "headcount-bootstrap:ownerId"}
    with pytest.raises(
        pulumi.RunError, match=r"^Stack dev cannot be deployed:\n  headcount-bootstrap:ownerId is missing"
    ):
        bootstrap.read(config | {"gcp:zone": "europe-west4-a", "headcount:releases": "{}"}, "dev")
