"""`headcount verify`: labelled pictures through an endpoint whose versions count differently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from headcount import releases, stacks, verify
from headcount.cli import app
from headcount.releases import Serving
from headcount.verify import Asked, Labelled, VerifyError
from sandbox.testing import RunningSandbox

MAIN, NEXT, IDLE = (
    Serving("11", "main", "m@1", 90),
    Serving("22", "next", "m@2", 10),
    Serving("33", "idle", "m@3", 0),
)


def answers(*counts: tuple[str, int], people: int = 4, times: int = 10) -> list[Asked]:
    """So many pictures, each counted by each (model, count)."""
    return [Asked(f"{n}.jpg", people, model, count, 0.01 * n) for n in range(times) for model, count in counts]


def judge(given: list[Asked], found: Any = (MAIN, NEXT), release: str = "", **more: Any) -> verify.Verdict:
    return verify.judge("dev", found, release, given, **{"tolerance": 0.05, "highest": None, **more})


def test_a_release_that_counts_as_well_is_good() -> None:
    verdict = judge(answers(("11", 5), ("22", 3)))
    assert (verdict.release, verdict.against, verdict.result, verdict.exit_code) == ("next", "main", "good", 0)
    assert (verdict.error, verdict.baseline, verdict.pictures) == (1.0, 1.0, 10)
    assert [(one.release, one.error, one.bias) for one in verdict.versions] == [("main", 1, 1), ("next", 1, -1)]


def test_a_release_that_counts_worse_ends_with_2_unless_it_is_tolerated() -> None:
    worse = answers(("11", 4), ("22", 6))
    verdict = judge(worse)
    assert (verdict.result, verdict.exit_code) == ("worse", 2)
    assert verify.text(verdict).endswith("next is worse: its count error is 2.000, that of main 0.000.\n")
    assert judge(worse, tolerance=2).exit_code == 0
    assert judge(answers(("11", 9), ("22", 9)), highest=3).result == "too high"


def test_the_comparison_is_made_on_the_pictures_that_both_counted() -> None:
    hard = [Asked(f"hard{n}.jpg", 50, "11", 0, 0.1) for n in range(10)]
    verdict = judge([*answers(("11", 4), ("22", 4)), *hard])
    assert (verdict.error, verdict.baseline, verdict.pictures) == (0, 0, 10)
    assert verdict.versions[0].error == 25
    verdict = judge([*answers(("11", 4), ("22", 4)), *(replace(one, model="22") for one in hard)])
    assert (verdict.error, verdict.pictures) == (0, 10)


def test_too_few_answers_are_no_proof() -> None:
    given = answers(("11", 4)) + answers(("22", 4), times=3)
    verdict = judge(given)
    assert (verdict.result, verdict.exit_code) == ("too few answers", 1)
    assert "next counted 3 pictures" in verdict.why
    assert judge(answers(("11", 4), ("22", 4), times=3)).exit_code == 0, "three pictures are all that were given"
    failed = [Asked("0.jpg", 4, "", None, 1.0)] * 10
    assert (judge(failed).exit_code, judge(failed).failed) == (1, 10)


def test_a_version_that_serves_alone_is_measured_and_only_a_limit_can_fail_it() -> None:
    alone = judge(answers(("11", 6)), found=[MAIN, IDLE])
    assert (alone.result, alone.exit_code, alone.against) == ("measured", 0, "")
    assert "Releases without traffic cannot be asked." in verify.text(alone)
    assert judge(answers(("11", 6)), found=[MAIN], highest=1).exit_code == 2
    assert judge(answers(("11", 6)), found=[MAIN], highest=3).result == "good"


def test_a_release_without_traffic_cannot_be_named() -> None:
    with pytest.raises(VerifyError, match=r"Release idle has no traffic.*canary idle 5"):
        verify.chosen([MAIN, IDLE], "idle")
    with pytest.raises(VerifyError, match="Release other is not deployed; there are: main, idle"):
        verify.chosen([MAIN, IDLE], "other")
    with pytest.raises(VerifyError, match="No release has traffic"):
        verify.chosen([IDLE], "")
    assert verify.chosen([MAIN, NEXT, IDLE], "") == NEXT


def test_pictures_are_asked_until_each_version_has_counted_them() -> None:
    pictures = [Labelled(Path(f"{n}.jpg"), 1) for n in range(3)]
    turn = iter(["11", "11", "11", "11", "22", "22", "22"])

    def once(picture: Labelled) -> Asked:
        return Asked(str(picture.path), 1, next(turn), 1, 0.0)

    given = verify.ask(pictures, ["11", "22"], once, 100)
    assert [one.picture for one in given] == [f"{n}.jpg" for n in (0, 1, 2, 0, 1, 2, 0)]
    turn = iter(["11"] * 9)
    assert len(verify.ask(pictures, ["11", "22"], once, 5)) == 5


def test_an_endpoint_that_never_answers_is_not_asked_for_ever() -> None:
    dead = verify.ask([Labelled(Path("a.jpg"), 1)], ["11"], lambda p: Asked("a.jpg", 1, "", None, 0.0), 10_000)
    assert len(dead) == verify.LEAST


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (95, 10), (100, 10), (1, 1)])
def test_percentiles_are_by_the_nearest_rank(percent: int, value: int) -> None:
    assert verify.percentile(range(1, 11), percent) == value


# --- labels


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve pictures; their labels in the ways that are read say one person each."""
    folder = tmp_path / "images"
    (tmp_path / "labels").mkdir()
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (80, 60), (n, n, n)).save(folder / f"{n:02}.jpg")
        (tmp_path / "labels" / f"{n:02}.txt").write_text("0 0.5 0.5 0.1 0.1\n2 0.1 0.1 0.1 0.1\n")
    (tmp_path / "people.txt").write_text("# a comment\n" + "".join(f"{n:02}.jpg = 3\n" for n in range(12)))
    return folder


