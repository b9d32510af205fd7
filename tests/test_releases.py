"""`headcount release` changes the releases in a stack's file, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner, Result

import infra
from headcount import releases
from headcount.cli import app
from headcount.releases import BUILD
from headcount.stacks import StackError
from infra.settings import read

OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64
REPOSITORY = "europe-west4-docker.pkg.dev/p/r/headcount"
RUNNING = {"main": f"{REPOSITORY}@{OLD}"}
MAIN: releases.Releases = {"main": {"image": BUILD, "traffic": 100}}


def test_a_canary_pins_what_runs_and_builds_the_sources() -> None:
    assert releases.canary(MAIN, "next", BUILD, 10, RUNNING) == {
        "main": {"image": OLD, "traffic": 90},
        "next": {"image": BUILD, "traffic": 10},
    }


def test_a_canary_may_serve_a_model_of_a_bucket_and_others_keep_theirs() -> None:
    first: releases.Releases = {"main": {"image": OLD, "model": "gs://b/1", "traffic": 100}}
    assert releases.canary(first, "next", OLD, 10, {}, "gs://b/2") == {
        "main": {"image": OLD, "model": "gs://b/1", "traffic": 90},
        "next": {"image": OLD, "model": "gs://b/2", "traffic": 10},
    }


def test_a_canary_needs_something_that_runs() -> None:
    with pytest.raises(StackError, match="Release main was never deployed"):
        releases.canary(MAIN, "next", BUILD, 10, {})


def test_the_first_release_gets_everything() -> None:
    assert releases.canary({}, "main", OLD, 10, {}) == {"main": {"image": OLD, "traffic": 100}}


def test_a_second_canary_takes_from_all_in_their_proportions() -> None:
    three = {n: {"image": OLD, "traffic": share} for n, share in {"main": 60, "next": 30, "odd": 10}.items()}
    shares = {n: r["traffic"] for n, r in releases.canary(three, "new", NEW, 20, {}).items()}
    assert shares == {"main": 48, "next": 24, "odd": 8, "new": 20}


def test_promotion_and_rollback_are_two_numbers() -> None:
    both = releases.canary(MAIN, "next", BUILD, 10, RUNNING)
    promoted = releases.promote(both, "next")
    assert {n: r["traffic"] for n, r in promoted.items()} == {"main": 0, "next": 100}
    assert {n: r["image"] for n, r in promoted.items()} == {n: r["image"] for n, r in both.items()}
    assert {n: r["traffic"] for n, r in releases.promote(promoted, "main").items()} == {"main": 100, "next": 0}


def test_a_release_with_traffic_is_not_removed_while_there_are_others() -> None:
    both = releases.canary(MAIN, "next", BUILD, 10, RUNNING)
    with pytest.raises(StackError, match="next has 10 % of the traffic"):
        releases.remove(both, "next")
    assert list(releases.remove(releases.promote(both, "main"), "next")) == ["main"]
    assert releases.remove(MAIN, "main") == {}
    with pytest.raises(StackError, match="There is no release other; there are: main"):
        releases.promote(MAIN, "other")


VERBS = st.lists(
    st.one_of(
        st.tuples(st.just("canary"), st.sampled_from(["aa", "bb", "cc"]), st.integers(0, 100)),
        st.tuples(st.just("promote"), st.sampled_from(["aa", "bb", "cc", "main"]), st.just(0)),
        st.tuples(st.just("remove"), st.sampled_from(["aa", "bb", "cc", "main"]), st.just(0)),
    ),
    max_size=12,
)


@given(VERBS)
def test_whatever_is_done_in_whatever_order_the_settings_stay_right(verbs: list[tuple[str, str, int]]) -> None:
    current = MAIN
    running = dict.fromkeys(("aa", "bb", "cc", "main"), f"r/headcount@{OLD}")
    for verb, name, percent in verbs:
        # A refusal has a reason that can be seen in the releases.
        refused = verb != "canary" and name not in current
        refused |= verb == "remove" and name in current and current[name]["traffic"] > 0 and len(current) > 1
        try:
            if verb == "canary":
                current = releases.canary(current, name, BUILD, percent, running)
            else:
                current = {"promote": releases.promote, "remove": releases.remove}[verb](current, name)
        except StackError:
            assert refused
            continue
        assert not refused
        config = {"gcp:project": "my-project", "gcp:region": "europe-west4"}
        read(config | {"headcount:releases": json.dumps(current)}, "dev")


def test_the_word_for_an_image_that_is_built_is_the_program_s() -> None:
    assert infra.BUILD == BUILD


# The command


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("Pulumi.yaml", "Pulumi.dev.yaml", "Pulumi.prod.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headcount.release_command.outputs", lambda stack: {"images": RUNNING})
    return tmp_path


def release(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["release", *arguments])


def changed(run: Result) -> list[str]:
    """The added and removed lines of the diff that a command printed."""
    return [line for line in run.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_the_file_keeps_its_comments_and_the_diff_is_printed(checkout: Path) -> None:
    before = (checkout / "Pulumi.dev.yaml").read_text()
    run = release("-s", "dev", "canary", "next", "10")
    assert run.exit_code == 0, run.output
    assert run.stderr == "Deploy it: pulumi up -s dev\n"
    assert f"+      image: {OLD}\n+      traffic: 90\n" in run.stdout
    assert all(line.startswith("+") for line in changed(run))
    assert before.splitlines()[0] in (checkout / "Pulumi.dev.yaml").read_text()
    promoted = changed(release("-s", "dev", "promote", "next"))
    assert promoted == ["-      traffic: 90", "+      traffic: 0", "-      traffic: 10", "+      traffic: 100"]
    removed = changed(release("-s", "dev", "remove", "main"))
    assert removed == ["-    main:", f"-      image: {OLD}", "-      traffic: 0"]


def test_a_canary_of_an_image_by_digest_asks_for_nothing_that_runs(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headcount.release_command.outputs", lambda stack: pytest.fail("it asked"))
    assert f"+      image: {NEW}" in changed(release("-s", "dev", "canary", "next", "10", "--image", NEW))


def test_production_takes_the_digest_that_dev_serves_not_what_its_file_says(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer
) -> None:
    where = "projects/p/locations/europe-west4"
    found: dict[str, Any] = {
        "images": {"main": f"{REPOSITORY}@{OLD}", "next": f"{REPOSITORY}@{NEW}"},
        "models": {"main": f"{where}/models/headcount-dev@1", "next": f"{where}/models/headcount-dev@2"},
        "endpoint": f"{where}/endpoints/7",
        "url": httpserver.url_for(f"/v1/{where}/endpoints/7"),
    }
    monkeypatch.setattr(releases, "outputs", lambda stack: found)
    monkeypatch.setattr("headcount.release_command.outputs", lambda stack: found)

    def serves(**shares: int) -> None:
        # Google names the project by its number.
        models = {"main": "projects/1/locations/europe-west4/models/headcount-dev@1"}
        models["next"] = models["main"][:-1] + "2"
        deployed: list[dict[str, str]] = [{"id": n, "model": m} for n, m in models.items() if n in shares]
        for one in deployed[1:]:  # and the version in either place
            one["model"], _, one["modelVersionId"] = one["model"].partition("@")
        httpserver.clear()
        httpserver.expect_request(f"/v1/{where}/endpoints/7").respond_with_json(
            {"deployedModels": deployed, "trafficSplit": shares}
        )

    release("-s", "dev", "canary", "next", "10")
    release("-s", "dev", "promote", "next")  # written, and not deployed
    serves(main=90, next=10)
    assert f"+      image: {OLD}" in changed(release("-s", "prod", "add", "main", "--from", "dev"))
    serves(main=0, next=100)
    assert f"+      image: {NEW}" in changed(release("-s", "prod", "add", "main", "--from", "dev"))
    serves()
    run = release("-s", "prod", "add", "main", "--from", "dev")
    assert (run.exit_code, run.stderr) == (1, "Stack dev serves nothing: `pulumi up -s dev` first.\n")
    httpserver.clear()
    run = release("-s", "prod", "add", "main", "--from", "dev")
    assert run.exit_code == 1
    assert "answers 500" in run.stderr or "does not answer" in run.stderr


def test_pause_and_resume_leave_the_file_as_it_was(checkout: Path) -> None:
    before = (checkout / "Pulumi.dev.yaml").read_text()
    assert changed(release("-s", "dev", "pause")) == ["+  headcount:paused: true"]
    assert changed(release("-s", "dev", "resume")) == ["-  headcount:paused: true"]
    assert (checkout / "Pulumi.dev.yaml").read_text() == before
    assert release("-s", "dev", "resume").stdout == "nothing to change\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-s", "nowhere", "pause"], "There is no Pulumi.nowhere.yaml: `pulumi stack init nowhere` makes a stack."),
        (["-s", "dev", "promote", "next"], "There is no release next; there are: main."),
        (["-s", "dev", "canary", "next", "101"], "A canary's share is 0 to 100 percent, not 101."),
    ],
)
def test_mistakes_are_said_in_a_sentence(checkout: Path, arguments: list[str], says: str) -> None:
    before = (checkout / "Pulumi.dev.yaml").read_text()
    run = release(*arguments)
    assert (run.exit_code, run.stdout, run.stderr) == (1, "", f"{says}\n")
    assert (checkout / "Pulumi.dev.yaml").read_text() == before
