"""The settings that have settings of their own: a release, a training job, the pipeline, the request log."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from infra import BUILD

TRAINED: Final = "training/"  # begins the `model` of a release that a job of `training` makes
CONFIG: Final = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)

# A deployed model's alias as well: https://cloud.google.com/vertex-ai/docs/model-registry/model-alias
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,61}[a-z0-9]$")]
Accelerator = Annotated[str, Field(pattern=r"^([A-Z][A-Z0-9_]+)?$", examples=["NVIDIA_L4"])]
MachineType = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)+$")]


class Release(BaseModel):
    """One model version and its share of the traffic."""

    model_config = CONFIG

    image: Annotated[
        str,
        Field(
            description="`build` for the image of these sources, or the digest of an image already pushed",
            pattern=rf"^({BUILD}|sha256:[0-9a-f]{{64}})$",
            examples=["sha256:…", BUILD],
        ),
    ]
    traffic: Annotated[int, Field(description="percent of the requests", ge=0, le=100, examples=[10])]
    model: Annotated[
        str,
        Field(
            description="folder of the model that is served instead of the image's, as `headcount register` prints it, "
            f"or {TRAINED}JOB for the model of a job in `training`",
            pattern=rf"^(gs://[a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9](/[^\s]*)?|{TRAINED}[a-z0-9-]+)?$",
            examples=["gs://my-project-hc-models-dev/census/0123456789abcdef"],
        ),
    ] = ""
    min_replicas: Annotated[
        int | None, Field(description="replicas that always run, if not the stack's minReplicas", ge=0, examples=[1])
    ] = None
    max_replicas: Annotated[
        int | None,
        Field(description="replicas that may run under load, if not the stack's maxReplicas", ge=1, examples=[2]),
    ] = None

    @property
    def job(self) -> str:
        """The job in `training` that makes the model, "" where none does."""
        return self.model.removeprefix(TRAINED) if self.model.startswith(TRAINED) else ""


class Job(BaseModel):
    """A training on Vertex AI, which runs again whenever its image, its data or one of these settings changes."""

    model_config = CONFIG

    workload: Annotated[
        Literal["census", "digits"], Field(description="module of training/ that runs", examples=["census"])
    ]
    args: Annotated[list[str], Field(description="options of the workload", examples=['["--train-steps=1000"]'])] = []
    tuning: Annotated[
        bool,
        Field(
            description="runs the trials of training/digits_tuning.yaml, and takes the model of the best one",
            examples=[True],
        ),
    ] = False
    data: Annotated[
        str,
        Field(
            description="folder on this machine with files of the same names, instead of the published data",
            examples=["my/table"],
        ),
    ] = ""
    machine_type: Annotated[MachineType, Field(description="machine that trains", examples=["n1-standard-4"])] = (
        "n1-standard-4"
    )
    accelerator: Annotated[
        Accelerator, Field(description="GPU of that machine; empty for none", examples=["NVIDIA_TESLA_T4"])
    ] = ""
    spot: Annotated[
        bool,
        Field(
            description="takes a cheaper machine that Google may reclaim: the job then resumes on another",
            examples=[True],
        ),
    ] = False


class Pipeline(BaseModel):
    """The pipeline that trains, evaluates and registers a model: when it runs, and on what."""

    model_config = CONFIG

    run: Annotated[
        bool,
        Field(description="runs it once, and again when its images, data or parameters change", examples=[True]),
    ] = False
    cron: Annotated[
        str,
        Field(
            description="when it runs: minute, hour, day of the month, month, day of the week; empty for no schedule",
            examples=["0 3 * * 1-5"],
        ),
    ] = ""
    time_zone: Annotated[str, Field(description="time zone of cron", examples=["Europe/Amsterdam"])] = "UTC"
    paused: Annotated[bool, Field(description="starts no runs by the schedule for now", examples=[True])] = False
    max_concurrent_runs: Annotated[
        int, Field(description="scheduled runs that may be under way at the same time", ge=1, examples=[1])
    ] = 1
    start_time: Annotated[
        str, Field(description="when the schedule begins; empty for at once", examples=["2027-01-01T00:00:00Z"])
    ] = ""
    end_time: Annotated[
        str, Field(description="when the schedule ends; empty for never", examples=["2027-12-31T00:00:00Z"])
    ] = ""
    max_run_count: Annotated[
        int | None, Field(description="runs that the schedule starts in all", ge=1, examples=[10])
    ] = None
    data: Annotated[
        str,
        Field(
            description="folder on this machine with files of the same names, instead of the published data",
            examples=["my/table"],
        ),
    ] = ""
    parameters: Annotated[
        dict[str, Any],
        Field(description="values of the pipeline's parameters", examples=['{"train_steps": 500}']),
    ] = {}


class RequestLog(BaseModel):
    """Where the requests and responses of the endpoint are stored, and how many of them."""

    model_config = CONFIG

    table: Annotated[
        str,
        Field(
            description="BigQuery table that stores requests and responses, the pictures of people included",
            pattern=r"^bq://[a-z][a-z0-9-]{4,28}[a-z0-9]\.\w+(\.\w+)?$",
            examples=["bq://my-project.headcount.requests"],
        ),
    ]
    sampling: Annotated[
        float, Field(description="fraction of the requests that is stored", gt=0, le=1, examples=[0.1])
    ] = 1.0
