"""`headcount plan` and `headcount deploy`: what was approved is what is applied."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headcount import deployment, stacks
from headcount.cli import app
from headcount.deployment import PLAN, REVIEW, comparable, differences
from headcount.stacks import StackError

URN = "urn:pulumi:prod::headcount::headcount:index:Prediction$vertex:index:Rollout::rollout"
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
PLANNED: dict[str, Any] = {  # as Pulumi 3.260 writes it
    "manifest": {"time": "2026-11-21T23:36:09Z", "magic": "", "version": "v3.260.0"},
    "config": {"gcp:project": {"value": "my-project"}, "gcp:accessToken": {"value": {"secure": "v1:a"}}},
    "resourcePlans": {
        URN: {
            "goal": {
                "type": "vertex:index:Rollout",
                "inputDiff": {"updates": {"models": {"main": {"model": UNKNOWN, "traffic": 100, "minReplicas": 2}}}},
                "dependencies": ["urn:b", "urn:a"],
                "token": {"4dabf18193072939515e22adb298388d": "1b47", "ciphertext": "v1:x"},
            },
            "steps": ["update"],
            "seed": "Iq/vUX4ndR1Om9n64xyjlWRW4Rzib54eeQrEAU3poRE=",
            "state": {"trafficSplit": UNKNOWN},
        }
    },
}


def folder(path: Path, review: str = "Traffic moves.\n", plan: dict[str, Any] | None = PLANNED) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / REVIEW).write_text(review)
    if plan:
        (path / PLAN).write_text(json.dumps(plan))
    return path


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The plan with another value at a path below its resource."""
    plan = copy.deepcopy(PLANNED)
    place = plan["resourcePlans"][URN]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return plan


@pytest.mark.parametrize(
    "same",
    [
        PLANNED | {"manifest": {"time": "2026-11-22T01:00:00Z"}},
        changed("seed", to="other"),
        changed("state", to={"trafficSplit": {"1": 100}}),
        changed("goal", "dependencies", to=["urn:a", "urn:b"]),
        changed("goal", "token", "ciphertext", to="v1:y"),
        PLANNED | {"config": PLANNED["config"] | {"gcp:accessToken": {"value": {"secure": "v1:b"}}}},
    ],
)
def test_the_same_change_planned_later_is_the_same(same: dict[str, Any]) -> None:
    assert comparable(same) == comparable(PLANNED)


@pytest.mark.parametrize(
    "other",
    [
        changed("steps", to=["same"]),
        changed("goal", "inputDiff", "updates", "models", "main", "traffic", to=90),
        changed("goal", "inputDiff", "updates", "models", "main", "model", to="models/m@3"),
        PLANNED | {"resourcePlans": {}},
        PLANNED | {"config": {}},
    ],
)
def test_another_change_is_not(other: dict[str, Any]) -> None:
    assert comparable(other) != comparable(PLANNED)


def test_differences_are_said_by_line_and_by_resource(tmp_path: Path) -> None:
    approved = folder(tmp_path / "approved")
    assert list(differences(approved, folder(tmp_path / "same"))) == []
    now = folder(tmp_path / "now", "Traffic stays.\n", changed("steps", to=["same"]))
    said = list(differences(approved, now))
    assert {"-Traffic moves.", "+Traffic stays."} < set(said)
    assert said[-1] == "vertex:index:Rollout::rollout: approved to update, now to same"


class Pulumi:
    """Records what is deployed; `now` is written by a preview, `status` is the review's."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, ...]] = []
        self.now: dict[str, Any] = {}
        self.status = 2

    def run(self, stack: str, *arguments: str) -> int:
        self.ran.append((stack, *arguments))
        return 0

    def make(self, stack: str, to: Path) -> int:
        folder(to, **self.now)
        return self.status


@pytest.fixture
def pulumi(monkeypatch: pytest.MonkeyPatch) -> Pulumi:
    fake = Pulumi()
    monkeypatch.setattr(stacks, "run", fake.run)
    monkeypatch.setattr(deployment, "make", fake.make)
    monkeypatch.setattr(deployment, "policies", lambda: Path("infra/policy"))
    return fake


def test_what_was_approved_is_applied_with_pulumi_s_plan(pulumi: Pulumi, tmp_path: Path) -> None:
    approved = folder(tmp_path / "approved")
    assert deployment.deploy("prod", approved) == 0
    (ran,) = pulumi.ran
    assert ran[:2] == ("prod", "up")
    assert {"--skip-preview", f"--plan={approved / PLAN}", "--policy-pack=infra/policy"} <= set(ran)


def test_a_changed_world_stops_it_before_the_first_step(pulumi: Pulumi, tmp_path: Path) -> None:
    pulumi.now = {"review": "Traffic stays.\n"}
    with pytest.raises(StackError, match="was not touched") as error:
        deployment.deploy("prod", folder(tmp_path / "approved"))
    assert f"headcount plan prod {tmp_path / 'approved'}" in str(error.value)
    assert pulumi.ran == []


def test_where_nothing_changes_nothing_is_applied(pulumi: Pulumi, tmp_path: Path) -> None:
    pulumi.status = deployment.NO_CHANGE
    assert deployment.deploy("prod", folder(tmp_path / "approved")) == 0
    assert pulumi.ran == []


def test_without_a_plan_nothing_was_approved(pulumi: Pulumi, tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"mandatory policy"):
        deployment.deploy("prod", folder(tmp_path / "approved", plan=None))


def test_without_an_approval_the_present_change_is_deployed(pulumi: Pulumi) -> None:
    assert deployment.deploy("dev", None) == 0
    assert pulumi.ran == [("dev", "up", "--yes", "--policy-pack=infra/policy")]


def test_the_verbs_exit_as_they_say(pulumi: Pulumi, tmp_path: Path) -> None:
    pulumi.status = 3
    planned = CliRunner().invoke(app, ["plan", "prod", str(tmp_path / "approved")])
    assert (planned.exit_code, planned.stdout) == (3, "Traffic moves.\n")
    assert CliRunner().invoke(app, ["deploy", "prod", "--plan", str(tmp_path / "approved")]).exit_code == 0
    pulumi.now = {"review": "Traffic stays.\n"}
    refused = CliRunner().invoke(app, ["deploy", "prod", "--plan", str(tmp_path / "approved")])
    assert refused.exit_code == 1
    assert "+Traffic stays." in refused.stderr


def test_policies_without_an_environment_say_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stacks, "project_folder", lambda: tmp_path)
    with pytest.raises(StackError, match="make policy"):
        deployment.policies()
