"""The sandbox runs jobs in real containers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import docker
import hypertune.hypertune
import images
import pytest
from docker.models.containers import Container
from google_clients import storage_client
from helpers import eventually
from sandbox_jobs import container, create, entries, finished, job, messages, pool, state

from sandbox.runner import LABEL
from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.slow

BUCKET = "a-bucket-of-jobs"
# What a job says about itself, as one line of JSON.
CIRCUMSTANCES = """
import json, os, pathlib, sys, urllib.request
storage = os.environ["STORAGE_EMULATOR_HOST"] + "/storage/v1/b/a-bucket-of-jobs/o/data%2Fin.txt?alt=media"
print(json.dumps({"message": "here", "severity": "NOTICE", "env": dict(os.environ), "argv": sys.argv[1:],
                  "cpus": len(os.sched_getaffinity(0)), "host": os.uname().nodename,
                  "fetched": urllib.request.urlopen(storage).read().decode(),
                  "read": pathlib.Path("/gcs/a-bucket-of-jobs/data/in.txt").read_text()}), flush=True)
out = pathlib.Path("/gcs/a-bucket-of-jobs/out/model")
out.mkdir(parents=True)
(out / "weights").write_bytes(b"trained")
pathlib.Path("/gcs/a-bucket-of-jobs/old.txt").unlink()
"""
# The primary replica waits for a word of its worker, over the network of the job.
PRIMARY = """
import json, os, socket
spec = json.loads(os.environ["CLUSTER_SPEC"])
host, port = spec["cluster"][spec["task"]["type"]][0].split(":")
with socket.create_server((host, int(port))) as server:
    print("heard", server.accept()[0].makefile().readline().strip(), flush=True)
"""
WORKER = """
import json, os, socket, time
spec = json.loads(os.environ["CLUSTER_SPEC"])
host, port = spec["cluster"]["workerpool0"][0].split(":")
for _ in range(300):
    try:
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(f"worker {spec['task']['index']}\\n".encode())
        break
    except OSError:
        time.sleep(0.1)
