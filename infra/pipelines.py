"""The pipeline: its template and data in the bucket, the account, one run, and the schedule."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import pulumi
import pulumi_gcp as gcp

import pulumi_vertex as vertex
from infra.accounts import job_account
from infra.foundation import Foundation, vertex_provider
from infra.image import ROOT, TRAINING, Image
from infra.nested_settings import Job, Pipeline
from infra.prediction import Prediction
from infra.settings import Settings
from infra.training import Training, content_hash, data_files

RUNS: Final = "pipelines"  # folder of the bucket for what the steps write
TEMPLATES: Final = "templates"  # folder of the bucket which the steps cannot write to
# What the account of a pipeline does on Vertex AI. Google's pages suggest the role Vertex AI User, which may deploy and
# delete models, too: https://cloud.google.com/vertex-ai/docs/pipelines/configure-project#service-account
PERMISSIONS: Final = [
    *(f"aiplatform.customJobs.{verb}" for verb in ("cancel", "create", "get", "list")),
    "aiplatform.pipelineJobs.get",
    "aiplatform.metadataStores.get",
    *(f"aiplatform.artifacts.{verb}" for verb in ("create", "get", "list", "update")),
    *(
        f"aiplatform.contexts.{verb}"
        for verb in ("addContextArtifactsAndExecutions", "addContextChildren", "create", "get", "list",
                     "queryContextLineageSubgraph", "update")
    ),
    *(
        f"aiplatform.executions.{verb}"
        for verb in ("addExecutionEvents", "create", "get", "list", "queryExecutionInputsAndOutputs", "update")
    ),
    *(f"aiplatform.models.{verb}" for verb in ("get", "list", "update", "upload")),
    "logging.logEntries.create",
]  # fmt: skip


class Pipelines(pulumi.ComponentResource):
    """The census pipeline of a stack. A stack without the setting `pipeline` has none of it.

    The template is compiled for the images of this deployment and kept under the hash of its content. The models that
    the pipeline registers are versions of a model of its own, and their alias `default` is the pipeline's alone: they
    are no resources of this program, and stay when the stack is destroyed.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: Pipeline,
        foundation: Foundation,
        training: Training | None,
        prediction: Prediction,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("headcount:index:Pipelines", settings.stack, None, opts)
        self._bucket = foundation.model_bucket
        self._parent = pulumi.ResourceOptions(parent=self)
        image = training.image if training else Image(settings, foundation, TRAINING, False, self._parent)
        serves = max(settings.releases, key=lambda name: settings.releases[name].traffic)
        text = pulumi.Output.all(image.ref, prediction.images[serves]).apply(lambda refs: compiled(*refs))
        digest = text.apply(lambda known: hashlib.sha256(known.encode()).hexdigest()[:16])
        # A bucket and no repository of the format KFP: the google provider can make such a repository, and has no
        # resource that uploads a template into it.
        template = gcp.storage.BucketObject(
            "template",
            bucket=self._bucket.name,
            name=pulumi.Output.concat(TEMPLATES, "/census-", digest, ".yaml"),
            source=text.apply(lambda known: pulumi.StringAsset(known)),
            content_type="application/yaml",
            opts=self._parent,
        )
        #: The gs:// URI of the template.
        self.template = pulumi.Output.concat(self._bucket.url, "/", template.name)
        #: The model whose versions the pipeline registers.
        self.model = f"projects/{settings.project}/locations/{settings.region}/models/{settings.names.pipeline_model}"
        account, grants = job_account(
            "pipeline", settings.names.pipeline_account, settings.names.pipeline_role, RUNS, PERMISSIONS,
            settings, foundation, self._parent,
        )  # fmt: skip
        data, objects = self._data(pipeline)
        #: The account of the steps, the folder of what they write, and the parameters that the program gives.
        self.account, self.root = account.email, pulumi.Output.concat(self._bucket.url, f"/{RUNS}")
        self.parameters = {"data": data, "registry": self.model, **pipeline.parameters}
        run: dict[str, Any] = {
            "display_name": settings.names.pipeline_model,
            "template_uri": self.template,
            "parameters": self.parameters,
            "pipeline_root": self.root,
            "service_account": self.account,
            "encryption_key": settings.kms_key or None,
            "labels": settings.all_labels,
        }
        after = pulumi.ResourceOptions(
            parent=self,
            provider=vertex_provider(settings, self),
            depends_on=[*grants, *foundation.image_readers, *objects, template],
        )
        if pipeline.run:
            vertex.PipelineJob("pipeline", after, **run)
        if pipeline.cron:
            limits: dict[str, Any] = {
                "start_time": pipeline.start_time,
                "end_time": pipeline.end_time,
                "max_run_count": pipeline.max_run_count,
            }
            vertex.Schedule(
                "pipeline",
                after,
                **run,
                **{name: value for name, value in limits.items() if value},
                cron=pipeline.cron,
                time_zone=pipeline.time_zone,
                paused=pipeline.paused,
                max_concurrent_runs=pipeline.max_concurrent_runs,
            )
        self.register_outputs({})

    def _data(self, pipeline: Pipeline) -> tuple[pulumi.Output[str], list[pulumi.Resource]]:
        """Uploads the census table into a folder named after its content; returns the folder and its objects."""
        files = data_files(Job(workload="census", data=pipeline.data))
        folder = f"data/pipeline-{content_hash(files)}"
        objects: list[pulumi.Resource] = [
            gcp.storage.BucketObject(
                f"{folder}/{file.name}",
                bucket=self._bucket.name,
                name=f"{folder}/{file.name}",
                source=pulumi.FileAsset(file),
                opts=self._parent,
            )
            for file in files
        ]
        return pulumi.Output.concat(self._bucket.url, "/", folder), objects


def compiled(training_image: str, serving_image: str) -> str:
    """The template of the pipeline for these images: the same text for the same images. Raises pulumi.RunError."""
    # In a process of its own, because the program imports nothing of training/, and kfp takes seconds to import.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "census.yaml"
        images = ["--training-image", training_image, "--serving-image", serving_image]
        command = [sys.executable, "-m", "training.pipelines", "compile", *images, "--output", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise pulumi.RunError(f"The pipeline was not compiled:\n{done.stderr.strip()}")
        return file.read_text()
