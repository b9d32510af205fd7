"""`CustomJob`: a container that runs once on Vertex AI.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.customJobs
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from typing import ClassVar, Final, Unpack

import pulumi

from ..definition import PACKAGE, Definition, outputs_of, properties_of
from ..engine_call import EngineCall
from ..resource import State
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire
from .job import Job, JobType
from .specification import JobInputs, job_spec, specification_of


class CustomJob(Job):
    """A container that runs once on Vertex AI, on one machine or several: a training, usually.

    An update waits until the job has ended, and shows its state and the last line of its log. A job that fails fails
    the resource, with the last lines of its log, and the next update runs it again. After Ctrl-C the job goes on, and
    the next update waits for it. The same specification never runs twice. A changed one, be it the image, an argument
    or a trigger, runs anew, and the old record is deleted when the new job has succeeded.

    Deleting the resource cancels a job that runs and deletes its record. What it has written stays in the bucket. Its
    id is its full name, `projects/PROJECT/locations/LOCATION/customJobs/ID`: give that to `pulumi import`. Timeouts: 8
    days to create or update, 1 hour to delete, changed with `custom_timeouts`; they do not end the job, which
    `timeout_seconds` does.

        training = vertex.CustomJob(
            "census",
            image=image.ref,
            args=["--train-steps=1000"],
            machine_type="n1-standard-4",
            base_output_directory="gs://my-bucket/census",
        )
        vertex.ModelVersion("census", model_id="census", image=serving.ref, artifact_uri=training.artifact_uri)

    https://cloud.google.com/vertex-ai/docs/training/create-custom-job
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[JobInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def artifact_uri(self) -> pulumi.Output[str]:
        """The folder `model` in output_directory, which is AIP_MODEL_DIR; empty without a base_output_directory."""
        output: pulumi.Output[str] = self._output("artifactUri")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:CustomJob", CustomJob.__doc__ or "", properties_of(JobInputs), outputs_of(CustomJob)
)
CustomJob.definition = DEFINITION


class CustomJobType(JobType):
    definition = DEFINITION
    collection: ClassVar = "customJobs"

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        outputs = super().preview(call, api, inputs, state)
        if outputs["outputDirectory"] != UNKNOWN:
            outputs |= self.results({}, outputs["outputDirectory"])
        return outputs

    def body(self, inputs: Wire, mark: str) -> Wire:
        return {"jobSpec": job_spec(inputs, mark)}

    def imported(self, job: Wire) -> Wire:
        return {
            **specification_of(job["jobSpec"], job.get("labels", {})),
            "displayName": job.get("displayName"),
            "encryptionKey": job.get("encryptionSpec", {}).get("kmsKeyName"),
        }

    def directory(self, job: Wire) -> str:
        return str(job.get("jobSpec", {}).get("baseOutputDirectory", {}).get("outputUriPrefix", "")).rstrip("/")

    def results(self, job: Wire, directory: str) -> Wire:
        return {"artifactUri": f"{directory}/model" if directory else ""}
