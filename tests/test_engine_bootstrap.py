"""The bootstrap under Pulumi's engine, against the sandbox: deployed, nothing to do, destroyed."""

import json
from pathlib import Path

import httpx
import pytest
from engine_program import EngineProgram

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "policy"), pytest.mark.timeout(600)]
FOLDER = "infra/bootstrap"
SETTINGS = """\
  headcount-bootstrap:repository: my-team/headcount
  headcount-bootstrap:repositoryId: "123"
  headcount-bootstrap:ownerId: "45"
  headcount-bootstrap:environments: ["dev", "prod"]
"""


def test_bootstrap_is_deployed_then_has_nothing_to_do_and_is_destroyed(tmp_path: Path) -> None:
    with RunningSandbox("--api-delay", "1") as sandbox:
        program = EngineProgram(tmp_path, sandbox)
        program.stack_file("dev", SETTINGS, FOLDER)
        program.pulumi("stack", "init", "dev", within=FOLDER)
        said = program.pulumi("up", "-s", "dev", "--yes", "--skip-preview", "--policy-pack", "../policy", within=FOLDER)
        assert "[mandatory]" not in said
        for verb in (("up",), ("refresh",)):
            program.pulumi(*verb, "-s", "dev", "--yes", "--skip-preview", "--expect-no-changes", within=FOLDER)
        outputs = json.loads(program.pulumi("stack", "output", "-s", "dev", "--json", within=FOLDER))
        provider = "projects/headcount-local/locations/global/workloadIdentityPools/headcount/providers/github"
        assert outputs["backend"] == "gs://headcount-local-headcount-state"
        assert len(outputs["variables"]) == 12
        made = httpx.get(f"{sandbox.url}/iam/v1/{provider}").json()
        assert made["attributeCondition"].endswith("assertion.repository_owner_id == '45'")
        program.pulumi("destroy", "-s", "dev", "--yes", "--skip-preview", fails=True, within=FOLDER)  # protected
        program.pulumi("state", "unprotect", "--all", "-s", "dev", "--yes", within=FOLDER)
        program.pulumi("destroy", "-s", "dev", "--yes", "--skip-preview", "--remove", within=FOLDER)
        assert httpx.get(f"{sandbox.url}/iam/v1/{provider}").json()["state"] == "DELETED"
        assert httpx.get(f"{sandbox.url}/storage/v1/b/headcount-local-headcount-state").status_code == 404
        assert sandbox.violations() == []
