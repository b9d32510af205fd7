"""Training: the data in the bucket, the image, the account, and the jobs, whose models the releases serve."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pulumi
import pulumi_gcp as gcp
import yaml

import pulumi_vertex as vertex
from infra.accounts import job_account
from infra.foundation import Foundation, vertex_provider
from infra.image import ROOT, TRAINING, Image, fetch
from infra.nested_settings import Job
from infra.settings import Settings


@dataclass(frozen=True)
class Workload:
    """What a workload reads. data: its name in headcount/data.py. options: with {} for the folder of the files."""

    data: str
    files: tuple[str, ...]
    options: tuple[str, ...]


_PARTS: Final = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
WORKLOADS: Final = {
    "census": Workload(
        "adult", ("adult.data", "adult.test"), ("--train-files={}/adult.data", "--eval-files={}/adult.test")
    ),
    "digits": Workload("mnist", tuple(f"{part}-ubyte.gz" for part in _PARTS), ("--data-dir={}",)),
}
TUNING: Final = ROOT / "training" / "digits_tuning.yaml"
OUTPUTS: Final = "training"  # folder of the bucket for models, checkpoints and logs
# To show a job's curves in the TensorBoard while it runs, and to write its log.
# https://cloud.google.com/vertex-ai/docs/experiments/tensorboard-training suggests Vertex AI User and Storage Admin.
REPORTING: Final = [
    "aiplatform.tensorboards.get",
    *(f"aiplatform.tensorboardExperiments.{verb}" for verb in ("create", "get", "list", "update", "write")),
    *(f"aiplatform.tensorboardRuns.{verb}" for verb in ("batchCreate", "create", "get", "list", "update", "write")),
    *(f"aiplatform.tensorboardTimeSeries.{verb}" for verb in ("batchCreate", "create", "get", "list", "update")),
    "logging.logEntries.create",
]


class Training(pulumi.ComponentResource):
    """The jobs of a stack and all that they need. A stack without the setting `training` has none of it.

    A job runs once for the same image, data and settings. When one of them changes, it runs anew into a folder of its
    own, and the model that serves is replaced after the new job has succeeded. The outputs of a job stay in the bucket
    for models until the stack is destroyed.
    """

    def __init__(self, settings: Settings, foundation: Foundation, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("headcount:index:Training", settings.stack, None, opts)
        self._bucket = foundation.model_bucket
        self._parent = pulumi.ResourceOptions(parent=self)
        gpu = any(job.accelerator for job in settings.training.values())
        #: What jobs run in, and the pipeline's steps.
        self.image = image = Image(settings, foundation, TRAINING, gpu, self._parent)
        #: Shows the curves of all jobs, as `make tensorboard` does on a laptop.
        self.tensorboard = gcp.vertex.AiTensorboard(
            "tensorboard",
            display_name=settings.names.model,
            region=settings.region,
            encryption_spec={"kms_key_name": settings.kms_key} if settings.kms_key else None,
            labels=settings.all_labels,
            opts=pulumi.ResourceOptions.merge(self._parent, foundation.after("aiplatform.googleapis.com")),
        )
        account, grants = job_account(
            "training", settings.names.training_account, settings.names.training_role, OUTPUTS, REPORTING,
            settings, foundation, self._parent,
        )  # fmt: skip
        provider = vertex_provider(settings, self)
        self._objects: dict[str, gcp.storage.BucketObject] = {}  # by name
        #: The gs:// folder of each job's model.
        self.models: dict[str, pulumi.Output[str]] = {}
        for name, job in settings.training.items():
            specification: dict[str, Any] = {
                "image": image.ref,
                "args": [f"training.{job.workload}", *self._data(job), *job.args],
                "machine_type": job.machine_type,
                "spot": job.spot,
                "service_account": account.email,
                "base_output_directory": pulumi.Output.concat(self._bucket.url, f"/{OUTPUTS}/{name}"),
                "tensorboard": self.tensorboard.id,
                "encryption_key": settings.kms_key or None,
                "labels": settings.all_labels,
                "display_name": f"{settings.names.model}-{name}"[:128],
            }
            if job.accelerator:
                specification |= {"accelerator_type": job.accelerator, "accelerator_count": 1}
            after = pulumi.ResourceOptions(
                parent=self, provider=provider, depends_on=[*grants, *foundation.image_readers, *self._objects.values()]
            )
            trained = (
                vertex.TuningJob(name, after, **specification, **study(yaml.safe_load(TUNING.read_text())))
                if job.tuning
                else vertex.CustomJob(name, after, **specification)
            )
            self.models[name] = trained.artifact_uri
        self.register_outputs({})

    def _data(self, job: Job) -> list[pulumi.Output[str]]:
        """Uploads a job's data into a folder named after its content; returns the options that name it."""
        files = data_files(job)
        folder = f"data/{job.workload}-{content_hash(files)}"
        for file in files:
            name = f"{folder}/{file.name}"
            if name not in self._objects:  # two jobs may have the same data
                self._objects[name] = gcp.storage.BucketObject(
                    name, bucket=self._bucket.name, name=name, source=pulumi.FileAsset(file), opts=self._parent
                )
        where = pulumi.Output.concat(self._bucket.url, "/", folder)
        return [where.apply(option.format) for option in WORKLOADS[job.workload].options]


def data_files(job: Job) -> list[Path]:
    """The files of a job's data: the published ones, or files of the same names in its folder.

    Raises pulumi.RunError.
    """
    workload = WORKLOADS[job.workload]
    if not job.data:
        return fetch(ROOT, workload.data)
    own = [ROOT / job.data / name for name in workload.files]
    if missing := [str(file) for file in own if not file.is_file()]:
        raise pulumi.RunError(f"The data of a training job is not there: {', '.join(missing)}.")
    return own


def content_hash(files: list[Path]) -> str:
    """A hash of the files' names and contents."""
    whole = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        whole.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:16]


def study(job: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a vertex.TuningJob from the fields of a HyperparameterTuningJob as REST has them."""
    kinds = {"integerValueSpec": "INTEGER", "doubleValueSpec": "DOUBLE"}
    return {
        "max_trials": job["maxTrialCount"],
        "parallel_trials": job["parallelTrialCount"],
        "metrics": [vertex.Metric(id=one["metricId"], goal=one["goal"]) for one in job["studySpec"]["metrics"]],
        "parameters": {
            one["parameterId"]: vertex.Parameter(
                type=kind,
                min_value=one[spec]["minValue"],
                max_value=one[spec]["maxValue"],
                scale_type=one["scaleType"],
            )
            for one in job["studySpec"]["parameters"]
            for spec, kind in kinds.items()
            if spec in one
        },
    }
