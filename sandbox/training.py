"""How a job's containers are started, read from a CustomJobSpec as Vertex AI does.

https://docs.cloud.google.com/vertex-ai/docs/training/code-requirements (environment variables),
https://docs.cloud.google.com/vertex-ai/docs/training/distributed-training (CLUSTER_SPEC)
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.projects import project_number
from sandbox.runner import LABEL, Launch
from sandbox.serving import expand
from sandbox.store import JSON

# The file that cloudml-hypertune writes; it reads the path from CLOUD_ML_HP_METRIC_FILE.
METRIC_FILE = "/var/hypertune/output.metrics"
# Recorded in CLUSTER_SPEC: https://docs.cloud.google.com/vertex-ai/docs/training/distributed-training
CLUSTER_PORT = 2222
# /dev/shm, through which PyTorch's data loaders pass their batches; Docker's 64 MB is too little for them.
SHARED_MEMORY_MB = 1024
PRIMARY = "workerpool0-0"


@dataclass(frozen=True)
class Trial:
    """A trial of a tuning job: its id, and the arguments that it adds."""

    job: str  # the tuning job's resource name
    id: str
    arguments: list[str]


@dataclass(frozen=True)
class WorkerReplica:
    """One container of a job, such as workerpool1-0."""

    pool: str
    index: int
    spec: JSON = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.pool}-{self.index}"


def vcpus(machine_type: str) -> int:
    """The CPUs that a machine type's name says: 4 for `n1-standard-4`; 1 where it says none."""
    match = re.search(r"-(\d+)(?:-lssd|-metal)?$", machine_type)
    # Machines with accelerators of their own, such as a2-highgpu-1g, have about a dozen for each.
    accelerators = re.search(r"-(\d+)g$", machine_type)
    return int(match[1]) if match else 12 * int(accelerators[1]) if accelerators else 1


def cpus_needed(spec: JSON, available: int) -> int:
    """How many CPUs a job takes: those of all its machines, at most the ones that there are."""
    wanted = sum(vcpus(r.spec["machineSpec"].get("machineType", "")) for r in replicas(spec))
    return max(1, min(wanted, available))


def replicas(spec: JSON) -> list[WorkerReplica]:
    """The containers of a job, the primary first. A pool without a task is skipped."""
    return [
        WorkerReplica(f"workerpool{number}", index, pool)
        for number, pool in enumerate(spec["workerPoolSpecs"])
        if pool.get("containerSpec")
        for index in range(int(pool.get("replicaCount", 1)))
    ]


def output_folders(spec: JSON) -> dict[str, str]:
    """AIP_MODEL_DIR and its like: CustomJobSpec.baseOutputDirectory of the discovery document."""
    base = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    if not base:
        return {}
    base = base.rstrip("/")
    names = {"AIP_MODEL_DIR": "model", "AIP_CHECKPOINT_DIR": "checkpoints", "AIP_TENSORBOARD_LOG_DIR": "logs"}
    return {variable: f"{base}/{name}/" for variable, name in names.items()}


def of_trial(spec: JSON, trial_id: str) -> JSON:
    """The spec of a trial's own job: its output is below that of the tuning job."""
    base = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    return {**spec, "baseOutputDirectory": {"outputUriPrefix": f"{base.rstrip('/')}/{trial_id}"}} if base else spec


def _snake(value: object) -> object:
    """A message with the names of its fields as CLUSTER_SPEC's `job` has them."""
    if isinstance(value, list):
        return [_snake(v) for v in value]
    if isinstance(value, dict):
        return {re.sub(r"[A-Z]", lambda m: "_" + m[0].lower(), k): _snake(v) for k, v in value.items()}
    return value


