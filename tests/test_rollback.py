"""`headcount rollback`: the plan from recorded histories, and the runner on a Pulumi that notes what it was told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from recorded_stack import HISTORY, OUTPUTS, STATES
from typer.testing import CliRunner, Result

from headcount import history, operate_command, recovery, releases, rollback, stacks
from headcount.cli import app
from headcount.history import Period, Update, Version, deployed, periods, updates
from headcount.releases import Releases, Serving
from headcount.rollback import MESSAGE, Plan, Steps, plan, steps_of
from headcount.stacks import StackError

OLD, NEW, THIRD = (f"sha256:{letter * 64}" for letter in "abc")


def version(release: str, digest: str, traffic: int, model: str = "") -> Version:
    return Version(release, f"m@{release}", digest, model, traffic)


def story(*states: tuple[Version, ...], message: str = "") -> list[Period]:
    """A history of these states, one a day. message: of the last update."""
    found = [
        (Update(n, "update", "", f"2026-01-{n:02}T00:00:00Z", "succeeded", message * (n == len(states)), ""), state)
        for n, state in enumerate(states, 1)
    ]
    return periods(found)


def of(*versions: Version) -> Releases:
    """The releases of a stack's file that has these versions."""
    return {v.release: {"image": v.digest, "traffic": v.traffic} for v in versions}


MAIN = (version("main", OLD, 100),)
CANARY = (version("main", OLD, 90), version("next", NEW, 10))
PROMOTED = (version("main", OLD, 0), version("next", NEW, 100))
ALONE = (version("next", NEW, 100),)


def test_a_promotion_goes_back_to_the_version_before() -> None:
    found = plan("dev", story(MAIN, CANARY, PROMOTED), of(*PROMOTED))
    assert (found.release, found.redeploys) == ("main", False)
    assert {name: release["traffic"] for name, release in found.after.items()} == {"main": 100, "next": 0}
    assert "It is still deployed, so that only traffic moves." in str(found)


def test_a_canary_goes_back_to_what_served_alone() -> None:
    assert plan("dev", story(MAIN, CANARY), of(*CANARY)).release == "main"


def test_after_a_rollback_the_way_back_is_the_version_that_was_left() -> None:
    back = (version("main", OLD, 100), version("next", NEW, 0))
    assert plan("dev", story(MAIN, CANARY, PROMOTED, back), of(*back)).release == "next"


def test_an_abandoned_canary_does_not_count_as_what_served() -> None:
    before = (version("main", THIRD, 100),)
    assert plan("dev", story(before, MAIN, CANARY, MAIN), of(*MAIN)).to.digest == THIRD


def test_a_version_that_is_no_longer_deployed_is_deployed_again_beside_the_other() -> None:
    found = plan("dev", story(MAIN, CANARY, PROMOTED, ALONE), of(*ALONE))
    assert (found.release, found.redeploys) == ("previous", True)
    assert found.after == {"next": {"image": NEW, "traffic": 0}, "previous": {"image": OLD, "traffic": 100}}
    assert "about 20 minutes" in str(found)


def test_the_image_that_is_built_stays_in_the_file_and_a_taken_name_is_not_taken_again() -> None:
    first, second = (version("main", OLD, 100),), (version("main", NEW, 100),)
    built: Releases = {"main": {"image": "build", "traffic": 100}, "previous": {"image": THIRD, "traffic": 0}}
    found = plan("dev", story(first, second), built)
    assert found.release == "previous-2"
    assert found.after["main"] == {"image": "build", "traffic": 0}


def test_a_model_of_a_bucket_comes_back_with_its_image() -> None:
    first, second = ((version("main", OLD, 100, model),) for model in ("gs://b/1", "gs://b/2"))
    found = plan("dev", story(first, second), {"main": {"image": OLD, "model": "gs://b/2", "traffic": 100}})
    assert found.after["previous"] == {"image": OLD, "model": "gs://b/1", "traffic": 100}


def test_another_number_of_the_same_image_is_no_other_version() -> None:
    first = (Version("main", "m@1", OLD, "", 100),)
    second = (Version("main", "m@2", OLD, "", 100),)
    with pytest.raises(StackError, match="No other version served on stack dev before"):
        plan("dev", story(first, second), of(*second))


@pytest.mark.parametrize(
    ("found", "current", "says"),
    [
        (story(MAIN), of(*MAIN), "No other version served on stack dev before.*canary NAME 100 --image sha256:"),
        ([], {}, "Stack dev serves nothing"),
        (story(MAIN, ()), of(*MAIN), "headcount release -s dev resume"),
        (story(MAIN, PROMOTED), of(*ALONE), "the stack's file has no release main: restore the file"),
        (story((version("main", "", 100),), ALONE), of(*ALONE), "the digest of its image is not known"),
    ],
)
def test_where_there_is_no_way_back_it_says_what_to_do(found: list[Period], current: Releases, says: str) -> None:
    with pytest.raises(StackError, match=says):
        plan("dev", found, current)


