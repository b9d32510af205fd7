"""What is decided about jobs, as pure functions: their checks, requests, diffs and results."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from google.cloud import aiplatform_v1
from vertex_plugin import IMAGE, OTHER_IMAGE, PARENT, Wire

from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import RefusedError
from pulumi_vertex.jobs import CustomJobType, TuningJobType
from pulumi_vertex.jobs.job import JobType, console
from pulumi_vertex.jobs.logs import last_line, last_lines
from pulumi_vertex.jobs.specification import LABEL
from pulumi_vertex.jobs.tuning_job import best_of, trials_of
from pulumi_vertex.ownership import mark_of
from pulumi_vertex.resource import State
from pulumi_vertex.vertex_api import VertexApi
from pulumi_vertex.wire import UNKNOWN

URN = "urn:pulumi:test::people::vertex:index:CustomJob::census"
JOB = f"{PARENT}/customJobs/123"
MINIMAL: Wire = {"image": IMAGE, "machineType": "n1-standard-4"}
EVERYTHING: Wire = {
    **MINIMAL,
    "command": ["python"],
    "args": ["-m", "training.census"],
    "env": {"A": "1", "B": "2"},
    "replicas": 3,
    "acceleratorType": "NVIDIA_L4",
    "acceleratorCount": 1,
    "bootDiskGb": 200,
    "scheduling": {"maxWaitSeconds": 600, "restartOnWorkerRestart": True, "disableRetries": True},
    "timeoutSeconds": 3600,
    "serviceAccount": "trainer@some-project.iam.gserviceaccount.com",
    "baseOutputDirectory": "gs://a-bucket/census/",
    "tensorboard": f"{PARENT}/tensorboards/7",
    "encryptionKey": "projects/p/locations/europe-west4/keyRings/r/cryptoKeys/k",
    "triggers": {"data": "17"},
    "displayName": "Census",
    "labels": {"team": "a"},
}
STUDY: Wire = {
    "metrics": [{"id": "accuracy", "goal": "MAXIMIZE"}, {"id": "loss", "goal": "MINIMIZE"}],
    "parameters": {
        "train-batch-size": {
            "type": "INTEGER", "minValue": 32, "maxValue": 512, "scaleType": "UNIT_LINEAR_SCALE",
        },
        "learning-rate": {"type": "DOUBLE", "minValue": 0.001, "maxValue": 0.1, "scaleType": "UNIT_LOG_SCALE"},
        "model": {"type": "CATEGORICAL", "categories": ["dnn", "cnn"]},
        "dprob": {"type": "DISCRETE", "values": [0.1, 0.3, 0.6]},
    },
    "maxTrials": 30,
    "parallelTrials": 2,
    "maxFailedTrials": 5,
    "algorithm": "RANDOM_SEARCH",
}  # fmt: skip
TYPES: list[JobType] = [CustomJobType(), TuningJobType()]


def failures(kind: JobType, **inputs: Any) -> dict[str, str]:
    study = {name: value for name, value in STUDY.items() if isinstance(kind, TuningJobType)}
    return dict(kind.check({**MINIMAL, **study, **inputs}))


@pytest.mark.parametrize("kind", TYPES, ids=["custom", "tuning"])
def test_a_request_says_everything_and_is_read_back_as_the_same_inputs(kind: JobType) -> None:
    tuning = isinstance(kind, TuningJobType)
    inputs = EVERYTHING | (STUDY if tuning else {})
    assert kind.check(inputs) == []
    sent = {"displayName": "Census", **kind.body(inputs, "0123456789abcdef")}
    message = aiplatform_v1.HyperparameterTuningJob if tuning else aiplatform_v1.CustomJob
    parsed: Any = message.from_json(json.dumps(sent))  # Google's own types know every field
    spec = parsed.trial_job_spec if tuning else parsed.job_spec
    assert [pool.replica_count for pool in spec.worker_pool_specs] == [1, 2]
    assert spec.base_output_directory.output_uri_prefix == "gs://a-bucket/census/0123456789abcdef"
    assert spec.scheduling.strategy.name == "FLEX_START"
    as_json = {"always_print_fields_with_no_presence": False, "use_integers_for_enums": False}
    answer = json.loads(message.to_json(parsed, **as_json))
    answer |= {"labels": {"team": "a", LABEL: "0123456789abcdef"}}
    answer["encryptionSpec"] = {"kmsKeyName": EVERYTHING["encryptionKey"]}
    there = {key: value for key, value in kind.imported(answer).items() if value}
    del inputs["triggers"]  # which only Pulumi knows
    assert there == inputs | {"baseOutputDirectory": "gs://a-bucket/census"}


def test_defaults_are_left_to_vertex_ai() -> None:
    assert CustomJobType().body(MINIMAL, "m") == {
        "jobSpec": {
            "workerPoolSpecs": [
                {
                    "machineSpec": {"machineType": "n1-standard-4"},
                    "replicaCount": "1",
                    "containerSpec": {"imageUri": IMAGE},
                }
            ]
        }
    }
    spot = CustomJobType().body({**MINIMAL, "spot": True}, "m")
    assert spot["jobSpec"]["scheduling"] == {"strategy": "SPOT"}


@pytest.mark.parametrize("kind", TYPES, ids=["custom", "tuning"])
@pytest.mark.parametrize(
    ("inputs", "path", "words"),
    [
        ({"image": "census:latest"}, "image", "must be given by digest"),
        ({"machineType": "big"}, "machineType", "a machine type such as"),
        ({"acceleratorType": "NVIDIA_L4"}, "acceleratorCount", "Give both or neither"),
        ({"env": {"AIP_X": "1"}}, "env.AIP_X", "Vertex AI's own"),
        ({"labels": {LABEL: "1"}}, f"labels.{LABEL}", "and not pulumi_job"),
        ({"baseOutputDirectory": "/tmp/x"}, "baseOutputDirectory", "gs://BUCKET/FOLDER"),
        ({"tensorboard": f"{PARENT}/tensorboards/7"}, "serviceAccount", "a tensorboard needs one"),
        ({"spot": True, "scheduling": {"maxWaitSeconds": 5}}, "scheduling.maxWaitSeconds", "does not go with spot"),
        ({"replicas": 0}, "replicas", "at least 1"),
        ({"colour": "red"}, "colour", "is not a property"),
    ],
)
def test_a_mistake_is_said_at_preview_with_its_repair(kind: JobType, inputs: Wire, path: str, words: str) -> None:
    assert words in failures(kind, **inputs)[path]


@pytest.mark.parametrize(
    ("parameter", "path", "words"),
    [
        ({"type": "REAL"}, "type", "INTEGER, DOUBLE, CATEGORICAL or DISCRETE"),
        ({"type": "DOUBLE", "minValue": 1}, "maxValue", "of type DOUBLE needs it"),
        ({"type": "DOUBLE", "minValue": 2, "maxValue": 1}, "maxValue", "at least minValue, 2, not 1"),
        ({"type": "DOUBLE", "minValue": "1", "maxValue": 2}, "minValue", "must be a number"),
        ({"type": "INTEGER", "minValue": 1.5, "maxValue": 2}, "minValue", "a whole number, not 1.5"),
        ({"type": "INTEGER", "minValue": 0, "maxValue": 2, "scaleType": "UNIT_LOG_SCALE"}, "scaleType", "above 0"),
        ({"type": "INTEGER", "minValue": 1, "maxValue": 2, "scaleType": "LOG"}, "scaleType", "UNIT_LOG_SCALE"),
        ({"type": "DISCRETE", "values": [2, 1]}, "values", "must increase"),
        ({"type": "DISCRETE", "values": [1], "categories": ["a"]}, "categories", "Leave it out"),
        ({"type": "CATEGORICAL", "categories": []}, "categories", "at least 1 items"),
        ({"type": "CATEGORICAL", "categories": ["a"], "scaleType": "UNIT_LINEAR_SCALE"}, "scaleType", "no meaning"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(parameter: Wire, path: str, words: str) -> None:
    assert words in failures(TuningJobType(), parameters={"x": parameter})[f"parameters.x.{path}"]


def test_a_study_that_makes_no_sense_is_refused() -> None:
    tuning = TuningJobType()
    assert "at most maxTrials, 30" in failures(tuning, parallelTrials=31)["parallelTrials"]
    twice = [{"id": "a", "goal": "MAXIMIZE"}, {"id": "a", "goal": "MINIMIZE"}]
    assert "a second time" in failures(tuning, metrics=twice)["metrics[1].id"]
    assert "without --" in failures(tuning, parameters={"--lr": {"type": "DOUBLE"}})['parameters["--lr"]']
    assert failures(tuning, parameters=UNKNOWN, metrics=UNKNOWN, maxTrials=UNKNOWN, image=UNKNOWN) == {}


def mark(inputs: Wire, urn: str = URN) -> str:
    return mark_of(CustomJobType.definition, urn, inputs)


@pytest.mark.parametrize(
    "change",
    [{"image": OTHER_IMAGE}, {"args": ["x"]}, {"triggers": {"data": "2"}}, {"machineType": "n1-standard-8"},
     {"timeoutSeconds": 5}, {"baseOutputDirectory": "gs://b/x"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_specification_runs_anew(change: Wire) -> None:
    assert mark(MINIMAL | change) != mark(MINIMAL)
    done = State(JOB, MINIMAL, {"state": "SUCCEEDED"})
    assert [what[-8:] for what in CustomJobType().diff(done, MINIMAL | change).values()] == ["_replace"]


@pytest.mark.parametrize(
    "change", [{"labels": {"a": "b"}}, {"displayName": "x"}, {"wait": False}, {"cancelOnInterrupt": True}]
)
def test_what_is_no_part_of_the_specification_changes_nothing_that_runs(change: Wire) -> None:
    assert mark(MINIMAL | change) == mark(MINIMAL)
    kind, done = CustomJobType(), State(JOB, MINIMAL, {"state": "SUCCEEDED"})
    assert [what[-8:] == "_replace" for what in kind.diff(done, MINIMAL | change).values()] == [False]
    late = {"labels", "displayName"} & set(change)
    assert [("runs anew" in line) for line in kind.warnings(done, MINIMAL | change)] == [True] * len(late)


def test_defaults_and_orders_are_the_same_specification() -> None:
    assert mark(MINIMAL | {"replicas": 1, "spot": False, "env": {}}) == mark(MINIMAL)
    assert mark(MINIMAL | {"env": {"A": "1", "B": "2"}}) == mark(MINIMAL | {"env": {"B": "2", "A": "1"}})
    assert mark(MINIMAL, URN + "-2") != mark(MINIMAL)


@pytest.mark.parametrize(
    ("state", "wait", "wanted"),
    [
        ("SUCCEEDED", True, {}),
        ("PARTIALLY_SUCCEEDED", True, {}),
        ("RUNNING", True, {"state": "update"}),
        ("UNSPECIFIED", True, {"state": "update"}),
        ("RUNNING", False, {}),
        ("FAILED", True, {"state": "update_replace"}),
        ("FAILED", False, {"state": "update_replace"}),
        ("CANCELLED", True, {"state": "update_replace"}),
        ("CANCELLING", True, {"state": "update_replace"}),
        ("EXPIRED", True, {"state": "update_replace"}),
    ],
)
def test_the_state_decides_whether_an_update_waits_or_runs_it_again(state: str, wait: bool, wanted: Wire) -> None:
    inputs = MINIMAL | {"wait": wait}
    assert CustomJobType().diff(State(JOB, inputs, {"state": state}), inputs) == wanted


def test_a_preview_says_where_the_model_will_be() -> None:
    api, call = VertexApi(Access("p", "l")), EngineCall(URN, 9, threading.Event())
    inputs = MINIMAL | {"baseOutputDirectory": "gs://b/census"}
    outputs = CustomJobType().preview(call, api, inputs, None)
    assert outputs["artifactUri"] == f"gs://b/census/{mark(inputs)}/model"
    assert outputs["name"] == outputs["state"] == UNKNOWN
    assert CustomJobType().preview(call, api, inputs | {"args": [UNKNOWN]}, None)["artifactUri"] == UNKNOWN
    assert CustomJobType().preview(call, api, MINIMAL, None)["artifactUri"] == ""
    tuning = TuningJobType().preview(call, api, inputs | STUDY, None)
    assert tuning["artifactUri"] == tuning["bestParameters"] == UNKNOWN
    done = State(JOB, inputs, dict.fromkeys(outputs, "x") | {"state": "SUCCEEDED"})
    assert CustomJobType().preview(call, api, inputs | {"wait": False}, done)["endTime"] == "x"


def trial(number: int, state: str = "SUCCEEDED", **metrics: Any) -> Wire:
    measured = [{"metricId": name, "value": value} for name, value in metrics.items()]
    parameters = [
        {"parameterId": "train-batch-size", "value": 128.0},
        {"parameterId": "learning-rate", "value": 0.01},
        {"parameterId": "model", "value": "cnn"},
    ]
    return {
        "id": str(number), "state": state, "parameters": parameters, "finalMeasurement": {"metrics": measured},
    }  # fmt: skip


ACCURACY = [{"metricId": "accuracy", "goal": "MAXIMIZE"}]


def test_the_best_trial_is_the_first_of_the_best_that_have_succeeded() -> None:
    job = {
        "trials": [
            trial(10, accuracy=0.99),
            trial(2, accuracy=0.99),
            trial(3, "INFEASIBLE", accuracy=1.0),
            trial(4, accuracy="NaN"),
            trial(5, accuracy=0.5),
            trial(6),
        ]
    }
    trials = trials_of(job)
    assert [t["id"] for t in trials] == ["2", "3", "4", "5", "6", "10"]
    assert best_of(trials, ACCURACY)["id"] == "2"
    assert best_of(trials, [{"metricId": "accuracy", "goal": "MINIMIZE"}])["id"] == "5"
    assert best_of(trials, [{"metricId": "other", "goal": "MAXIMIZE"}]) == {}
    assert best_of([], []) == {}
    assert trials[0]["parameters"] == {"train-batch-size": "128", "learning-rate": "0.01", "model": "cnn"}
    assert trials[2]["metrics"] == {}, "a figure that JSON has no number for is none"


def test_a_tuning_job_s_results_and_progress() -> None:
    kind = TuningJobType()
    job = {
        "studySpec": {"metrics": ACCURACY},
        "maxTrialCount": 30,
        "trials": [trial(1, accuracy=0.91), trial(2, accuracy=0.9876543), trial(3, "ACTIVE")],
    }
    found = kind.results(job, "gs://b/d/m")
    assert found["artifactUri"] == "gs://b/d/m/2/model"
    assert found["bestTrial"] == "2"
    assert found["bestParameters"]["learning-rate"] == "0.01"
    assert found["bestMetrics"] == {"accuracy": 0.9876543}
    assert kind.progress(job) == "2 of 30 trials, best accuracy 0.987654 (trial 2)"
    assert kind.results({}, "gs://b/d/m")["artifactUri"] == ""


class Log(VertexApi):
    """A log that answers with some entries, newest first, or refuses."""

    def __init__(self, *entries: Wire, error: Exception | None = None) -> None:
        super().__init__(Access("some-project", "europe-west4"))
        self.entries, self.error = list(entries), error
        self.asked: list[Wire] = []

    def log_entries(self, body: Wire) -> list[Wire]:
        self.asked.append(body)
        if self.error:
            raise self.error
        return self.entries


def test_a_job_s_log_is_read_from_its_end() -> None:
    log = Log(
        {"textPayload": "third\nfourth\n"},
        {"jsonPayload": {"message": "second"}, "labels": {"ml.googleapis.com/trial_id": "7"}},
        {"jsonPayload": {"step": 1}},
    )
    assert last_lines(log, "123", 20, "2026-01-01T00:00:00Z") == ['{"step": 1}', "trial 7: second", "third", "fourth"]
    assert last_lines(log, "123", 3, "") == ["trial 7: second", "third", "fourth"]
    assert last_line(log, "123", "") == "fourth"
    assert log.asked[0] == {
        "filter": 'resource.type="ml_job" AND resource.labels.job_id="123" AND timestamp>="2026-01-01T00:00:00Z"',
        "orderBy": "timestamp desc",
        "pageSize": 20,
    }
    assert last_line(Log(error=RefusedError("PERMISSION_DENIED", "no")), "123", "") == ""
    assert last_line(Log(), "123", "") == ""


def test_the_console_s_page_is_that_of_google_s_own_client() -> None:
    """As google-cloud-aiplatform 2.7 writes it; its import would take longer than all of these tests."""
    page = "https://console.cloud.google.com/agent-platform/locations/europe-west4/training/123?project=some-project"
    assert console(JOB) == page


class Scripted(VertexApi):
    """Lists jobs from one script and finds them in another; keeps what is changed."""

    def __init__(self, *lists: list[Wire], found: tuple[Wire | None, ...] = ()) -> None:
        super().__init__(Access("some-project", "europe-west4"))
        self.lists, self.found = list(lists), list(found)
        self.sent: list[str] = []

    def listed(self, call: EngineCall, path: str, field_name: str, **query: str) -> list[Wire]:
        return self.lists.pop(0)

    def find(self, call: EngineCall, path: str, *, version: str = "v1") -> Wire | None:
        return self.found.pop(0)

    def read(self, call: EngineCall, path: str, *, version: str = "v1", **query: str) -> Wire:
        return {"done": True}  # the operation of a deletion

    def change(self, http: str, path: str, body: Wire | None = None, *, version: str = "v1", **query: str) -> Wire:
        assert http != "POST" or self.lists == [] or path.endswith(":cancel"), "it has not looked before it starts"
        self.sent.append(f"{http} {path.rpartition('/')[2]}")
        return {"name": f"{path}/9"}


def there(number: int, state: str) -> Wire:
    return {
        "name": f"projects/77/locations/europe-west4/customJobs/{number}",
        "state": f"JOB_STATE_{state}",
        "labels": {LABEL: mark(MINIMAL)},
        "createTime": f"2026-01-01T00:00:0{number}Z",
    }


def test_a_job_starts_only_after_the_cancelled_one_has_ended() -> None:
    """Both write into the same folder."""
    api = Scripted([there(1, "CANCELLING")], [there(1, "CANCELLED")], found=(there(9, "PENDING"),))
    call = EngineCall(URN, 30, threading.Event())
    made = CustomJobType().create(call, api, MINIMAL | {"wait": False})
    assert (made.id, api.sent) == (f"{PARENT}/customJobs/9", ["POST customJobs"])


def test_of_two_jobs_with_one_mark_the_second_is_removed() -> None:
    """A request was repeated because its answer got lost, and both have arrived."""
    others = [there(2, "RUNNING"), there(1, "RUNNING"), {**there(3, "RUNNING"), "labels": {LABEL: "another"}}]
    ended = (there(2, "RUNNING"), there(2, "CANCELLED"), None)
    api = Scripted(others, found=(*ended, there(1, "RUNNING")))
    made = CustomJobType().create(EngineCall(URN, 30, threading.Event()), api, MINIMAL | {"wait": False})
    assert (made.id, api.sent) == (f"{PARENT}/customJobs/1", ["POST 2:cancel", "DELETE 2"])
    assert made.outputs["state"] == "RUNNING"