def launches(
    state: str,
    name: str,
    spec: JSON,
    buckets: Path,
    *,
    attempt: int = 0,
    cpus: tuple[int, ...] = (),
    trial: Trial | None = None,
    outputs: dict[str, str] | None = None,
) -> dict[str, Launch]:
    """How each replica of a job is started, by the replica's name. `buckets` is the folder that is /gcs."""
    project = name.split("/")[1]
    everyone = replicas(spec)
    mark = hashlib.sha256(f"{state}/{name}".encode()).hexdigest()[:10]
    hosts = {r.name: f"cmle-training-{r.pool}-{mark}-{r.index}" for r in everyone}
    cluster: dict[str, list[str]] = {}
    for replica in everyone:
        cluster.setdefault(replica.pool, []).append(f"{hosts[replica.name]}:{CLUSTER_PORT}")
    shared = {
        "CLOUD_ML_JOB_ID": (trial.job if trial else name).rpartition("/")[2],
        "CLOUD_ML_PROJECT_ID": project_number(project),
        "CLOUD_ML_REGION": name.split("/")[3],
        **output_folders(spec),
    }
    if spec.get("tensorboard"):
        shared["AIP_TENSORBOARD_RESOURCE_NAME"] = spec["tensorboard"]
    if trial:
        shared |= {"CLOUD_ML_TRIAL_ID": trial.id, "CLOUD_ML_HP_METRIC_FILE": METRIC_FILE}
    result = {}
    for replica in everyone:
        task: JSON = {"type": replica.pool, "index": replica.index}
        if trial:
            task["trial"] = trial.id
        described = {"cluster": cluster, "environment": "cloud", "task": task, "job": _snake(spec)}
        env = {**shared, "CLUSTER_SPEC": json.dumps(described)}
        container: JSON = replica.spec["containerSpec"]
        for variable in container.get("env", []):
            env[variable["name"]] = expand(variable.get("value", ""), env)
        labels = {"state": state, "job": name, "replica": replica.name, "attempt": str(attempt)}
        result[replica.name] = Launch(
            image=container["imageUri"],
            command=[expand(c, env) for c in container.get("command", [])],
            args=[expand(a, env) for a in container.get("args", [])] + (trial.arguments if trial else []),
            env=env,
            port=0,
            shared_memory_mb=SHARED_MEMORY_MB,
            labels={LABEL + k: v for k, v in labels.items()},
            name=hosts[replica.name],
            accelerators=replica.spec["machineSpec"].get("acceleratorCount", 0),
            hostname=hosts[replica.name],
            folders={"/gcs": buckets},
            cpus=cpus,
            outputs=outputs or {},
        )
    return result


# ------------------------------------------------------------------------------------------------ how a job ends

# "If the job encountered exit codes that could be transient, Agent Platform tries to restart the job up to three
# times": SIGABRT and SIGSEGV. https://docs.cloud.google.com/vertex-ai/docs/training/understanding-training-service
TRANSIENT = (6, 134, 11, 139)
RETRIES = 3
# So many of the last lines on stderr stand in a failed job's error.
TRACEBACK_LINES = 20


def first_failure(codes: dict[str, int | None]) -> str:
    """The replica that ended with an error, the primary before others, or ""."""
    failed = [name for name, code in codes.items() if code]
    return min(failed, key=lambda name: (name != PRIMARY, name)) if failed else ""


def failure_message(
    job: str, replica: str, code: int, *, out_of_memory: bool = False, last_lines: list[str] | None = None
) -> str:
    """The words of a failed job's error, as on record; `last_lines` of stderr are a part of it."""
    if out_of_memory:
        what = f"The replica {replica} ran out of memory and exited with a non-zero status of {code}."
    else:
        what = f"The replica {replica} exited with a non-zero status of {code}. Termination reason: Error."
    lines = "".join(f"\n{line}" for line in last_lines or [])
    number, job_id = project_number(job.split("/")[1]), job.rpartition("/")[2]
    return (
        f"{what}{lines}\n\nTo find out more about why your job exited please check the logs: "
        f"https://console.cloud.google.com/logs/viewer?project={number}&resource=ml_job%2Fjob_id%2F{job_id}"
        f"&advancedFilter=resource.type%3D%22ml_job%22%0Aresource.labels.job_id%3D%22{job_id}%22"
    )
