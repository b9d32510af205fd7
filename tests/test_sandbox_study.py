"""Suggestions and metrics of a study, with values."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import hypertune
import pytest

from sandbox.errors import GoogleError
from sandbox.study import arguments, check_study, final_measurement, measurements, parameters, suggest

LEARNING_RATE = {
    "parameterId": "lr",
    "doubleValueSpec": {"minValue": 0.001, "maxValue": 0.1},
    "scaleType": "UNIT_LOG_SCALE",
}
BATCH = {
    "parameterId": "batch",
    "integerValueSpec": {"minValue": "32", "maxValue": "512"},
    "scaleType": "UNIT_LINEAR_SCALE",
}
LAYERS = {"parameterId": "layers", "discreteValueSpec": {"values": [1, 2, 4]}}
MODEL = {"parameterId": "model", "categoricalValueSpec": {"values": ["cnn", "dnn"]}}
MOMENTUM = {
    "parameterId": "m",
    "doubleValueSpec": {"minValue": 0.1, "maxValue": 0.999},
    "scaleType": "UNIT_REVERSE_LOG_SCALE",
}


def study(*tuned: Any, goal: str = "MAXIMIZE", **more: Any) -> Any:
    return {"metrics": [{"metricId": "accuracy", "goal": goal}], "parameters": list(tuned), **more}


def run(spec: Any, count: int, score: Any, seed: str = "a") -> list[Any]:
    """The trials of a study, each of which reports the score of its parameters; None is a failure."""
    trials: list[Any] = []
    for _ in range(count):
        chosen = suggest(spec, trials, seed)
        if chosen is None:
            break
        value = score({p["parameterId"]: p["value"] for p in chosen})
        told: dict[str, Any] = {"parameters": chosen, "state": "INFEASIBLE"}
        if value is not None:
            final = {"metrics": [{"metricId": "accuracy", "value": value}]}
            told |= {"state": "SUCCEEDED", "finalMeasurement": final}
        trials.append(told)
    return trials


def values(trials: list[Any]) -> list[dict[str, Any]]:
    return [{p["parameterId"]: p["value"] for p in trial["parameters"]} for trial in trials]


@pytest.mark.parametrize("algorithm", ["ALGORITHM_UNSPECIFIED", "RANDOM_SEARCH"])
def test_suggestions_keep_to_their_space_and_repeat(algorithm: str) -> None:
    spec = study(LEARNING_RATE, BATCH, LAYERS, MODEL, MOMENTUM, algorithm=algorithm)
    trials = run(spec, 12, lambda v: None if v["model"] == "dnn" else v["lr"])
    for chosen in values(trials):
        assert 0.001 <= chosen["lr"] <= 0.1
        assert 32 <= chosen["batch"] <= 512
        assert chosen["batch"] == int(chosen["batch"])
        assert chosen["layers"] in (1, 2, 4)
        assert chosen["model"] in ("cnn", "dnn")
        assert 0.1 <= chosen["m"] <= 0.999
    assert values(run(spec, 12, lambda v: None if v["model"] == "dnn" else v["lr"])) == values(trials)
    assert values(run(spec, 12, lambda v: v["lr"], seed="b")) != values(trials)
    assert len({json.dumps(v) for v in values(trials)}) == 12


@pytest.mark.parametrize(("goal", "sign"), [("MAXIMIZE", -1), ("MINIMIZE", 1)])
def test_suggestions_learn_from_results(goal: str, sign: int) -> None:
    """They come nearer to the best value than a random search does, whichever way is better."""

    def distance(value: float) -> float:
        return abs(math.log10(value) + 2)

    def average(algorithm: str) -> float:
        spec = study(LEARNING_RATE, goal=goal, algorithm=algorithm)
        found = [
            v["lr"] for seed in "abc" for v in values(run(spec, 30, lambda v: sign * distance(v["lr"]), seed))[15:]
        ]
        return sum(map(distance, found)) / len(found)

    assert average("ALGORITHM_UNSPECIFIED") < 0.75 * average("RANDOM_SEARCH")


def test_a_logarithmic_scale_spreads_over_its_decades() -> None:
    found = [v["lr"] for v in values(run(study(LEARNING_RATE, algorithm="RANDOM_SEARCH"), 60, lambda v: 1.0))]
    assert 15 < sum(value < 0.01 for value in found) < 45
    found = [v["m"] for v in values(run(study(MOMENTUM, algorithm="RANDOM_SEARCH"), 60, lambda v: 1.0))]
    assert sum(value > 0.9 for value in found) > 15


def test_a_running_trial_is_not_suggested_again() -> None:
    spec = study(LAYERS, MODEL)
    first = suggest(spec, [], "a")
    assert suggest(spec, [{"parameters": first, "state": "ACTIVE"}], "a") is not None


def test_a_grid_is_searched_once() -> None:
    small = {"parameterId": "n", "integerValueSpec": {"minValue": "1", "maxValue": "2"}}
    trials = run(study(small, MODEL, LAYERS, algorithm="GRID_SEARCH"), 100, lambda v: 1.0)
    assert len(trials) == 2 * 2 * 3
    assert len({json.dumps(v) for v in values(trials)}) == 12


def test_arguments_are_as_a_command_line_takes_them() -> None:
    chosen = [{"parameterId": n, "value": v} for n, v in (("lr", 0.001), ("batch", 64.0), ("model", "cnn"), ("n", 3))]
    assert arguments(chosen) == ["--lr=0.001", "--batch=64", "--model=cnn", "--n=3"]


def test_the_digits_study_is_understood() -> None:
    """As the old guide's yaml has it."""
    integers = {"train-batch-size": (32, 512), "nfil1": (5, 20), "nfil2": (10, 30)}
    tuned: list[Any] = [
        {"parameterId": name, "integerValueSpec": {"minValue": str(low), "maxValue": str(high)}}
        for name, (low, high) in integers.items()
    ]
    tuned.append({"parameterId": "dprob", "doubleValueSpec": {"minValue": 0.1, "maxValue": 0.6}})
    check_study(study(*tuned, LEARNING_RATE))
    assert [p.name for p in parameters(study(*tuned))] == [*integers, "dprob"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"parameters": [MODEL]}, "metrics must not be empty"),
        ({"metrics": [{"metricId": "a", "goal": "GOAL_TYPE_UNSPECIFIED"}], "parameters": [MODEL]}, "needs a goal"),
        (study(), "parameters must not be empty"),
        (study(MODEL, MODEL), "there once"),
        (study({"parameterId": "x"}), "exactly one value spec"),
        (study({**MODEL, "scaleType": "UNIT_LOG_SCALE"}), "must be unset"),
        (study({"parameterId": "x", "doubleValueSpec": {"minValue": 2, "maxValue": 1}}), "greater than max_value"),
        (study({"parameterId": "x", "doubleValueSpec": {"maxValue": 1}, "scaleType": "UNIT_LOG_SCALE"}), "positive"),
        (study({"parameterId": "x", "discreteValueSpec": {"values": [2, 1]}}), "increasing order"),
        (study({"parameterId": "x", "discreteValueSpec": {"values": []}}), "at least one value"),
        (study({"parameterId": "x", "doubleValueSpec": {"maxValue": 1, "defaultValue": 1}}), "default_value"),
        (study(LEARNING_RATE, algorithm="GRID_SEARCH"), "grid search"),
        (study({**MODEL, "conditionalParameterSpecs": [{}]}), "conditionalParameterSpecs"),
        (study(MODEL, medianAutomatedStoppingSpec={}), "medianAutomatedStoppingSpec"),
    ],
)
def test_a_study_that_vertex_ai_refuses_is_refused(spec: Any, says: str) -> None:
    with pytest.raises(GoogleError, match=says):
        check_study(spec)


