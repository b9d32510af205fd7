"""`ModelVersion`: one version of a model in the Vertex AI Model Registry."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are
# required.

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Required, TypedDict, Unpack

import pulumi

from .api import HELD_AFTER_UNDEPLOY, Api, RefusedError, Wait, Work, converge
from .definition import (
    PACKAGE,
    UNKNOWN,
    Definition,
    Failures,
    Field,
    ProblemError,
    Resource,
    Wire,
    outputs_of,
    properties_of,
    with_defaults,
)

if TYPE_CHECKING:
    from google.cloud.aiplatform_v1 import types

Texts = Sequence[pulumi.Input[str]]
DEFAULT_ALIAS: Final = "default"  # exactly one version of a model holds it; Vertex AI gives it to the first
MARKER: Final = "PULUMI_VERTEX_VERSION"  # see `marker`
_NAME = re.compile(r"projects/([^/]+)/locations/([^/]+)/models/([^/@]+)@(\d+)")
_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


class Probe(TypedDict, total=False):
    """How Vertex AI asks a container whether it is well: a command in it, or an HTTP GET.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/ModelContainerSpec#Probe
    """

    command: Annotated[pulumi.Input[Texts], Field("Command to run in the container; exit status 0 is well.", low=1)]
    path: Annotated[
        pulumi.Input[str],
        Field("Path to GET; a status from 200 to 399 is well.", pattern=r"/.*", hint="a path from /"),
    ]
    port: Annotated[pulumi.Input[int], Field("Port to GET from; the container's own if absent.", low=1, high=65535)]
    period_seconds: Annotated[pulumi.Input[int], Field("Seconds from one probe to the next.", low=1)]
    timeout_seconds: Annotated[pulumi.Input[int], Field("Seconds after which a probe has failed.", low=1)]
    initial_delay_seconds: Annotated[pulumi.Input[int], Field("Seconds before the first probe.", low=0)]
    failure_threshold: Annotated[pulumi.Input[int], Field("Failures in a row that count as failed.", low=1)]
    success_threshold: Annotated[pulumi.Input[int], Field("Successes in a row that count as well.", low=1)]


class ModelVersionInputs(TypedDict, total=False):
    model_id: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Id of the model that this is a version of; the model is made with its first version. "
                "https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models/upload",
                pattern=r"[a-z_][a-z0-9_-]{0,62}",
                hint="1 to 63 of a-z, 0-9, _ and -, beginning with a letter or _",
                replaces=True,
            ),
        ]
    ]
    image: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Serving image in Artifact Registry, by digest: "
                "REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE@sha256:…. A tag is refused: Vertex AI copies the "
                "image once, and a tag that moves later would change nothing.",
                replaces=True,
            ),
        ]
    ]
    command: Annotated[pulumi.Input[Texts], Field("Entry point, instead of the image's ENTRYPOINT.", replaces=True)]
    args: Annotated[
        pulumi.Input[Texts],
        Field(
            "Arguments, instead of the image's CMD. $(NAME) stands for an environment variable.",
            replaces=True,
        ),
    ]
    env: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Environment variables of the container. Vertex AI adds AIP_* ones and shows all of them to whoever may "
            "read the model: a secret is encrypted in Pulumi's state, not there.",
            pattern=r"(?!AIP_)[A-Za-z_][A-Za-z0-9_]*",
            hint="letters, digits and _, not beginning with a digit or AIP_, which is Vertex AI's own",
            high=99,
            replaces=True,
        ),
    ]
    port: Annotated[
        pulumi.Input[int],
        Field("Port that the container listens on.", low=1, high=65535, default=8080, replaces=True),
    ]
    predict_route: Annotated[
        pulumi.Input[str],
        Field(
            "Path that predictions are POSTed to. Vertex AI's own default where absent.",
            pattern=r"/.*",
            hint="a path from /",
            replaces=True,
        ),
    ]
    health_route: Annotated[
        pulumi.Input[str],
        Field(
            "Path that Vertex AI GETs to learn whether the container can answer. Vertex AI's own default where absent.",
            pattern=r"/.*",
            hint="a path from /",
            replaces=True,
        ),
    ]
    startup_probe: Annotated[pulumi.Input[Probe], Field("Asked until it is well, before all others.", replaces=True)]
    health_probe: Annotated[pulumi.Input[Probe], Field("Asked before traffic is sent.", replaces=True)]
    liveness_probe: Annotated[
        pulumi.Input[Probe],
        Field("Asked all the time; the container is restarted when it fails.", replaces=True),
    ]
    shared_memory_mb: Annotated[
        pulumi.Input[int], Field("Size of /dev/shm in MB (64 where absent).", low=1, replaces=True)
    ]
    deployment_timeout_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "Seconds that a deployment of this version may take, two hours at most.",
            low=1,
            high=7200,
            replaces=True,
        ),
    ]
    artifact_uri: Annotated[
        pulumi.Input[str],
        Field(
            "Folder with the model's files; the container finds a copy under AIP_STORAGE_URI.",
            pattern=r"gs://[^/]+(/.*)?",
            hint="gs://BUCKET/FOLDER",
            replaces=True,
        ),
    ]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that reads image and files during the upload; the Vertex AI service "
            "agent where absent. What the container runs as is said in Deployed.",
            pattern=r"[^@\s]+@[^@\s]+",
            hint="the e-mail of a service account",
        ),
    ]
    display_name: Annotated[
        pulumi.Input[str],
        Field(
            "Name of the model in the console, its id where absent. It belongs to the model: give all versions the "
            "same."
        ),
    ]
    version_description: Annotated[pulumi.Input[str], Field("What this version is, for people.")]
    aliases: Annotated[
        pulumi.Input[Texts],
        Field(
            "Names that point at this version, moved here from another version if one holds them. Only those given "
            "here are touched; `default` is Vertex AI's own.",
            pattern=r"(?!default$)[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]",
            hint="2 to 128 letters, digits and -, beginning with a small letter, ending in a small letter or "
            "digit, and not `default`, which Vertex AI moves itself",
            unordered=True,
        ),
    ]
    labels: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[str]]],
        Field(
            "Labels of this version; labels of the model itself are left alone.",
            pattern=r"[a-z][a-z0-9_-]{0,62}",
            hint="1 to 63 of a-z, 0-9, _ and -, beginning with a letter",
            high=64,
        ),
    ]


class ModelVersion(Resource):
    """One version of a model in the Vertex AI Model Registry: an image by digest and how it serves.

    Whatever is in the container cannot change: a change makes a new version first and deletes the old one last.
    Aliases, labels, the description and the display name change in place. Its id is its full name,
    `projects/PROJECT/locations/LOCATION/models/ID@VERSION`: give that to `Deployed` and to `pulumi import`.

    Deleting it deletes the model with its last version. If it holds the alias `default`, that moves to the newest
    version that remains. The version must not be deployed; the provider waits up to 3 minutes for an endpoint to let go
    of it. Timeouts: 30 minutes to create, 15 to update or delete, changed with `custom_timeouts`.

        version = vertex.ModelVersion("digits", model_id="digits", image=image.ref, health_route="/health")

    https://cloud.google.com/vertex-ai/docs/model-registry/versioning
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[ModelVersionInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def name(self) -> pulumi.Output[str]:
        """Full name with the version: projects/PROJECT/locations/LOCATION/models/ID@VERSION."""
        output: pulumi.Output[str] = self._output("name")
        return output

    @property
    def version_id(self) -> pulumi.Output[str]:
        """Number of the version, counted by Vertex AI from 1."""
        output: pulumi.Output[str] = self._output("versionId")
        return output

    @property
    def create_time(self) -> pulumi.Output[str]:
        """When the version was made, as RFC 3339."""
        output: pulumi.Output[str] = self._output("createTime")
        return output

    @property
    def version_aliases(self) -> pulumi.Output[Sequence[str]]:
        """All aliases in force, also those that this program does not declare."""
        output: pulumi.Output[Sequence[str]] = self._output("versionAliases")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:ModelVersion",
    ModelVersion.__doc__ or "",
    properties_of(ModelVersionInputs),
    outputs_of(ModelVersion),
)
ModelVersion.definition = DEFINITION

