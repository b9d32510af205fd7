"""The policy pack under Pulumi's engine: what breaks a rule stops production, and a clean stack passes."""

import re
from collections.abc import Iterator

import pytest
from engine_program import EngineProgram

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "policy"), pytest.mark.timeout(600)]
PACK = ("--policy-pack", "infra/policy")
PROD = """\
  headcount:production: true
  headcount:minReplicas: 2
  headcount:maxReplicas: 4
  headcount:releases: {}
"""
SERVES = 'headcount:releases: {main: {image: "sha256:' + "1" * 64 + '", traffic: 100}}'
# What nobody should add to the program.
MISTAKES = """
import pulumi_gcp as gcp

bucket = gcp.storage.Bucket("open", location="EU", force_destroy=True)
gcp.storage.BucketIAMMember("everybody", bucket=bucket.name, role="roles/storage.objectViewer", member="allUsers")
gcp.projects.IAMMember("all", project=config.project, role="roles/editor", member="user:me@example.com")
gcp.serviceaccount.Key("key", service_account_id=foundation.service_account.name)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProgram]:
    with RunningSandbox() as sandbox:
        program = EngineProgram(tmp_path_factory.mktemp("policy"), sandbox)
        program.stack_file("prod", PROD)
        program.pulumi("stack", "init", "prod")
        yield program
        program.pulumi("state", "unprotect", "--all", "-s", "prod", "--yes")
        program.pulumi("destroy", "-s", "prod", "--yes", "--skip-preview", "--remove")
        assert sandbox.violations() == []


def broken(said: str) -> dict[str, str]:
    """The level of each rule that Pulumi says is broken."""
    found = re.findall(r"- \[(advisory|mandatory)\]  ([\w-]+)  \(", said)
    return {name: level for level, name in found}


def test_a_clean_stack_passes_and_a_release_that_skips_the_canary_does_not(program: EngineProgram) -> None:
    said = program.pulumi("up", "-s", "prod", "--yes", *PACK)
    assert broken(said) == {}
    program.stack_file("prod", PROD.replace("headcount:releases: {}", SERVES))
    before = {path: path.read_bytes() for path in program.state.rglob("*") if path.is_file()}
    said = program.pulumi("preview", "-s", "prod", *PACK, fails=True)
    after = {path: path.read_bytes() for path in program.state.rglob("*") if path.is_file()}
    assert after == before, "the previewer of the bootstrap may not write the state, not even a lock"
    assert broken(said) == {"canary-first": "mandatory"}
    assert "headcount release -s prod canary next 10" in said
    program.stack_file("prod", PROD)


EVERYWHERE = ("private-buckets", "no-public-members", "no-primitive-roles", "no-service-account-keys")


def test_what_breaks_the_rules_stops_production_and_partly_other_stacks(program: EngineProgram) -> None:
    program.stack_file("stage", "  headcount:releases: {}")
    program.pulumi("stack", "init", "stage")
    main = program.folder / "infra/__main__.py"
    text = main.read_text()
    main.write_text(text + MISTAKES)
    try:
        said = {stack: program.pulumi("preview", "-s", stack, *PACK, fails=True) for stack in ("prod", "stage")}
    finally:
        main.write_text(text)
    program.pulumi("stack", "rm", "stage", "--yes")
    always = dict.fromkeys(EVERYWHERE, "mandatory")
    assert broken(said["prod"]) == always | dict.fromkeys(("labelled", "retention", "protected"), "mandatory")
    assert broken(said["stage"]) == always | dict.fromkeys(("labelled", "retention"), "advisory")