# ------------------------------------------------------------------------------------------------------- metrics


def test_what_googles_package_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CLOUD_ML_HP_METRIC_FILE", str(tmp_path / "below" / "output.metrics"))
    monkeypatch.setitem(os.environ, "CLOUD_ML_TRIAL_ID", "7")
    reporter = hypertune.HyperTune()
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, float("nan"))):
        reporter.report_hyperparameter_tuning_metric("accuracy", value, step)
        reporter.report_hyperparameter_tuning_metric("another", 1.0, step)
    content = (tmp_path / "below" / "output.metrics").read_text()
    reported = measurements(study(MODEL), content, "2026-01-01T00:00:00.000000Z")
    assert [(m["stepCount"], m["metrics"]) for m in reported] == [
        (str(step), [{"metricId": "accuracy", "value": value}]) for step, value in ((1, 0.5), (2, 0.9), (3, 0.7))
    ]
    last, best = (
        final_measurement(study(MODEL, goal=goal, measurementSelectionType=kind), reported)
        for goal, kind in (("MAXIMIZE", "LAST_MEASUREMENT"), ("MAXIMIZE", "BEST_MEASUREMENT"))
    )
    assert last == reported[2]
    assert best == reported[1]
    least = study(MODEL, goal="MINIMIZE", measurementSelectionType="BEST_MEASUREMENT")
    assert final_measurement(least, reported) == reported[0]


@pytest.mark.parametrize(
    "content", ["", "no JSON\n", "[1]\n", '{"accuracy": "high", "timestamp": 1}\n', '{"timestamp": 1}']
)
def test_a_file_without_a_report_has_no_measurement(content: str) -> None:
    assert measurements(study(MODEL), content, "2026-01-01T00:00:00Z") == []
    assert final_measurement(study(MODEL), []) is None