def test_labels_are_yolo_s_or_a_file_of_counts(pictures: Path) -> None:
    assert {one.people for one in verify.labelled([str(pictures)], None)} == {1}
    (pictures / "00.txt").write_text("0 1 1 1 1\n0 1 1 1 1\n")
    assert verify.labelled([str(pictures / "00.jpg")], None)[0].people == 2, "beside the picture comes first"
    assert {one.people for one in verify.labelled([str(pictures)], pictures.parent / "people.txt")} == {3}


def test_a_picture_without_a_label_is_an_error_and_not_an_empty_picture(pictures: Path) -> None:
    (pictures.parent / "labels" / "03.txt").unlink()
    with pytest.raises(VerifyError, match=r"03\.jpg has no label: there is no 03\.txt"):
        verify.labelled([str(pictures)], None)
    labels = pictures.parent / "people.txt"
    labels.write_text("00.jpg=1\n")
    with pytest.raises(VerifyError, match=r"people\.txt has no line 01\.jpg=COUNT"):
        verify.labelled([str(pictures)], labels)
    labels.write_text("00.jpg: one\n")
    with pytest.raises(VerifyError, match=r"line 1: '00\.jpg: one' is not NAME=COUNT"):
        verify.labelled([str(pictures)], labels)
    with pytest.raises(VerifyError, match=r"There is no picture .*nothing\.jpg"):
        verify.labelled(["nothing.jpg"], None)


def test_a_sample_is_spread_over_all_pictures() -> None:
    all_ = [Labelled(Path(str(n)), n) for n in range(100)]
    assert [one.people for one in verify.spread(all_, 4)] == [0, 25, 50, 75]
    assert verify.spread(all_[:2], 4) == all_[:2]


# --- the command, against an endpoint with two versions


@pytest.fixture
def stack(stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> RunningSandbox:
    """A stack whose release main counts 1 and whose release next counts 3, each with half of the traffic."""
    here = stub_sandbox.project(project)
    image = "image@sha256:" + "0" * 64
    models = {}
    for name, count in (("main", 1), ("next", 3)):
        env = [{"name": "STUB_COUNT", "value": str(count)}]
        spec = {"imageUri": image, "predictRoute": "/p", "healthRoute": "/h", "env": env}
        here.do("POST", "models:upload", {"modelId": name, "model": {"displayName": name, "containerSpec": spec}})
        models[name] = f"{here.location}/models/{name}@1"
    here.do("POST", "endpoints", {"displayName": "e"}, endpointId="5")
    resources = {"minReplicaCount": 1, "machineSpec": {"machineType": "c3-highcpu-4"}}
    for number, split in (("1", {"0": 100}), ("2", {"0": 50, "1": 50})):
        model = {"id": number, "model": models["main" if number == "1" else "next"], "dedicatedResources": resources}
        here.do("POST", "endpoints/5:deployModel", {"deployedModel": model, "trafficSplit": split})
    endpoint = f"{here.location}/endpoints/5"
    found = {"endpoint": endpoint, "url": f"{here.url}/v1/{endpoint}", "maxRequestBytes": 10**6, "models": models}
    monkeypatch.setattr(stacks, "outputs", lambda stack: found)
    monkeypatch.setattr("headcount.endpoint.outputs", lambda stack: found)
    return here


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", "dev", *map(str, arguments)])


def test_a_promotion_can_be_gated_by_the_exit_code(stack: RunningSandbox, pictures: Path) -> None:
    worse = run(pictures, "--release", "next", "--json")
    assert worse.exit_code == 2, worse.output
    said = json.loads(worse.stdout)
    assert (said["release"], said["against"], said["error"], said["baseline"]) == ("next", "main", 2.0, 0.0)
    assert {one["release"]: one["pictures"] for one in said["versions"]} == {"main": 12, "next": 12}
    assert all(one["p95"] >= one["p50"] > 0 for one in said["versions"])
    better = run(pictures, "--labels", pictures.parent / "people.txt", "--release", "next")
    assert better.exit_code == 0, better.output
    assert better.stdout.endswith("next is good.\n")


def test_an_endpoint_that_fails_or_a_wrong_name_ends_with_1(
    stack: RunningSandbox, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headcount.counters.PAUSES", ())
    stack.fault("endpoints.predict", "status", code=500, count=100)
    try:
        failed = run(pictures)
    finally:
        stack.clear_faults()
    assert failed.exit_code == 1
    assert "10 of 10 requests were not answered." in failed.stdout
    wrong = run(pictures, "--release", "other")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr == "Release other is not deployed; there are: main, next.\n"


def test_the_endpoint_s_shares_are_by_release(stack: RunningSandbox) -> None:
    found = stacks.outputs("dev")
    assert {one.release: one.traffic for one in releases.serving(found)} == {"main": 50, "next": 50}