time.sleep(600)
"""
# Ends well when it is told to, and counts until then. Its counter survives in the bucket.
PATIENT = """
import pathlib, signal, sys, time
def leave(*_):
    print("told to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
file, stop = (pathlib.Path("/gcs/a-bucket-of-jobs") / name for name in sys.argv[1:])
number = int(file.read_text()) if file.exists() else 0
while not stop.exists():
    number += 1
    print("count", number, flush=True)
    file.write_text(str(number))
    time.sleep(0.1)
"""
FAILING = "import sys; print('loading', flush=True); sys.exit('no rows')"


@pytest.fixture(scope="module")
def sandbox(
    docker_engine: docker.DockerClient, tiny_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSandbox]:
    with RunningSandbox("--registry-port", "0", runner="docker", state=tmp_path_factory.mktemp("state")) as running:
        with storage_client(running, "a-project") as client:
            client.create_bucket(BUCKET, location="europe-west4")
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []
        assert containers(docker_engine) == []
        running.stop()
        assert containers(docker_engine) == []
        assert not (running.state / "gcs").exists()


def program(image: str, text: str, *args: str, **env: str) -> dict[str, Any]:
    """A container that runs a Python program."""
    return container(image, env=env, command=["python", "-c", text], args=list(args))


def containers(docker_engine: docker.DockerClient, path: str = "") -> list[Container]:
    """The containers of this run's jobs, or of one."""
    filters: dict[str, str | list[str] | bool] | None = {"label": [f"{images.LABEL}={images.RUN}", LABEL + "job"]}
    found = docker_engine.containers.list(all=True, filters=filters, ignore_removed=True)
    return [c for c in found if c.labels[LABEL + "job"].endswith(path)]


def test_a_container_has_its_buckets_and_its_surroundings(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    with storage_client(sandbox, "a-project") as client:
        bucket = client.bucket(BUCKET)
        bucket.blob("data/in.txt").upload_from_string("rows")
        bucket.blob("old.txt").upload_from_string("old")
        spec = program(tiny_image, CIRCUMSTANCES, "--model=$(AIP_MODEL_DIR)", NAME="$(CLOUD_ML_JOB_ID)")
        output = {"outputUriPrefix": f"gs://{BUCKET}/runs/1"}
        path = create(sandbox, job(pool(spec, machine="n1-standard-1"), baseOutputDirectory=output))
        done = finished(sandbox, path)
        assert done["state"] == "JOB_STATE_SUCCEEDED", done
        # When a job has ended, all that it wrote is stored.
        assert bucket.blob("out/model/weights").download_as_bytes() == b"trained"
        assert not bucket.blob("old.txt").exists()
    job_id = path.rpartition("/")[2]
    (entry,) = entries(sandbox, f'resource.labels.job_id="{job_id}" jsonPayload.message="here"')
    said, env = entry["jsonPayload"], entry["jsonPayload"]["env"]
    assert entry["severity"] == "NOTICE"
    assert "severity" not in said
    assert said["read"] == said["fetched"] == "rows"
    assert said["argv"] == [f"--model=gs://{BUCKET}/runs/1/model/"]
    assert said["cpus"] == 1
    assert env["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"] == f"{env['STORAGE_EMULATOR_HOST']}/"  # all of Google
    assert env["NAME"] == env["CLOUD_ML_JOB_ID"] == job_id
    assert env["AIP_CHECKPOINT_DIR"] == f"gs://{BUCKET}/runs/1/checkpoints/"
    assert env["AIP_TENSORBOARD_LOG_DIR"] == f"gs://{BUCKET}/runs/1/logs/"
    described = json.loads(env["CLUSTER_SPEC"])
    assert described["cluster"] == {"workerpool0": [f"{said['host']}:2222"]}
    assert described["task"] == {"type": "workerpool0", "index": 0}
    assert described["job"]["base_output_directory"] == {"output_uri_prefix": f"gs://{BUCKET}/runs/1"}
    assert containers(docker_engine, path) == []


def test_the_replicas_of_a_job_reach_each_other(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    first, second = (pool(program(tiny_image, text), machine="n1-standard-1") for text in (PRIMARY, WORKER))
    path = create(sandbox, job(first, second))
    assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"  # though the worker would go on
    assert "heard worker 0" in messages(sandbox, path)
    assert containers(docker_engine, path) == []


def test_a_failed_job_shows_its_last_words(sandbox: RunningSandbox, tiny_image: str) -> None:
    failed = finished(sandbox, create(sandbox, job(pool(program(tiny_image, FAILING)))))
    assert failed["error"]["code"] == 3
    assert failed["error"]["message"].startswith(
        "The replica workerpool0-0 exited with a non-zero status of 1. Termination reason: Error.\nno rows\n\n"
    )
    path = failed["name"]
    assert messages(sandbox, path, "severity=INFO jsonPayload.message:*") == ["loading"]
    assert messages(sandbox, path, "severity=ERROR jsonPayload.message:*") == ["no rows"]
    missing = tiny_image.partition("@")[0] + "@sha256:" + "0" * 64
    assert missing in finished(sandbox, create(sandbox, job(pool(container(missing)))))["error"]["message"]


def test_a_cancelled_job_may_end_well(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    path = create(sandbox, job(pool(program(tiny_image, PATIENT, "cancelled", "never"))))
    assert eventually(lambda: "count 1" in messages(sandbox, path))
    sandbox.do("POST", f"{path}:cancel", {})
    assert finished(sandbox, path)["state"] == "JOB_STATE_CANCELLED"
    assert "told to end" in messages(sandbox, path)
    assert containers(docker_engine, path) == []


def test_files_and_objects_follow_each_other_while_a_job_runs(sandbox: RunningSandbox, tiny_image: str) -> None:
    path = create(sandbox, job(pool(program(tiny_image, PATIENT, "followed", "enough"))))
    with storage_client(sandbox, "a-project") as client:
        bucket = client.bucket(BUCKET)
        assert eventually(lambda: "count 3" in messages(sandbox, path))
        bucket.blob("enough").upload_from_string("")
        assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
        last = [m for m in messages(sandbox, path) if m.startswith("count")][-1]
        assert bucket.blob("followed").download_as_text() == last.removeprefix("count ")
        bucket.delete_blob("enough")


def test_a_killed_sandbox_finds_its_jobs_again(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    path = create(sandbox, job(pool(program(tiny_image, PATIENT, "killed", "done"))))
    assert eventually(lambda: "count 3" in messages(sandbox, path))
    (before,) = containers(docker_engine, path)
    sandbox.kill()
    sandbox.start()
    assert state(sandbox, path) == "RUNNING"
    (after,) = containers(docker_engine, path)
    assert after.id == before.id
    with storage_client(sandbox, "a-project") as client:
        client.bucket(BUCKET).blob("done").upload_from_string("")
        assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
        counts = [m for m in messages(sandbox, path) if m.startswith("count")]
        assert counts == [
            f"count {n}" for n in range(1, len(counts) + 1)
        ]  # no line is missing, and none is there twice
        assert client.bucket(BUCKET).blob("killed").download_as_text() == str(len(counts))
        client.bucket(BUCKET).delete_blob("done")


def test_a_stopped_sandbox_starts_its_jobs_again(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    path = create(sandbox, job(pool(program(tiny_image, PATIENT, "stopped", "go"))))
    assert eventually(lambda: "count 3" in messages(sandbox, path))
    sandbox.stop()
    assert containers(docker_engine) == []
    sandbox.start()
    assert eventually(
        lambda: messages(sandbox, path).count("told to end") == 1 and len(containers(docker_engine, path)) == 1
    )
    with storage_client(sandbox, "a-project") as client:
        client.bucket(BUCKET).blob("go").upload_from_string("")
        assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
        counts = [m for m in messages(sandbox, path) if m.startswith("count")]
        assert len(counts) == len(set(counts))  # it has gone on from what the first container stored
        client.bucket(BUCKET).delete_blob("go")


TRIAL = """
import argparse, os, sys
sys.path.insert(0, "/gcs/a-bucket-of-jobs")
import hypertune
parser = argparse.ArgumentParser()
parser.add_argument("--learning-rate", type=float)
parser.add_argument("--nfil1", type=int)
chosen = parser.parse_args()
print("trial", os.environ["CLOUD_ML_TRIAL_ID"], os.environ["AIP_MODEL_DIR"], flush=True)
if os.environ["CLOUD_ML_TRIAL_ID"] == "2":
    sys.exit("out of luck")
reporter = hypertune.HyperTune()
for step in (1, 2):
    reporter.report_hyperparameter_tuning_metric("accuracy", chosen.nfil1 + step, step)
"""


def test_a_study_reads_what_googles_package_reports(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    with storage_client(sandbox, "a-project") as client:
        client.bucket(BUCKET).blob("hypertune.py").upload_from_filename(str(hypertune.hypertune.__file__))
    body = {
        "displayName": "tune",
        "studySpec": {
            "metrics": [{"metricId": "accuracy", "goal": "MAXIMIZE"}],
            "parameters": [
                {
                    "parameterId": "learning-rate",
                    "doubleValueSpec": {"minValue": 0.001, "maxValue": 0.1},
                    "scaleType": "UNIT_LOG_SCALE",
                },
                {"parameterId": "nfil1", "integerValueSpec": {"minValue": "5", "maxValue": "20"}},
            ],
        },
        "maxTrialCount": 3,
        "parallelTrialCount": 2,
        "trialJobSpec": {
            "workerPoolSpecs": [pool(program(tiny_image, TRIAL), machine="n1-standard-1")],
            "baseOutputDirectory": {"outputUriPrefix": f"gs://{BUCKET}/tune"},
        },
    }
    path = create(sandbox, body, "hyperparameterTuningJobs")
    done = finished(sandbox, path)
    assert done["state"] == "JOB_STATE_SUCCEEDED", done
    assert [trial["state"] for trial in done["trials"]] == ["SUCCEEDED", "INFEASIBLE", "SUCCEEDED"]
    assert "out of luck" in done["trials"][1]["infeasibleReason"]
    for trial in (done["trials"][0], done["trials"][2]):
        chosen = {p["parameterId"]: p["value"] for p in trial["parameters"]}
        assert [m["metrics"][0]["value"] for m in trial["measurements"]] == [chosen["nfil1"] + 1, chosen["nfil1"] + 2]
        assert trial["finalMeasurement"]["stepCount"] == "2"
    said = [m for m in messages(sandbox, path) if m.startswith("trial")]
    assert sorted(said) == [f"trial {n} gs://{BUCKET}/tune/{n}/model/" for n in (1, 2, 3)]
    assert containers(docker_engine) == []


@pytest.mark.parametrize("moment", [0.1, 0.4, 0.8, 1.2])
def test_a_kill_at_any_moment_leaves_a_job_that_ends(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str, moment: float
) -> None:
    path = create(sandbox, job(pool(program(tiny_image, "print('ran', flush=True)"))))
    time.sleep(moment)
    sandbox.kill()
    sandbox.start()
    assert finished(sandbox, path)["state"] == "JOB_STATE_SUCCEEDED"
    assert "ran" in messages(sandbox, path)
    assert containers(docker_engine, path) == []