def test_a_rollback_of_another_checkout_that_is_not_in_the_file_is_finished_and_not_undone() -> None:
    back = (version("main", OLD, 100), version("next", NEW, 0))
    found = story(MAIN, PROMOTED, back, message=f"{MESSAGE}m@1")
    assert plan("dev", found, of(*PROMOTED)).release == "main"
    assert plan("dev", found, of(*back)).release == "next", "it is in the file, so that this is a new one"


def test_a_recorded_history_has_a_way_back() -> None:
    found = periods(zip(updates(HISTORY), map(deployed, STATES), strict=True))
    current = {v.release: {"image": v.digest, "traffic": v.traffic} for v in found[-1].versions}
    assert plan("local", found, current).to.version == "headcount-local@1"


def step(op: str, type_: str, name: str) -> dict[str, str]:
    return {"op": op, "urn": f"urn:pulumi:dev::headcount::headcount:index:Prediction${type_}::{name}"}


def test_only_the_rollout_and_the_release_s_own_resources_belong_to_a_rollback() -> None:
    steps = [
        step("update", history.ROLLOUT, "rollout"),
        step("create", history.MODEL_VERSION, "previous"),
        step("create", "vertex:index:ReleasedImage", "previous"),
        step("create-replacement", history.MODEL_VERSION, "main"),
        step("update", "gcp:storage/bucket:Bucket", "bucket"),
        step("same", "gcp:storage/bucket:Bucket", "models"),
    ]
    urns = [one["urn"] for one in steps]
    others = ("create-replacement ModelVersion main", "update Bucket bucket")
    assert steps_of({"steps": steps}, "previous", True) == Steps(tuple(urns[:3]), others)
    moved = steps_of({"steps": steps}, "previous", False)
    assert moved == Steps((urns[0],), ("create ModelVersion previous", "create ReleasedImage previous", *others)), (
        "nothing is deployed where only traffic moves"
    )
    with pytest.raises(StackError, match="The rollout would be replaced"):
        steps_of({"steps": [step("replace", history.ROLLOUT, "rollout")]}, "main", False)


# --- the runner


