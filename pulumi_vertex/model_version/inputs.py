"""`ModelVersion` as programs see it: its inputs and outputs."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Required, TypedDict, Unpack

import pulumi

from ..definition import PACKAGE, Definition, Field, outputs_of, properties_of
from ..patterns import EMAIL, EMAIL_HINT, FOLDER, FOLDER_HINT, KMS_KEY, KMS_KEY_HINT, LABEL_KEY, LABEL_KEY_HINT
from ..resource import Resource
from .container_spec import Probe, Texts


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
        pulumi.Input[str | None],
        Field(
            "Folder with the model's files; the container finds a copy under AIP_STORAGE_URI.",
            pattern=FOLDER,
            hint=FOLDER_HINT,
            replaces=True,
        ),
    ]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that reads image and files during the upload; the Vertex AI service "
            "agent where absent. What the container runs as is said in Deployed.",
            pattern=EMAIL,
            hint=EMAIL_HINT,
        ),
    ]
    encryption_key: Annotated[
        pulumi.Input[str | None],
        Field(
            "Cloud KMS key of the same region that encrypts the version; Google's own where absent. Vertex AI's "
            "service agent needs roles/cloudkms.cryptoKeyEncrypterDecrypter on it. "
            "https://cloud.google.com/vertex-ai/docs/general/cmek",
            pattern=KMS_KEY,
            hint=KMS_KEY_HINT,
            replaces=True,
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
            pattern=LABEL_KEY,
            hint=LABEL_KEY_HINT,
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
