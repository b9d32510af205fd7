"""Which answers of Vertex AI are tried again, which are waited out, and which are told at once."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import google.api_core.exceptions
import pytest
from google.cloud import aiplatform_v1

from pulumi_vertex import api, rollout
from pulumi_vertex.api import Api, PassingError, RefusedError, StoppedError, TimedOutError, Work, converge
from pulumi_vertex.definition import ProblemError
from pulumi_vertex.settings import Settings

exceptions: Any = google.api_core.exceptions  # it has no types


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "pauses", lambda: itertools.repeat(0.001))


def work(seconds: float = 30) -> Work:
    return Work("urn", seconds, threading.Event())


def steps(*what: Exception | bool) -> Any:
    left = list(what)

    def step() -> bool:
        now = left.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    step.left = left  # type: ignore[attr-defined]
    return step


def translated(error: Exception) -> Exception:
    def call() -> None:
        raise error

    with pytest.raises(ProblemError) as caught:
        Api(Settings("p", "l"))._translated(call)
    return caught.value


def test_rate_limits_pass_and_used_up_quotas_do_not() -> None:
    assert isinstance(translated(exceptions.TooManyRequests("slow down")), PassingError)
    assert isinstance(translated(exceptions.ServiceUnavailable("later")), PassingError)
    used_up = translated(exceptions.TooManyRequests("The following quotas are exceeded: CustomModelServingCPUs"))
    assert isinstance(used_up, RefusedError)
    assert "CustomModelServingCPUs" in str(used_up)
    assert isinstance(translated(exceptions.InternalServerError("oops")), RefusedError)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("PERMISSION_DENIED", "Vertex AI API has not been used in project 1 before or it is disabled."),
        ("FAILED_PRECONDITION", "Service agents are being provisioned (https://…). Please try again"),
        ("FAILED_PRECONDITION", 'There are other operations running on the Endpoint "e". Operation IDs are: [1].'),
        ("ABORTED", "anything"),
    ],
)
def test_the_refusals_of_the_list_are_waited_out(status: str, words: str) -> None:
    step = steps(*[RefusedError(status, words)] * 30, True)
    converge(work(), step)
    assert step.left == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("PERMISSION_DENIED", "Permission 'aiplatform.models.upload' denied"),
        ("FAILED_PRECONDITION", "Model server exited unexpectedly. Last log lines: operation failed"),
        ("INVALID_ARGUMENT", "bad"),
        ("NOT_FOUND", "gone"),
    ],
)
def test_every_other_refusal_is_told_at_once(status: str, words: str) -> None:
    step = steps(RefusedError(status, words), True)
    with pytest.raises(RefusedError, match=words[:20]):
        converge(work(), step)
    assert step.left == [True]


def test_a_refusal_of_the_list_is_not_waited_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 100)
    monkeypatch.setattr("pulumi_vertex.api.time.monotonic", lambda: float(next(clock)))
    step = steps(*[RefusedError("ABORTED", "x")] * 50)
    with pytest.raises(RefusedError):
        converge(work(1e9), step)
    assert len(step.left) > 30


def test_passing_faults_are_given_up_after_ten_in_a_row_and_counted_anew_after_progress() -> None:
    nine: list[Exception | bool] = [PassingError("503")] * 9
    converge(work(), steps(*nine, False, *nine, True))
    with pytest.raises(PassingError):
        converge(work(), steps(*nine, PassingError("503"), True))


def test_work_ends_with_its_timeout_and_at_cancel() -> None:
    with pytest.raises(TimedOutError, match="custom_timeouts"):
        converge(work(0.02), steps(*[False] * 10**6))
    stopped = work()
    stopped.stop.set()
    with pytest.raises(StoppedError):
        converge(stopped, steps(True))


def test_settings_come_from_the_environment_where_the_program_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_PROJECT", "from-environment")
    monkeypatch.setenv("GOOGLE_REGION", "us-central1")
    found = Settings.of({"location": "europe-west4"})
    assert (found.project, found.location) == ("from-environment", "europe-west4")
    assert found.url == "https://europe-west4-aiplatform.googleapis.com"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the general loader of keys, Google's advice
def test_a_key_that_is_no_key_is_not_quoted() -> None:
    for key in ('{"private_key": "hunter2"}', "hunter2-is-no-file"):
        with pytest.raises(ProblemError, match="gcloud auth application-default login") as failed:
            Settings("p", "l", credentials=key).authorize()
        assert "hunter2" not in str(failed.value)
    assert "hunter2" not in repr(Settings("p", "l", access_token="hunter2", credentials="hunter2"))


def deployed(**status: Any) -> Any:
    return aiplatform_v1.Endpoint(
        name="e",
        deployed_models=[{"id": "7", "status": status} if status else {"id": "7"}],
    )


def test_a_deployment_is_done_when_a_replica_is_available_or_nothing_is_said_of_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting, ready = deployed(message="starting"), deployed(available_replica_count=1)
    left = [starting, starting, ready]
    monkeypatch.setattr(rollout, "get_endpoint", lambda *_: left.pop(0))
    monkeypatch.setattr(rollout, "pauses", lambda: itertools.repeat(0.001))
    rollout._wait_until_available(work(), Api(Settings("p", "l")), "e", "7", "m@1")
    assert left == []
    left[:] = [deployed()]
    rollout._wait_until_available(work(), Api(Settings("p", "l")), "e", "7", "m@1")
    assert left == []
    monkeypatch.setattr(rollout, "get_endpoint", lambda *_: starting)
    with pytest.raises(ProblemError, match=r"no replica is available\. starting"):
        rollout._wait_until_available(work(1.1), Api(Settings("p", "l")), "e", "7", "m@1")


def test_a_deployment_without_traffic_that_is_refused_is_sent_with_all_of_it() -> None:
    sent: list[dict[str, int]] = []

    class Endpoints:
        deploy_model = None

    class Picky:
        endpoints = Endpoints()

        def call(self, _: Any, request: Any) -> Any:
            sent.append(dict(request.traffic_split))
            if not request.traffic_split:
                raise RefusedError("INVALID_ARGUMENT", "traffic_split must not be empty")
            return Picky

        class operation:  # noqa: N801
            name = "op"

    api_: Any = Picky()
    assert rollout._start_deploy(api_, "e", aiplatform_v1.DeployedModel()) == "op"
    assert sent == [{}, {"0": 100}]