class Pulumi:
    """Notes the updates that it was told to do. status: of each of them; more: further steps of each preview."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "Pulumi.local.yaml"
        self.ran: list[tuple[dict[str, int], tuple[str, ...]]] = []
        self.status = [0] * 9
        self.more: list[dict[str, str]] = []
        self.interrupt: Callable[[], None] = lambda: None

    def digest(self, stack: str, *arguments: str) -> dict[str, Any]:
        assert arguments == ("preview",)
        return {"steps": [step("update", history.ROLLOUT, "rollout"), *self.more]}

    def run(self, stack: str, *arguments: str) -> int:
        self.interrupt()
        self.ran.append((self.traffic, arguments))
        return self.status.pop(0)

    @property
    def traffic(self) -> dict[str, int]:
        return {name: release["traffic"] for name, release in releases.read("local").items()}


@pytest.fixture
def pulumi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pulumi:
    """The recorded stack, in a folder of its own: `next` serves, and `main` served before."""
    for name in ("Pulumi.yaml", "Pulumi.local.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    found = periods(zip(updates(HISTORY), map(deployed, STATES), strict=True))
    wanted = {v.release: {"image": v.digest, "traffic": v.traffic} for v in found[-1].versions}
    releases.change("local", lambda _: wanted)
    pulumi = Pulumi(tmp_path)
    monkeypatch.setattr(stacks, "digest", pulumi.digest)
    monkeypatch.setattr(stacks, "run", pulumi.run)
    monkeypatch.setattr(history, "read", lambda stack: found)
    monkeypatch.setattr(recovery, "recover", lambda stack: [])
    monkeypatch.setattr(operate_command, "_question", lambda *_: lambda endpoint: "")
    monkeypatch.setattr(operate_command, "answered_by", lambda *_: "")
    return pulumi


def roll_back(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["rollback", "local", "--yes", *arguments])


MAIN_SERVES, NEXT_SERVES = {"main": 100, "next": 0}, {"main": 0, "next": 100}


def test_it_edits_the_file_deploys_and_says_so(pulumi: Pulumi) -> None:
    run = roll_back()
    assert (run.exit_code, run.stderr) == (0, "")
    assert pulumi.ran == [
        (MAIN_SERVES, ("up", "--yes", "--skip-preview", "--message", "headcount rollback to headcount-local@1"))
    ]
    assert pulumi.traffic == MAIN_SERVES
    assert "Commit Pulumi.local.yaml" in run.stdout
    assert not list(stacks.home().glob("rollback-*"))


def test_other_changes_stay_undeployed(pulumi: Pulumi) -> None:
    pulumi.more = [step("update", "gcp:storage/bucket:Bucket", "bucket")]
    assert "    update Bucket bucket\n" in roll_back().stdout
    ((_, arguments),) = pulumi.ran
    assert arguments[-2:] == ("--target", step("", history.ROLLOUT, "rollout")["urn"])


@pytest.mark.parametrize("fails", ["the endpoint", "the deployment"])
def test_a_failure_moves_the_traffic_back_and_restores_the_file(
    fails: str, pulumi: Pulumi, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pulumi.file.read_text()
    if fails == "the endpoint":
        monkeypatch.setattr(operate_command, "answered_by", lambda *_: "it answers 500")
    else:
        pulumi.status = [255, 0]
    run = roll_back()
    assert run.exit_code == 1
    assert "The rollback failed: " in run.stdout
    assert [traffic for traffic, _ in pulumi.ran] == [MAIN_SERVES, NEXT_SERVES]
    assert pulumi.file.read_text() == before
    assert not list(stacks.home().glob("rollback-*"))


def test_a_failed_move_back_is_repeated_by_the_same_command(pulumi: Pulumi) -> None:
    pulumi.status = [255, 255, 0]
    run = roll_back()
    assert run.exit_code == 1
    assert "Repeat `headcount rollback local`" in run.stderr
    run = roll_back()
    assert run.exit_code == 1
    assert "goes on: the move back from headcount-local@1" in run.stdout
    assert [traffic for traffic, _ in pulumi.ran] == [MAIN_SERVES, NEXT_SERVES, NEXT_SERVES]
    assert pulumi.traffic == NEXT_SERVES


def test_after_an_interruption_it_goes_on_and_does_not_turn_round(
    pulumi: Pulumi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    pulumi.interrupt = stop
    run = roll_back()
    assert run.exit_code == 130
    assert "Repeat `headcount rollback local` to finish it." in run.stderr
    pulumi.interrupt = lambda: None
    monkeypatch.setattr(history, "read", lambda stack: pytest.fail("the plan is the one that was shown"))
    run = roll_back()
    assert run.exit_code == 0
    assert "it goes on: to headcount-local@1" in run.stdout
    assert pulumi.traffic == MAIN_SERVES


def test_a_file_that_was_edited_after_an_interruption_is_not_overwritten(pulumi: Pulumi) -> None:
    pulumi.status = [255, 255]
    roll_back()
    pulumi.file.write_text(pulumi.file.read_text() + "# mine\n")
    run = roll_back()
    assert run.exit_code == 1
    assert "was changed since then. Delete " in run.stderr
    assert pulumi.file.read_text().endswith("# mine\n")


def test_without_a_yes_nothing_is_changed(pulumi: Pulumi) -> None:
    before = pulumi.file.read_text()
    run = CliRunner().invoke(app, ["rollback", "local"])
    assert (run.exit_code, run.stderr) == (1, "Nothing was changed. Repeat with --yes to do it.\n")
    assert "goes back to headcount-local@1" in run.stdout
    assert (pulumi.ran, pulumi.file.read_text()) == ([], before)


# --- what it asks the endpoint


@pytest.mark.parametrize(
    ("serving", "answers", "says"),
    [
        ([Serving("1", "main", "m@1", 100)], "111", ""),
        ([Serving("1", "main", "m@1", 100)], "2121" + "111", ""),
        ([Serving("1", "main", "m@1", 100)], "2222", "deployed model 2 still answers."),
        ([Serving("1", "main", "m@1", 90)], "", "release main has 90 % of the endpoint's traffic."),
        ([], "", "release main has 0 % of the endpoint's traffic."),
    ],
)
def test_the_right_version_has_to_answer(
    serving: list[Serving], answers: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(answers)
    monkeypatch.setattr(releases, "serving", lambda outputs: serving)
    monkeypatch.setattr(stacks, "outputs", lambda stack: OUTPUTS)
    monkeypatch.setattr("headcount.endpoint.outputs", lambda stack: OUTPUTS)
    monkeypatch.setattr(operate_command, "SETTLE_PAUSE", 0.0)
    monkeypatch.setattr(operate_command, "SETTLE_SECONDS", -1.0 if "still" in says else 60.0)
    assert operate_command.answered_by("local", "main", lambda endpoint: next(said)) == says


def test_an_exported_model_needs_instances(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"serves the model gs://b/m\. Name a file with instances"):
        operate_command._question("gs://b/m", None, None)
    with pytest.raises(StackError, match="nothing to ask the endpoint with"):
        operate_command._question("", tmp_path / "nothing.jpg", None)
    broken = tmp_path / "instances.json"
    broken.write_text("{")
    with pytest.raises(StackError, match="nothing to ask the endpoint with"):
        operate_command._question("gs://b/m", None, broken)


def test_plans_are_kept_in_a_journal_as_json(pulumi: Pulumi) -> None:
    found = rollback.Rollback.of(plan("local", history.read("local"), releases.read("local")))
    found._keep()
    assert rollback.Rollback.interrupted("local") == found
    assert json.loads((stacks.home() / "rollback-local.json").read_text())["version"]["release"] == "main"
    assert isinstance(plan("local", history.read("local"), releases.read("local")), Plan)
