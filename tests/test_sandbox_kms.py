"""Cloud KMS and Workload Identity Federation in the sandbox, asked by Google's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google_clients import service
from googleapiclient.errors import HttpError

from sandbox.testing import RunningSandbox

READER = "roles/cloudkms.cryptoKeyDecrypter"
GITHUB = "https://token.actions.githubusercontent.com"
PROVIDER = {
    "attributeMapping": {"google.subject": "assertion.sub"},
    "attributeCondition": "assertion.repository == 'a/b'",
    "oidc": {"issuerUri": GITHUB},
}


@pytest.fixture
def rings(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "cloudkms", "v1") as client:
        yield client.projects().locations().keyRings()


@pytest.fixture
def pools(stub_sandbox: RunningSandbox) -> Iterator[Any]:
    with service(stub_sandbox, "iam", "v1") as client:
        yield client.projects().locations().workloadIdentityPools()


def refused(request: Any) -> int:
    with pytest.raises(HttpError) as error:
        request.execute()
    return int(error.value.resp.status)


def test_a_key_encrypts_until_its_versions_are_destroyed(rings: Any, project: str) -> None:
    here = f"projects/{project}/locations/europe-west4"
    ring = rings.create(parent=here, keyRingId="pulumi", body={}).execute()
    assert ring["name"] == f"{here}/keyRings/pulumi"
    assert refused(rings.create(parent=here, keyRingId="pulumi", body={})) == 409
    assert [one["name"] for one in rings.list(parent=here).execute()["keyRings"]] == [ring["name"]]
    keys = rings.cryptoKeys()
    body = {"purpose": "ENCRYPT_DECRYPT", "rotationPeriod": "7776000s", "labels": {"a": "b"}}
    key = keys.create(parent=ring["name"], cryptoKeyId="state", body=body).execute()
    assert key["primary"]["state"] == "ENABLED"
    assert key["versionTemplate"]["algorithm"] == "GOOGLE_SYMMETRIC_ENCRYPTION"
    assert keys.get(name=key["name"]).execute() == key
    changed = keys.patch(name=key["name"], updateMask="labels,rotationPeriod", body={"labels": {"a": "c"}}).execute()
    assert changed["labels"] == {"a": "c"}
    assert "rotationPeriod" not in changed
    versions = keys.cryptoKeyVersions()
    (version,) = versions.list(parent=key["name"]).execute()["cryptoKeyVersions"]
    assert versions.destroy(name=version["name"], body={}).execute()["state"] == "DESTROY_SCHEDULED"
    assert refused(versions.destroy(name=version["name"], body={})) == 400


def test_keys_that_google_refuses(rings: Any, project: str) -> None:
    here = f"projects/{project}/locations/europe-west4"
    assert refused(rings.get(name=f"{here}/keyRings/none")) == 404
    assert refused(rings.create(parent=here, keyRingId="a b", body={})) == 400
    keys, body = rings.cryptoKeys(), {"purpose": "ENCRYPT_DECRYPT"}
    assert refused(keys.create(parent=f"{here}/keyRings/none", cryptoKeyId="state", body=body)) == 404
    ring = rings.create(parent=here, keyRingId="pulumi", body={}).execute()["name"]
    hasty = body | {"rotationPeriod": "60s"}
    assert refused(keys.create(parent=ring, cryptoKeyId="state", body=hasty)) == 400
    assert refused(keys.create(parent=ring, cryptoKeyId="state", body={"purpose": "MAC"})) == 501


def test_a_key_has_a_policy(rings: Any, project: str) -> None:
    ring = rings.create(parent=f"projects/{project}/locations/europe-west4", keyRingId="pulumi", body={}).execute()
    keys, body = rings.cryptoKeys(), {"purpose": "ENCRYPT_DECRYPT"}
    key = keys.create(parent=ring["name"], cryptoKeyId="state", body=body).execute()["name"]
    policy = keys.getIamPolicy(resource=key, options_requestedPolicyVersion=3).execute()
    assert "bindings" not in policy
    policy["bindings"] = [{"role": READER, "members": ["user:a@example.com"]}]
    keys.setIamPolicy(resource=key, body={"policy": policy}).execute()
    assert keys.getIamPolicy(resource=key).execute()["bindings"] == policy["bindings"]


def test_a_pool_and_its_provider_are_kept_for_a_while_after_their_deletion(pools: Any, project: str) -> None:
    here = f"projects/{project}/locations/global"
    begun = pools.create(parent=here, workloadIdentityPoolId="workflows", body={"displayName": "Mine"}).execute()
    made = pools.operations().get(name=begun["name"]).execute()
    assert made["done"]
    pool = f"{here}/workloadIdentityPools/workflows"
    assert pools.get(name=pool).execute()["state"] == "ACTIVE"
    assert pools.get(name=pool).execute()["name"].split("/")[1].isdigit()
    assert pools.listAttestationRules(resource=pool).execute() == {}
    providers = pools.providers()
    providers.create(parent=pool, workloadIdentityPoolProviderId="github", body=PROVIDER).execute()
    name = f"{pool}/providers/github"
    providers.patch(name=name, updateMask="displayName", body={"displayName": "GitHub"}).execute()
    assert providers.get(name=name).execute()["displayName"] == "GitHub"
    assert providers.get(name=name).execute()["oidc"] == {"issuerUri": GITHUB}
    pools.delete(name=pool).execute()
    assert pools.get(name=pool).execute()["state"] == "DELETED"
    assert refused(pools.create(parent=here, workloadIdentityPoolId="workflows", body={})) == 409
    assert refused(providers.create(parent=pool, workloadIdentityPoolProviderId="other", body=PROVIDER)) == 404
    pools.undelete(name=pool, body={}).execute()
    assert "expireTime" not in pools.get(name=pool).execute()


@pytest.mark.parametrize(
    "wrong",
    [
        {"attributeCondition": ""},
        {"attributeMapping": {"attribute.repository": "assertion.repository"}},
        {"attributeMapping": {"google.subject": "assertion.sub", "attribute.Bad": "x"}},
        {"oidc": {"issuerUri": "http://issuer.example.com"}},
    ],
)
def test_providers_that_google_refuses(pools: Any, project: str, wrong: dict[str, Any]) -> None:
    here = f"projects/{project}/locations/global"
    pools.create(parent=here, workloadIdentityPoolId="workflows", body={}).execute()
    request = pools.providers().create(
        parent=f"{here}/workloadIdentityPools/workflows",
        workloadIdentityPoolProviderId="github",
        body=PROVIDER | wrong,
    )
    assert refused(request) == 400
