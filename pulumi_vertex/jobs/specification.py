"""The specification that both kinds of jobs have: its inputs, their checks, and Vertex AI's CustomJobSpec.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Required, TypedDict

import pulumi

from ..checks import Failures, by_digest, given_together
from ..definition import Field
from ..errors import ProblemError
from ..patterns import (
    ACCELERATOR,
    ACCELERATOR_HINT,
    EMAIL,
    EMAIL_HINT,
    FOLDER,
    FOLDER_HINT,
    KMS_KEY,
    KMS_KEY_HINT,
    LABEL_KEY,
    LABEL_KEY_HINT,
    MACHINE_TYPE,
    MACHINE_TYPE_HINT,
)
from ..wire import UNKNOWN, Wire

LABEL: Final = "pulumi_job"  # of a job: the mark by which a repeated create finds it
# Vertex AI's own, which it writes into a job that does not say otherwise.
BOOT_DISK_GB: Final = 100
TIMEOUT_SECONDS: Final = 7 * 24 * 3600
Texts = Sequence[pulumi.Input[str]]


class Scheduling(TypedDict, total=False):
    """How Vertex AI finds machines, and what it does when one is lost.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec#Scheduling
    """

    max_wait_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "Waits so long at most for machines, which are then started all at once (FLEX_START of Dynamic Workload "
            "Scheduler). Where absent, a job without free machines fails.",
            low=1,
        ),
    ]
    restart_on_worker_restart: Annotated[
        pulumi.Input[bool], Field("Whether to restart all replicas when one of them is restarted.", default=False)
    ]
    disable_retries: Annotated[
        pulumi.Input[bool],
        Field("Whether the job fails, instead of being retried, at an internal error of Vertex AI.", default=False),
    ]


class JobInputs(TypedDict, total=False):
    image: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Training image by digest: REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE@sha256:…. A tag is refused, "
                "because it can move.",
                replaces=True,
            ),
        ]
    ]
    machine_type: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Machine of one replica, such as n1-standard-4. "
                "https://cloud.google.com/vertex-ai/docs/training/configure-compute",
                pattern=MACHINE_TYPE,
                hint=MACHINE_TYPE_HINT,
                replaces=True,
            ),
        ]
    ]
    command: Annotated[pulumi.Input[Texts], Field("Entry point, instead of the image's ENTRYPOINT.", replaces=True)]
    args: Annotated[pulumi.Input[Texts], Field("Arguments, instead of the image's CMD.", replaces=True)]
    env: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Environment variables of the container. Vertex AI adds AIP_* ones and shows all of them to whoever may "
            "read the job: a secret is encrypted in Pulumi's state, not there.",
            pattern=r"(?!AIP_)[A-Za-z_][A-Za-z0-9_]*",
            hint="letters, digits and _, not beginning with a digit or AIP_, which is Vertex AI's own",
            high=100,
            replaces=True,
        ),
    ]
    replicas: Annotated[
        pulumi.Input[int],
        Field(
            "Machines that run the container: the first one is worker pool 0, the others are worker pool 1. Vertex AI "
            "tells each one its place in CLUSTER_SPEC.",
            low=1,
            default=1,
            replaces=True,
        ),
    ]
    accelerator_type: Annotated[
        pulumi.Input[str],
        Field(
            "Accelerator of each replica, such as NVIDIA_L4.",
            pattern=ACCELERATOR,
            hint=ACCELERATOR_HINT,
            replaces=True,
        ),
    ]
    accelerator_count: Annotated[pulumi.Input[int], Field("Accelerators of each replica.", low=1, replaces=True)]
    boot_disk_gb: Annotated[
        pulumi.Input[int], Field("Boot disk of each replica in GB.", low=1, default=BOOT_DISK_GB, replaces=True)
    ]
    spot: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether to run on spot machines, which Google may take away: the job is then started again, and has to go "
            "on from its own checkpoint.",
            default=False,
            replaces=True,
        ),
    ]
    scheduling: Annotated[
        pulumi.Input[Scheduling], Field("How machines are found and what happens when one is lost.", replaces=True)
    ]
    timeout_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "Seconds that the job may run, not counting its wait for machines.",
            low=1,
            default=TIMEOUT_SECONDS,
            replaces=True,
        ),
    ]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that the container runs as; Vertex AI's Custom Code Service Agent where "
            "absent. Whoever deploys needs iam.serviceAccounts.actAs on it.",
            pattern=EMAIL,
            hint=EMAIL_HINT,
            replaces=True,
        ),
    ]
    base_output_directory: Annotated[
        pulumi.Input[str],
        Field(
            "Folder under which each specification gets a folder of its own, named by its hash: model, checkpoints and "
            "logs are written there. So a changed job neither goes on from another one's checkpoint nor overwrites a "
            "model that is in use, and a failed job that runs again goes on from its own checkpoint. The container "
            "finds the folders in AIP_MODEL_DIR, AIP_CHECKPOINT_DIR and AIP_TENSORBOARD_LOG_DIR.",
            pattern=FOLDER,
            hint=FOLDER_HINT,
            replaces=True,
        ),
    ]
    tensorboard: Annotated[
        pulumi.Input[str],
        Field(
            "Persistent TensorBoard that shows the job's logs, the `id` of a gcp.vertex.AiTensorboard. It needs a "
            "service_account and a base_output_directory.",
            pattern=r"projects/[^/]+/locations/[^/]+/tensorboards/[^/]+",
            hint="projects/PROJECT/locations/LOCATION/tensorboards/ID",
            replaces=True,
        ),
    ]
    encryption_key: Annotated[
        pulumi.Input[str | None],
        Field(
            "Cloud KMS key of the same region that encrypts the job's machines and record; Google's own where absent. "
            "https://cloud.google.com/vertex-ai/docs/general/cmek",
            pattern=KMS_KEY,
            hint=KMS_KEY_HINT,
            replaces=True,
        ),
    ]
    triggers: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Values that make the job run anew when they change and that the container does not see, such as the "
            "generation of a data object.",
            replaces=True,
        ),
    ]
    display_name: Annotated[
        pulumi.Input[str],
        Field(
            "Name in the console, the resource's name where absent. Vertex AI cannot change it: another one takes "
            "effect when the job runs anew.",
            pattern=r".{1,128}",
            hint="1 to 128 characters",
        ),
    ]
    labels: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Labels of the job. Vertex AI cannot change them: other ones take effect when the job runs anew.",
            pattern=rf"(?!{LABEL}$){LABEL_KEY}",
            hint=f"{LABEL_KEY_HINT}, and not {LABEL}",
            high=63,
        ),
    ]
    wait: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether an update waits until the job has ended, and fails if the job does. Where false, what depends on "
            "the job cannot count on its results.",
            default=True,
        ),
    ]
    cancel_on_interrupt: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether Ctrl-C cancels the job. Where false, the job goes on, and the next update waits for it.",
            default=False,
        ),
    ]


def check_specification(inputs: Wire) -> Failures:
    failures = by_digest("image", inputs.get("image"), "a tag can move, and the job would not run anew when it does")
    failures += given_together("", inputs, "acceleratorType", "acceleratorCount")
    if "tensorboard" in inputs:
        for name in ("serviceAccount", "baseOutputDirectory"):
            if name not in inputs:
                failures.append((name, "is missing: a job with a tensorboard needs one."))
    scheduling = inputs.get("scheduling")
    if inputs.get("spot") is True and isinstance(scheduling, dict) and "maxWaitSeconds" in scheduling:
        failures.append(("scheduling.maxWaitSeconds", "does not go with spot. Leave one of them out."))
    return failures


def output_directory(inputs: Wire, mark: str) -> str:
    """The folder of one specification, "" where the job has none."""
    base = inputs.get("baseOutputDirectory")
    return f"{base.rstrip('/')}/{mark}" if base else ""


def job_spec(inputs: Wire, mark: str) -> Wire:
    """The CustomJobSpec of inputs; `mark` names the folder for its output."""
    machine = _given({name: inputs.get(name) for name in ("machineType", "acceleratorType", "acceleratorCount")})
    container = _given(
        {
            "imageUri": inputs["image"],
            "command": inputs.get("command"),
            "args": inputs.get("args"),
            "env": [{"name": name, "value": value} for name, value in sorted(inputs.get("env", {}).items())],
        }
    )
    disk = {"diskSpec": {"bootDiskSizeGb": inputs["bootDiskGb"]}} if "bootDiskGb" in inputs else {}
    # JSON writes 64-bit numbers as texts. Worker pool 0 is the chief and has one replica.
    counts = [1, *filter(None, [inputs.get("replicas", 1) - 1])]
    pools = [{"machineSpec": machine, "replicaCount": str(n), "containerSpec": container, **disk} for n in counts]
    directory = output_directory(inputs, mark)
    return _given(
        {
            "workerPoolSpecs": pools,
            "scheduling": _scheduling(inputs),
            "serviceAccount": inputs.get("serviceAccount"),
            "baseOutputDirectory": {"outputUriPrefix": directory} if directory else None,
            "tensorboard": inputs.get("tensorboard"),
        }
    )


def specification_of(spec: Wire, labels: Mapping[str, str]) -> Wire:
    """The inputs that a CustomJobSpec was made from, None where it has nothing to say. Raises ProblemError."""
    pools = [pool for pool in spec.get("workerPoolSpecs", []) if pool.get("machineSpec")]
    if not pools or any("containerSpec" not in pool for pool in pools):
        raise ProblemError("The job does not run a container of its own, and only such jobs can be imported.")
    if any(_without_count(pool) != _without_count(pools[0]) for pool in pools):
        raise ProblemError("The job's worker pools differ, and only jobs whose replicas are the same can be imported.")
    machine, container = pools[0]["machineSpec"], pools[0]["containerSpec"]
    scheduling, timeout = spec.get("scheduling", {}), spec.get("scheduling", {}).get("timeout")
    wait = scheduling.get("maxWaitDuration") if scheduling.get("strategy") == "FLEX_START" else None
    directory = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "").rstrip("/")
    return {
        "image": container.get("imageUri"),
        "machineType": machine.get("machineType"),
        "acceleratorType": machine.get("acceleratorType") if machine.get("acceleratorCount") else None,
        "acceleratorCount": machine.get("acceleratorCount"),
        "command": container.get("command"),
        "args": container.get("args"),
        "env": {variable["name"]: variable.get("value", "") for variable in container.get("env", [])},
        "replicas": sum(int(pool.get("replicaCount", 1)) for pool in pools),
        "bootDiskGb": pools[0].get("diskSpec", {}).get("bootDiskSizeGb"),
        "spot": scheduling.get("strategy") == "SPOT",
        "scheduling": _given(
            {
                "maxWaitSeconds": _seconds(wait),
                "restartOnWorkerRestart": scheduling.get("restartJobOnWorkerRestart"),
                "disableRetries": scheduling.get("disableRetries"),
            }
        ),
        "timeoutSeconds": _seconds(timeout),
        "serviceAccount": spec.get("serviceAccount"),
        "baseOutputDirectory": directory.removesuffix(f"/{labels.get(LABEL)}"),
        "tensorboard": spec.get("tensorboard"),
        "labels": {key: value for key, value in labels.items() if key != LABEL},
    }


def _scheduling(inputs: Wire) -> Wire:
    given = inputs.get("scheduling", {})
    wait, timeout = given.get("maxWaitSeconds"), inputs.get("timeoutSeconds")
    return _given(
        {
            "strategy": "SPOT" if inputs.get("spot") else "FLEX_START" if wait else None,
            "maxWaitDuration": f"{wait}s" if wait else None,
            "timeout": f"{timeout}s" if timeout else None,
            "restartJobOnWorkerRestart": given.get("restartOnWorkerRestart"),
            "disableRetries": given.get("disableRetries"),
        }
    )


def known(value: Any) -> bool:
    """Whether a preview knows all of a value."""
    if isinstance(value, dict):
        return all(map(known, value.values()))
    if isinstance(value, list):
        return all(map(known, value))
    return bool(value != UNKNOWN)


def _seconds(duration: str | None) -> int | None:
    return int(float(duration.removesuffix("s"))) if duration else None


def _given(value: Wire) -> Wire:
    return {key: item for key, item in value.items() if item not in (None, False, [], {})}


def _without_count(pool: Wire) -> Wire:
    return {key: value for key, value in pool.items() if key != "replicaCount"}
