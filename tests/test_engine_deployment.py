"""`headcount plan` and `headcount deploy` under the engine: what was approved is applied, and nothing else."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from engine_program import EngineProgram

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "policy"), pytest.mark.timeout(900)]
PROD = """\
  headcount:production: true
  headcount:minReplicas: 2
  headcount:maxReplicas: 2
  headcount:releases: {}
  headcount:pictureDays: """


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProgram]:
    with RunningSandbox() as sandbox:
        program = EngineProgram(tmp_path_factory.mktemp("deployment"), sandbox)
        program.stack_file("prod", f"{PROD}30")
        program.pulumi("stack", "init", "prod")
        yield program


def headcount(program: EngineProgram, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of the command."""
    command = [sys.executable, "-m", "headcount.cli", *arguments]
    done = subprocess.run(command, cwd=program.folder, env=program.environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_was_approved_is_applied_and_a_changed_world_stops_it(program: EngineProgram) -> None:
    assert headcount(program, "plan", "prod", "reviewed")[0] == 2
    status, said = headcount(program, "deploy", "prod", "--plan", "reviewed")
    assert status == 0, said

    program.stack_file("prod", f"{PROD}20")
    assert headcount(program, "plan", "prod", "reviewed")[0] == 2
    program.stack_file("prod", f"{PROD}10")
    program.pulumi("up", "-s", "prod", "--yes", "--skip-preview")  # somebody else
    program.stack_file("prod", f"{PROD}20")
    program.sandbox.admin("DELETE", "requests")
    status, said = headcount(program, "deploy", "prod", "--plan", "reviewed")
    assert status == 1
    assert "Stack prod was not touched" in said
    assert "-- lifecycleRules[0].condition.age: 30" in said
    assert "+- lifecycleRules[0].condition.age: 10" in said
    assert [request for request in program.sandbox.requests() if request["http"] != "GET"] == []
