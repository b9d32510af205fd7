"""The settings of a stack, typed.

`Pulumi.<stack>.yaml` holds the settings, `pulumi config set` writes them. All wrong settings are reported together,
each with the command that repairs it.
"""

import difflib
import json
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

import pulumi
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from infra import BUILD
from infra.names import PROJECT, Names
from infra.nested_settings import CONFIG, Accelerator, Job, MachineType, Name, Pipeline, Release, RequestLog

_AT: Final = f"{PROJECT}:releases"
Member = Annotated[str, Field(pattern=r"^(serviceAccount|user|group):[^@\s]+@[^@\s]+$")]
# https://cloud.google.com/resource-manager/docs/labels-overview#requirements
Label = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]
Metric = Literal["cpu", "accelerator", "requests"]  # as pulumi_vertex names them


class Settings(BaseModel):
    """The differences between stacks. Every field is a key of `headcount:`, except those in `KEYS`."""

    model_config = CONFIG

    stack: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]
    project: Annotated[
        str,
        Field(
            description="id of the Google Cloud project",
            # https://cloud.google.com/resource-manager/docs/creating-managing-projects
            pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$",
            examples=["my-project"],
        ),
    ]
    region: Annotated[
        str,
        Field(
            description="region of everything",
            pattern=r"^[a-z]+-[a-z]+[0-9]{1,2}$",
            examples=["europe-west4"],
        ),
    ]
    vertex_endpoint: Annotated[
        str,
        Field(
            description="URL that answers as Vertex AI, instead of Google's own",
            pattern=r"^(https?://[^/\s]+)?$",
            examples=["http://127.0.0.1:8790"],
        ),
    ] = ""
    production: Annotated[
        bool,
        Field(description="protects data and everything that serves, and takes images by digest only", examples=[True]),
    ] = False
    image_source: Annotated[
        str,
        Field(
            description="another stack's repository, from which pinned images are copied into this stack's own",
            pattern=r"^([a-z0-9.:-]+(/[a-z0-9._-]+)+)?$",
            examples=["europe-west4-docker.pkg.dev/my-project/headcount-dev"],
        ),
    ] = ""
    image_readers: Annotated[
        list[Member],
        Field(
            description="who else may pull this stack's images, such as whoever deploys production",
            examples=['["user:me@example.com"]'],
        ),
    ] = []
    predictors: Annotated[
        list[Member],
        Field(
            description="who may ask the endpoint for predictions, and nothing else",
            examples=['["group:analysts@example.com"]'],
        ),
    ] = []
    training: Annotated[
        dict[Name, Job],
        Field(
            description="jobs that train models: a name, its workload, and its options and machine",
            examples=['{"census": {"workload": "census"}}'],
        ),
    ] = {}
    releases: Annotated[
        dict[Name, Release],
        Field(
            description="what runs: a name, its image and its share of the traffic",
            validate_default=True,
            examples=['{"main": {"image": "build", "traffic": 100}}'],
        ),
    ] = {"main": Release(image=BUILD, traffic=100)}
    pipeline: Annotated[
        Pipeline | None,
        Field(
            description="pipeline that trains and registers a model: whether it runs once, and when by a schedule",
            examples=['{"cron": "0 3 * * 1-5", "timeZone": "Europe/Amsterdam"}'],
        ),
    ] = None
    paused: Annotated[
        bool,
        Field(description="undeploys everything and keeps the model versions: costs nothing", examples=[True]),
    ] = False
    # C3 is Sapphire Rapids, whose AMX multiplies bf16, which the compiled network is; N1 and E2 have
    # neither. Its smallest has 4 vCPUs and 8 GB: room for a worker of 1.6 GB on each, the spool and the JVM.
    # https://cloud.google.com/vertex-ai/docs/predictions/configure-compute
    machine_type: Annotated[MachineType, Field(description="machine of one replica", examples=["c3-highcpu-4"])] = (
        "c3-highcpu-4"
    )
    machine_types: Annotated[
        list[MachineType],
        Field(description="machine types that a policy allows; any where empty", examples=['["c3-highcpu-4"]']),
    ] = []
    accelerator: Annotated[
        Accelerator, Field(description="GPU of each replica; empty for none", examples=["NVIDIA_L4"])
    ] = ""
    min_replicas: Annotated[
        int,
        Field(
            description="replicas that always run; 0 scales to zero when nobody asks, a preview of Google's",
            ge=0,
            examples=[1],
        ),
    ] = 1
    max_replicas: Annotated[
        int, Field(description="replicas that may run under load", ge=1, validate_default=True, examples=[2])
    ] = 1
    autoscaling: Annotated[
        dict[Metric, Annotated[int, Field(ge=1)]],
        Field(
            description="targets at which replicas are added: percent of cpu or accelerator, requests a minute",
            examples=['{"cpu": 60}'],
        ),
    ] = {}
    dedicated: Annotated[
        bool,
        Field(
            description="an endpoint with a DNS name of its own: 10 MB a request instead of 1.5 MB",
            examples=[True],
        ),
    ] = True
    replace_endpoint: Annotated[
        bool,
        Field(
            description="lets production's endpoint be replaced, an outage and another URL; deployed before the change",
            examples=[True],
        ),
    ] = False
    drain_seconds: Annotated[
        int, Field(description="from the last traffic to the undeployment", ge=0, le=3600, examples=[30])
    ] = 30
    weights: Annotated[
        str,
        Field(
            description="weights in the image: yolov5n, yolov5s, yolov5m",
            pattern=r"^[A-Za-z0-9._-]+$",
            examples=["yolov5n"],
        ),
    ] = "yolov5n"
    torch: Annotated[
        Literal["", "cpu", "index"],
        Field(
            description="the image's torch: PyTorch's CPU index (cpu), the package index (index); empty: what answers",
            examples=["cpu"],
        ),
    ] = ""
    # The digest of a multi-platform index of September 2026. `docker buildx imagetools inspect
    # python:3.11-slim-bookworm` prints a newer one.
    base_image: Annotated[
        str,
        Field(
            description="the image's base, with Python 3.11",
            pattern=r"^[\w.:/-]+(@sha256:[0-9a-f]{64})?$",
            examples=["python:3.11-slim-bookworm"],
        ),
    ] = "python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b"
    build_args: Annotated[
        dict[str, str],
        Field(description="further arguments of the Dockerfile", examples=['{"REQUIRE": ""}']),
    ] = {}
    builder: Annotated[
        str,
        Field(
            description="buildx builder; the first usable one where empty",
            pattern=r"^[\w.-]*$",
            examples=["mine"],
        ),
    ] = ""
    picture_days: Annotated[
        int,
        Field(description="days until an uploaded object is deleted", ge=1, le=3650, examples=[30]),
    ] = 30
    keep_deleted_days: Annotated[
        int,
        Field(
            description="days that a replaced or deleted object is kept as an old version", ge=0, le=3650, examples=[7]
        ),
    ] = 0
    kms_key: Annotated[
        str,
        Field(
            description="Cloud KMS key that encrypts bucket, images, model versions and endpoint; empty: Google's",
            pattern=r"^(projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+)?$",
            examples=["projects/my-project/locations/europe-west4/keyRings/headcount/cryptoKeys/data"],
        ),
    ] = ""
    request_log: Annotated[
        RequestLog | None,
        Field(
            description="where requests and responses are stored, the pictures of people included",
            examples=['{"table": "bq://my-project.headcount.requests", "sampling": 0.1}'],
        ),
    ] = None
    scan_images: Annotated[
        bool,
        Field(description="looks for known vulnerabilities in each pushed image, at a price an image", examples=[True]),
    ] = False
    monthly_cost_limit: Annotated[
        float | None,
        Field(
            description="USD a month that the machines may cost with all replicas; a review says when it is more",
            gt=0,
            examples=[500],
        ),
    ] = None
    labels: Annotated[
        dict[Label, LabelValue],
        Field(description="further labels of every resource", examples=['{"owner": "vision", "cost-centre": "42"}']),
    ] = {}

    @field_validator("max_replicas")
    @classmethod
    def _enough(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas", 1)
        if most < least:
            said = f"{most} is less than minReplicas, {least}"
            raise PydanticCustomError("inconsistent", "", {"wrong": [(said, f"set {PROJECT}:maxReplicas {least}")]})
        return most

    @field_validator("training")
    @classmethod
    def _trainable(cls, jobs: dict[str, Job], info: ValidationInfo) -> dict[str, Job]:
        at = f"{PROJECT}:training"
        wrong = [
            (f"there is a tuning of digits only, not of {job.workload}", f"rm --path {at}.{name}.tuning")
            for name, job in jobs.items()
            if job.tuning and job.workload != "digits"
        ]
        if jobs and info.data.get("production"):
            wrong.append(("production builds and trains nothing: serve the model of another stack's job", f"rm {at}"))
        if wrong:
            raise PydanticCustomError("inconsistent", "", {"wrong": wrong})
        return jobs

    @field_validator("releases")
    @classmethod
    def _consistent(cls, releases: dict[str, Release], info: ValidationInfo) -> dict[str, Release]:
        wrong: list[tuple[str, str]] = []  # each mistake, and the end of the command that repairs it
        if releases and (total := sum(r.traffic for r in releases.values())) != 100:
            shares = ", ".join(f"{name} {r.traffic}" for name, r in releases.items())
            last = list(releases)[-1]
            share = max(0, 100 - total + releases[last].traffic)
            wrong.append(
                (
                    f"the traffic must add up to 100, not {total} ({shares})",
                    f"set --path {_AT}.{last}.traffic {share}",
                )
            )
        if "default" in releases:
            wrong.append(("`default` is Vertex AI's own name: choose another", f"rm --path {_AT}.default"))
        builds = [name for name, r in releases.items() if r.image == BUILD]
        same = {r.model: [name for name in builds if releases[name].model == r.model] for r in releases.values()}
        pin = f"set --path {_AT}.{builds[0]}.image sha256:…" if builds else ""
        for twice in same.values():
            if len(twice) > 1:
                said = f"only one release of a model can be built, not {' and '.join(twice)}: pin the others"
                wrong.append((said, f"set --path {_AT}.{twice[0]}.image sha256:…"))
        if builds and info.data.get("production"):
            wrong.append((f"production builds nothing: give {builds[0]} the digest that another stack proved", pin))
        jobs = info.data.get("training", {})
        for name, release in releases.items():
            if release.job and "training" in info.data and release.job not in jobs:
                said = f"{name} serves {release.model}, and {PROJECT}:training has no job of that name"
                wrong.append((said, f"set --path {PROJECT}:training.{release.job}.workload census"))
            least, most = release.min_replicas, release.max_replicas
            if least is not None and most is not None and least > most:
                said = f"{name} has fewer maxReplicas than minReplicas, {least}"
                wrong.append((said, f"set --path {_AT}.{name}.maxReplicas {least}"))
        if wrong:
            raise PydanticCustomError("inconsistent", "", {"wrong": wrong})
        return releases

    @field_validator("pipeline")
    @classmethod
    def _runnable(cls, pipeline: Pipeline | None, info: ValidationInfo) -> Pipeline | None:
        wrong: list[tuple[str, str]] = []
        if pipeline and info.data.get("production"):
            said = "production builds and trains nothing: run the pipeline in another stack"
            wrong.append((said, f"rm {PROJECT}:pipeline"))
        if pipeline and info.data.get("releases") == {}:
            said = "the models that the pipeline registers are served by the image of a release, and there is none"
            wrong.append((said, f"set --path {_AT}.main.image {BUILD}"))
        if pipeline and not pipeline.cron:
            only = ("paused", "start_time", "end_time", "max_run_count", "max_concurrent_runs")
            if given := [to_camel(name) for name in only if name in pipeline.model_fields_set]:
                said = f"{' and '.join(given)} has no meaning without cron"
                wrong.append((said, f"set --path {PROJECT}:pipeline.cron '0 3 * * *'"))
        if wrong:
            raise PydanticCustomError("inconsistent", "", {"wrong": wrong})
        return pipeline

    @property
    def builds(self) -> bool:
        return any(release.image == BUILD for release in self.releases.values())

    @property
    def names(self) -> Names:
        return Names(self.project, self.region, self.stack)

    @property
    def all_labels(self) -> dict[str, str]:
        """The labels of every resource; those that name project and stack cannot be changed."""
        return {**self.labels, **self.names.labels}


# Settings with another key in the configuration, because Pulumi's providers read them too.
KEYS: Final = {"project": "gcp:project", "region": "gcp:region", "vertex_endpoint": "vertex:endpoint"}


def read(config: Mapping[str, str], stack: str) -> Settings:
    """The settings of `stack` from its configuration: full keys to texts, objects as JSON.

    Raises pulumi.RunError, which names everything that is wrong and how to repair it.
    """
    values: dict[str, Any] = {"stack": stack}
    names = {KEYS.get(name, f"{PROJECT}:{to_camel(name)}"): name for name in Settings.model_fields}
    for key, text in config.items():
        if key in names:
            values[to_camel(names[key])] = _value(text)
        elif key.startswith(f"{PROJECT}:"):
            values[key.removeprefix(f"{PROJECT}:")] = text
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_problem(e, stack) for e in error.errors()]
    many = f"{len(problems)} settings are" if len(problems) > 1 else "a setting is"
    raise pulumi.RunError("\n".join([f"Stack {stack} cannot be deployed: {many} wrong.", *problems]))


