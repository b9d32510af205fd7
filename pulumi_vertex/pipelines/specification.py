"""What pipeline jobs and schedules have in common: the run of a pipeline, its checks, and Vertex AI's PipelineJob.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, TypedDict

import pulumi

from ..checks import Failures
from ..definition import Field, Property, camel
from ..engine_call import EngineCall
from ..errors import ProblemError
from ..jobs.specification import known
from ..patterns import EMAIL, EMAIL_HINT, FOLDER, FOLDER_HINT, KMS_KEY, KMS_KEY_HINT
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire, unwrapped, wrapped_like
from . import template

POLICY: Final = "PIPELINE_FAILURE_POLICY_"
REPOSITORY: Final = "-kfp.pkg.dev/"


class PipelineInputs(TypedDict, total=False):
    """A run of a pipeline."""

    template: Annotated[
        pulumi.Input[str],
        Field(
            "Pipeline that kfp has compiled: the content of the file, or its path, relative to the program's folder. "
            "Comments and the order of its keys change nothing."
        ),
    ]
    template_uri: Annotated[
        pulumi.Input[str],
        Field(
            "Where a compiled pipeline is, instead of template: gs://BUCKET/OBJECT, which should be named after its "
            "content because a change of the object is not seen, or a version in a repository of the format KFP.",
            pattern=r"gs://[^/]+/.+|https://[a-z0-9-]+-kfp\.pkg\.dev/[^/]+/[^/]+/[^/]+/sha256:[0-9a-f]{64}",
            hint="gs://BUCKET/OBJECT, or https://LOCATION-kfp.pkg.dev/PROJECT/REPOSITORY/PACKAGE/sha256:… (a tag can "
            "move; `gcloud artifacts versions list` shows the versions of a package)",
        ),
    ]
    parameters: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[Any]]],
        Field(
            "Values of the pipeline's parameters by their names. They are compared with the template. Whoever may read "
            "the run sees them: a secret is encrypted in Pulumi's state, not there."
        ),
    ]
    input_artifacts: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field("Ids in Vertex ML Metadata of the artifacts that the pipeline takes, by their names in the pipeline."),
    ]
    pipeline_root: Annotated[
        pulumi.Input[str],
        Field(
            "Folder below which each run gets a folder of its own for what its tasks write; the template's own where "
            "absent.",
            pattern=FOLDER,
            hint=FOLDER_HINT,
        ),
    ]
    enable_caching: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether all tasks may take the outputs of earlier runs with the same inputs; the template decides for "
            "each task where absent."
        ),
    ]
    failure_policy: Annotated[
        pulumi.Input[str],
        Field(
            "FAIL_SLOW runs what does not depend on a failed task, FAIL_FAST starts no further task.",
            pattern="FAIL_SLOW|FAIL_FAST",
            hint="FAIL_SLOW or FAIL_FAST",
            default="FAIL_SLOW",
        ),
    ]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that the tasks run as; the project's default account of Compute Engine "
            "where absent, which may do much. Whoever deploys needs iam.serviceAccounts.actAs on it.",
            pattern=EMAIL,
            hint=EMAIL_HINT,
        ),
    ]
    encryption_key: Annotated[
        pulumi.Input[str | None],
        Field(
            "Cloud KMS key of the same region that encrypts the run and what it makes; Google's own where absent.",
            pattern=KMS_KEY,
            hint=KMS_KEY_HINT,
        ),
    ]


def replacing(properties: Iterable[Property], *names: str) -> tuple[Property, ...]:
    """The properties, of which those named replace the resource when they change."""
    wires = {camel(name) for name in names}
    return tuple(
        replace(p, field=replace(p.field, replaces=True)) if p.wire in wires else p
        for p in properties
    )  # fmt: skip


def resolved(inputs: Wire) -> Wire:
    """The inputs with the template as canonical JSON. What is no template stays, for `check_run` to say so."""
    given = unwrapped(inputs.get("template"))
    if not isinstance(given, str) or given == UNKNOWN:
        return inputs
    try:
        text = template.canonical(template.parsed(template.content(given)))
    except ProblemError:
        return inputs
    return {**inputs, "template": wrapped_like(text, inputs["template"])}


def check_run(inputs: Wire) -> Failures:
    """What several properties of a run together can be wrong about."""
    if ("template" in inputs) == ("templateUri" in inputs):
        what = "is given beside templateUri" if "template" in inputs else "is missing, and templateUri too"
        return [("template", f"{what}. Give one of the two. {template.COMPILE}.")]
    given = inputs.get("template")
    if not isinstance(given, str) or given == UNKNOWN:
        return []
    try:
        spec = template.parsed(template.content(given))
    except ProblemError as error:
        return [("template", str(error))]
    return check_spec(spec, inputs)


def check_spec(spec: Wire, inputs: Wire) -> Failures:
    """What is wrong with a run of a known pipeline."""
    failures = template.check_values(spec, inputs) if inputs.get("parameters") != UNKNOWN else []
    if not inputs.get("pipelineRoot") and not spec.get("defaultPipelineRoot"):
        failures.append(("pipelineRoot", "is missing, and the template has none of its own. Give gs://BUCKET/FOLDER."))
    return failures


def complete(call: EngineCall, api: VertexApi, inputs: Wire, *, preview: bool = False) -> Wire:
    """The inputs with the template that they name by its address, compared with them. Raises ProblemError.

    A preview may look before another resource has uploaded the template, and then learns nothing.
    """
    uri = inputs.get("templateUri")
    if not uri or uri == UNKNOWN:
        return inputs
    text = api.template(call, uri)
    if text is None:
        if preview:
            return inputs
        raise ProblemError(f"There is no template at {uri}, or the credentials may not see it. Upload it first.")
    try:
        spec = template.parsed(text)
    except ProblemError as error:
        raise ProblemError(f"{uri} {error}") from None
    if failures := check_spec(spec, inputs):
        raise ProblemError("\n".join(f"{path} {said}" for path, said in failures))
    return {**inputs, "template": template.canonical(spec)}


def spec_of(inputs: Wire) -> Wire:
    """The PipelineSpec of complete inputs, with the caching that they ask for."""
    spec = template.parsed(inputs["template"])
    return template.with_caching(spec, inputs["enableCaching"]) if "enableCaching" in inputs else spec


def root_of(inputs: Wire) -> str:
    """The pipeline root, "" where only a template that is not read says it."""
    if given := inputs.get("pipelineRoot"):
        return str(given)
    return str(template.parsed(inputs["template"]).get("defaultPipelineRoot", "")) if inputs.get("template") else ""


def job_of(inputs: Wire) -> Wire:
    """Vertex AI's PipelineJob of complete inputs, without names and labels."""
    policy = inputs.get("failurePolicy")
    uri = inputs.get("templateUri", "")
    runtime = {
        "gcsOutputDirectory": root_of(inputs),
        "parameterValues": inputs.get("parameters"),
        "inputArtifacts": {name: {"artifactId": id_} for name, id_ in inputs.get("inputArtifacts", {}).items()},
        "failurePolicy": f"{POLICY}{policy}" if policy else None,
    }
    return _given(
        {
            "pipelineSpec": spec_of(inputs),
            "runtimeConfig": _given(runtime),
            "serviceAccount": inputs.get("serviceAccount"),
            # Vertex AI notes the version from it. It knows no gs:// here.
            "templateUri": uri if REPOSITORY in uri else None,
            "encryptionSpec": {"kmsKeyName": key} if (key := inputs.get("encryptionKey")) else None,
        }
    )