SECONDS: Final = {"create": 1800.0, "update": 900.0, "delete": 900.0, "read": 120.0}
IMMUTABLE: Final = tuple(p.wire for p in DEFINITION.inputs if p.field.replaces)
RACE: Final = Wait(
    frozenset({"ALREADY_EXISTS"}),
    "",
    120,
    "somebody else is making the same model",
    "https://google.aip.dev/133",
)
HALF_DELETED: Final = Wait(
    frozenset({"INTERNAL"}),
    "",
    30,
    "Vertex AI answers with an internal error after it has deleted a version",
    "https://github.com/googleapis/python-aiplatform/issues/2675",
)


# --- check --------------------------------------------------------------------------------------------------


def check(inputs: Wire) -> Failures:
    """What several properties, or more than a pattern, can be wrong about."""
    failures: Failures = []
    image = inputs.get("image")
    if isinstance(image, str) and image != UNKNOWN and not _DIGEST.fullmatch(image):
        failures.append(
            (
                "image",
                f"must be given by digest, NAME@sha256:…, not {image!r}: a tag can move, and Vertex AI copies the "
                "image only once. Use the digest that the build gives (`ref` of a docker_build.Image), or ask for "
                "it with `gcloud artifacts docker images describe IMAGE:TAG --format='value(image_summary.digest)'`.",
            )
        )
    env = inputs.get("env")
    if isinstance(env, dict) and MARKER in env:
        failures.append((f"env.{MARKER}", "is the provider's own variable. Choose another name."))
    for name in ("startupProbe", "healthProbe", "livenessProbe"):
        probe = inputs.get(name)
        if isinstance(probe, dict) and ("command" in probe) == ("path" in probe):
            failures.append((name, "needs either a command or a path, and not both."))
        if isinstance(probe, dict) and "port" in probe and "path" not in probe:
            failures.append((f"{name}.port", "has no meaning without a path. Leave it out."))
    return failures