def load() -> Settings:
    """The settings of the stack that is being deployed. Raises pulumi.RunError."""
    return read(pulumi.runtime.config.get_config_env(), pulumi.get_stack())


def _value(text: str) -> Any:
    """Parses objects and lists, which arrive as JSON; other values stay text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict | list) else text


# The message about a wrong key of a map, keyed by setting.
_NO_KEY: Final = {
    "releases": "is no name for a release: 2 to 63 of a-z, 0-9 and -, beginning with a letter, not ending in -",
    "training": "is no name for a job: 2 to 63 of a-z, 0-9 and -, beginning with a letter, not ending in -",
    "labels": "is no name for a label: 1 to 63 of a-z, 0-9, - and _, beginning with a letter",
    "autoscaling": f"is no metric; there are {', '.join(get_args(Metric))}",
    "build_args": "is no name for an argument",
}


def _problem(error: ErrorDetails, stack: str) -> str:
    """Describes one wrong setting: its name, its value, the mistake, and the command that repairs it."""
    steps = [str(step) for step in error["loc"] if step != "[key]"]
    first = next((n for n, f in Settings.model_fields.items() if f.alias == steps[0]), "")
    # The steps beyond the name of the setting, and in a map beyond the name of the entry.
    maps: dict[str, type[BaseModel]] = {"releases": Release, "training": Job}
    nested: dict[str, type[BaseModel]] = {"request_log": RequestLog, "pipeline": Pipeline}
    model: type[BaseModel] = Settings
    if first in maps and len(steps) > 2:
        model = maps[first]
    elif first in nested and len(steps) > 1:
        model = nested[first]
    # An entry of a map is described where the map is.
    names = steps[-1:] if model is not Settings else steps[:1]
    field = next((f for f in model.model_fields.values() if f.alias in names), None)
    key = ".".join([KEYS.get(first, f"{PROJECT}:{steps[0]}"), *steps[1:]])
    path = "--path " if len(steps) > 1 else ""

    def line(said: str, *commands: str) -> str:
        return "\n".join([f"  {key}{said}", *(f"    pulumi config {c} -s {shlex.quote(stack)}" for c in commands)])

    if error["type"] == "inconsistent":
        return "\n".join(line(f": {said}", command) for said, command in error["ctx"]["wrong"])
    if error["type"] == "extra_forbidden":
        known = [f.alias or "" for f in model.model_fields.values()]
        near = difflib.get_close_matches(steps[-1], known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        return line(f" is not a setting. {hint}", f"rm {path}{shlex.quote(key)}")
    if "[key]" in error["loc"]:
        return line(f" {_NO_KEY[first]}.", f"rm {path}{shlex.quote(key)}")
    said = f" ({field.description})" if field and field.description else ""
    if error["type"] == "missing":
        said += " is missing."
    elif error["type"] == "bool_parsing":
        said += f" is {json.dumps(error['input'])[:100]}, neither true nor false."
        return line(said, f"set {key} true", f"set {key} false")
    elif error["type"] == "string_pattern_mismatch":
        said += f" is {json.dumps(error['input'])[:100]}, which does not have the right form."
    else:
        said += f" is {json.dumps(error['input'])[:100]}: {error['msg'].removeprefix('Value error, ')}."
    example = str((field.examples or ["…"])[0] if field else "…")
    if example[0] in "[{":
        return line(said) + f"\n    in Pulumi.{stack}.yaml:  {key}: {example}"
    return line(said, f"set {path}{shlex.quote(key)} {shlex.quote(example)}")