def run_of(job: Wire) -> Wire:
    """The inputs that a PipelineJob was made from, None where it has nothing to say."""
    runtime = job.get("runtimeConfig", {})
    uri, version = str(job.get("templateUri") or ""), job.get("templateMetadata", {}).get("version")
    if uri and version:
        uri = f"{uri.rpartition('/')[0]}/{version}"
    policy = str(runtime.get("failurePolicy") or "").removeprefix(POLICY)
    return {
        "template": None if uri else template.canonical(job.get("pipelineSpec", {})),
        "templateUri": uri or None,
        "parameters": runtime.get("parameterValues"),
        "inputArtifacts": {name: one.get("artifactId") for name, one in runtime.get("inputArtifacts", {}).items()},
        "pipelineRoot": runtime.get("gcsOutputDirectory"),
        "failurePolicy": None if policy in ("", "UNSPECIFIED") else policy,
        "serviceAccount": job.get("serviceAccount"),
        "encryptionKey": job.get("encryptionSpec", {}).get("kmsKeyName"),
    }


def previewed(call: EngineCall, api: VertexApi, inputs: Wire) -> None:
    """Compares a preview's inputs with the template that they name. Raises ProblemError."""
    if known(inputs.get("templateUri")):
        complete(call, api, inputs, preview=True)


def _given(value: Wire) -> Wire:
    return {key: item for key, item in value.items() if item not in (None, "", [], {})}