# --- create, update -----------------------------------------------------------------------------------------


def marker(urn: str, inputs: Wire) -> str:
    """What a version carries in its environment so that a create that was killed finds its own version again.

    The container spec is the one part of a version that never changes and is not merged with the model's on reading, as
    labels are. Two resources of the same content are two versions: the URN is part of it.
    """
    filled = with_defaults(DEFINITION.inputs, inputs)
    said = json.dumps([urn, {name: filled.get(name) for name in IMMUTABLE}], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def create(work: Work, api: Api, inputs: Wire) -> str:
    """Finds or uploads the version and returns its full name."""
    model = f"{api.parent}/models/{inputs['modelId']}"
    mark = marker(work.urn, inputs)
    uploaded: list[str] = []

    def step() -> bool:
        mine = sorted((v for v in versions(work, api, model) if environment(v).get(MARKER) == mark), key=number)
        if mine or uploaded:
            uploaded[:] = [mine[0].version_id] if mine else uploaded
            for copy in mine[1:]:  # an upload that was repeated because its answer got lost
                delete(work, api, f"{model}@{copy.version_id}", locked=True)
            return True
        if api.running(work, model):
            api.wait_for_others(work, model)
            return False
        uploaded.extend(_upload(work, api, model, inputs, mark))
        return False

    with api.lock(model):
        converge(work, step, also=(RACE,))
    return f"{model}@{uploaded[0]}"


def _upload(work: Work, api: Api, model: str, inputs: Wire, mark: str) -> list[str]:
    from google.cloud.aiplatform_v1 import types

    version = types.Model(
        display_name=inputs.get("displayName") or inputs["modelId"],
        version_description=inputs.get("versionDescription", ""),
        artifact_uri=inputs.get("artifactUri", ""),
        labels=inputs.get("labels", {}),
        container_spec=container_spec(inputs, mark),
    )
    request = types.UploadModelRequest(
        parent=api.parent, model=version, service_account=inputs.get("serviceAccount", "")
    )
    if versions(work, api, model):
        request.parent_model = model
    else:
        request.model_id = inputs["modelId"]
    work.say(f"uploading {inputs['modelId']}")
    operation = api.call(api.models.upload_model, request).operation.name
    response = api.wait(work, operation, f"uploading {inputs['modelId']}")
    return [str(response["modelVersionId"])] if response.get("modelVersionId") else []


def settle(work: Work, api: Api, name: str, old: Wire, new: Wire) -> None:
    """Brings aliases, labels, description and display name to what `new` declares; `old` is what was declared."""
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import field_mask_pb2

    model, _ = name.rsplit("@", 1)
    dropped_labels = set(old.get("labels", {})) - set(new.get("labels", {}))
    patched: set[str] = set()

    def patch(path: str, target: str, **values: Any) -> bool:
        patched.add(path)
        mask = field_mask_pb2.FieldMask(paths=[path])
        request = types.UpdateModelRequest(model=types.Model(name=target, **values), update_mask=mask)
        api.call(api.models.update_model, request)
        return False

    def step() -> bool:
        version = api.read(work, api.models.get_model, types.GetModelRequest(name=name))
        have, want = set(version.version_aliases), set(new.get("aliases", []))
        gone = (set(old.get("aliases", [])) - want) & have
        if change := [*sorted(want - have), *(f"-{alias}" for alias in sorted(gone))]:
            request = types.MergeVersionAliasesRequest(name=name, version_aliases=change)
            api.call(api.models.merge_version_aliases, request)
            return False
        labels = new.get("labels", {})
        changed = any(version.labels.get(key) != value for key, value in labels.items())
        # A label of the model shows on its versions too, so a dropped one may stay visible: it is patched
        # once.
        if changed or ("labels" not in patched and dropped_labels & set(version.labels)):
            return patch("labels", name, labels=labels)
        description = new.get("versionDescription")
        if description is None and "versionDescription" in old:
            description = ""
        if description is not None and version.version_description != description:
            return patch("version_description", name, version_description=description)
        display = new.get("displayName") or (new["modelId"] if "displayName" in old else None)
        if display is not None and version.display_name != display:
            return patch("display_name", model, display_name=display)
        return True

    with api.lock(model):
        converge(work, step)


# --- read ---------------------------------------------------------------------------------------------------


def parse(name: str) -> tuple[str, str, str, str]:
    """Project, location, model id and version of a full name. Raises ProblemError."""
    found = _NAME.fullmatch(name)
    if not found:
        raise ProblemError(
            f"{name!r} is not the name of a model version. Give "
            "projects/PROJECT/locations/LOCATION/models/ID@VERSION, with the version as a number; `gcloud ai models "
            "list-version ID --region LOCATION` shows them."
        )
    project, location, model, version = found.groups()
    return project, location, model, version


def versions(work: Work, api: Api, model: str) -> "list[types.Model]":
    """All versions of a model, none if there is no such model."""
    from google.cloud.aiplatform_v1 import types

    try:
        found: list[types.Model] = api.read(
            work, api.models.list_model_versions, types.ListModelVersionsRequest(name=model)
        )
    except RefusedError as error:
        if error.status == "NOT_FOUND":
            return []
        raise
    return found


def number(version: "types.Model") -> int:
    return int(version.version_id)


def environment(version: "types.Model") -> dict[str, str]:
    return {variable.name: variable.value for variable in version.container_spec.env}


def get(work: Work, api: Api, name: str) -> "types.Model | None":
    from google.cloud.aiplatform_v1 import types

    parse(name)
    try:
        version: types.Model = api.read(work, api.models.get_model, types.GetModelRequest(name=name))
    except RefusedError as error:
        if error.status == "NOT_FOUND":
            return None
        raise
    return version


def outputs(name: str, version: "types.Model") -> Wire:
    return {
        "name": name,
        "versionId": version.version_id,
        "createTime": _rfc3339(version.version_create_time),
        "versionAliases": sorted(version.version_aliases),
    }


def refreshed(old: Wire, version: "types.Model") -> Wire:
    """The inputs as Vertex AI has them now: what was declared, with what drifted; everything after an import.

    The container is left as declared: it cannot drift, and Vertex AI need not spell it as the program did.
    """
    if not old:
        return imported(version)
    new = dict(old)
    if "aliases" in old:
        new["aliases"] = [alias for alias in old["aliases"] if alias in version.version_aliases]
    if "labels" in old:
        new["labels"] = {key: version.labels[key] for key in old["labels"] if key in version.labels}
    if "versionDescription" in old:
        new["versionDescription"] = version.version_description
    if "displayName" in old:
        new["displayName"] = version.display_name
    return new


def imported(version: "types.Model") -> Wire:
    spec = version.container_spec
    model = version.name.rsplit("/", 1)[-1].split("@")[0]
    found: Wire = {
        "modelId": model,
        "image": spec.image_uri,
        "command": list(spec.command),
        "args": list(spec.args),
        "env": {name: value for name, value in environment(version).items() if name != MARKER},
        "port": spec.ports[0].container_port if spec.ports else None,
        "predictRoute": spec.predict_route,
        "healthRoute": spec.health_route,
        "startupProbe": _probe_inputs(spec.startup_probe) if "startup_probe" in spec else None,
        "healthProbe": _probe_inputs(spec.health_probe) if "health_probe" in spec else None,
        "livenessProbe": _probe_inputs(spec.liveness_probe) if "liveness_probe" in spec else None,
        "sharedMemoryMb": spec.shared_memory_size_mb,
        "deploymentTimeoutSeconds": _seconds(spec.deployment_timeout),
        "artifactUri": version.artifact_uri,
        "displayName": version.display_name if version.display_name != model else None,
        "versionDescription": version.version_description,
        "aliases": sorted(alias for alias in version.version_aliases if alias != DEFAULT_ALIAS),
        "labels": dict(version.labels),
    }
    return {key: value for key, value in found.items() if value}


# --- delete -------------------------------------------------------------------------------------------------


def delete(work: Work, api: Api, name: str, *, locked: bool = False) -> None:
    """Deletes the version, and the model with its last version. That it is gone already is no error."""
    from google.cloud.aiplatform_v1 import types

    parse(name)
    model, version_id = name.rsplit("@", 1)

    def step() -> bool:
        found = versions(work, api, model)
        mine = next((v for v in found if v.version_id == version_id), None)
        if mine is None:
            return True
        others = [v for v in found if v is not mine]
        if api.running(work, model):
            api.wait_for_others(work, model)
            return False
        if not others:
            operation = api.call(api.models.delete_model, types.DeleteModelRequest(name=model))
        elif DEFAULT_ALIAS in mine.version_aliases:
            newest = f"{model}@{max(others, key=number).version_id}"
            request = types.MergeVersionAliasesRequest(name=newest, version_aliases=[DEFAULT_ALIAS])
            api.call(api.models.merge_version_aliases, request)
            return False
        else:
            operation = api.call(api.models.delete_model_version, types.DeleteModelVersionRequest(name=name))
        api.wait(work, operation.operation.name, f"deleting version {version_id}")
        return False

    def work_through() -> None:
        converge(work, step, also=(HELD_AFTER_UNDEPLOY, HALF_DELETED))

    if locked:
        work_through()
    else:
        with api.lock(model):
            work_through()


# --- the container spec -------------------------------------------------------------------------------------


def container_spec(inputs: Wire, mark: str) -> "types.ModelContainerSpec":
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import duration_pb2

    env = {**inputs.get("env", {}), MARKER: mark}
    spec = types.ModelContainerSpec(
        image_uri=inputs["image"],
        command=inputs.get("command", []),
        args=inputs.get("args", []),
        env=[types.EnvVar(name=name, value=value) for name, value in env.items()],
        ports=[types.Port(container_port=inputs["port"])] if "port" in inputs else [],
        predict_route=inputs.get("predictRoute", ""),
        health_route=inputs.get("healthRoute", ""),
        shared_memory_size_mb=inputs.get("sharedMemoryMb", 0),
    )
    for name in ("startup", "health", "liveness"):
        if probe := inputs.get(f"{name}Probe"):
            setattr(spec, f"{name}_probe", _probe(probe))
    if "deploymentTimeoutSeconds" in inputs:
        spec.deployment_timeout = duration_pb2.Duration(seconds=inputs["deploymentTimeoutSeconds"])
    return spec


def _probe(inputs: Wire) -> "types.Probe":
    from google.cloud.aiplatform_v1 import types

    probe = types.Probe(
        period_seconds=inputs.get("periodSeconds", 0),
        timeout_seconds=inputs.get("timeoutSeconds", 0),
        initial_delay_seconds=inputs.get("initialDelaySeconds", 0),
        failure_threshold=inputs.get("failureThreshold", 0),
        success_threshold=inputs.get("successThreshold", 0),
    )
    if "command" in inputs:
        probe.exec_ = types.Probe.ExecAction(command=inputs["command"])
    else:
        probe.http_get = types.Probe.HttpGetAction(path=inputs["path"], port=inputs.get("port", 0))
    return probe


def _probe_inputs(probe: "types.Probe") -> Wire:
    found = {
        "command": list(probe.exec_.command),
        "path": probe.http_get.path,
        "port": probe.http_get.port,
        "periodSeconds": probe.period_seconds,
        "timeoutSeconds": probe.timeout_seconds,
        "initialDelaySeconds": probe.initial_delay_seconds,
        "failureThreshold": probe.failure_threshold,
        "successThreshold": probe.success_threshold,
    }
    return {key: value for key, value in found.items() if value}


# proto-plus hands out datetime's types, and its annotations say protobuf's: hence Any.


def _rfc3339(moment: Any) -> str:
    return str(moment.rfc3339()) if moment else ""


def _seconds(duration: Any) -> int | None:
    return int(duration.total_seconds()) if duration else None
