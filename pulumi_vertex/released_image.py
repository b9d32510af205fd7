"""`ReleasedImage`: an image by digest in a repository of one's own, protected from clean-up by a tag."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Required, TypedDict, Unpack

import pulumi

from .checks import Failures
from .definition import PACKAGE, Definition, Field, outputs_of, properties_of
from .engine_call import EngineCall
from .errors import PassingError, ProblemError, RefusedError
from .ownership import new_claim
from .registry import RegistryClient, Repository
from .resource import Resource, ResourceType, State
from .vertex_api import VertexApi
from .wire import UNKNOWN, Wire

PATH: Final = r"[a-z0-9.-]+(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+"
PATH_HINT: Final = "an image's path without tag or digest, such as europe-west4-docker.pkg.dev/my-project/images/digits"
_ID: Final = re.compile(rf"({PATH}):([\w.-]+)")


class ReleasedImageInputs(TypedDict, total=False):
    repository: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Path of the image in the repository that is to have it: "
                "REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE.",
                pattern=PATH,
                hint=PATH_HINT,
                replaces=True,
            ),
        ]
    ]
    digest: Required[
        Annotated[
            pulumi.Input[str],
            Field("The image by its digest.", pattern=r"sha256:[0-9a-f]{64}", hint="sha256:…, a digest"),
        ]
    ]
    tag: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Beginning of the tag, which protects the image where a clean-up policy keeps such tags. A hyphen and "
                "eight random digits follow, so that a replacement has a tag of its own. In one repository, each "
                "ReleasedImage needs another one.",
                pattern=r"\w[\w.-]{0,118}",
                hint="1 to 119 letters, digits, _, . and -, not beginning with . or -",
                replaces=True,
            ),
        ]
    ]
    sources: Annotated[
        pulumi.Input[Sequence[pulumi.Input[str]]],
        Field(
            "Paths of the same image elsewhere, from which it is copied if `repository` does not have it: the first "
            "that has it is taken.",
            pattern=PATH,
            hint=PATH_HINT,
        ),
    ]


class ReleasedImage(Resource):
    """An image by digest in a repository of one's own, protected from clean-up by a tag.

    Where the repository does not have the image, it is copied there with the same digest, all its platforms and
    attestations included. Layers are mounted where both repositories are in one registry. Without the tag, a refresh
    misses the image, and the next update brings it back. Deleting the resource removes the tag and leaves the image to
    the repository's clean-up policies.

    Whoever deploys needs roles/artifactregistry.reader on the sources and roles/artifactregistry.writer on the
    repository, and roles/artifactregistry.repoAdmin to remove the tag. Its id is REPOSITORY:TAG: give that to
    `pulumi import`. Timeouts: 60 minutes to create or update, changed with `custom_timeouts`.

        image = vertex.ReleasedImage(
            "digits",
            repository="europe-west4-docker.pkg.dev/prod/images/digits",
            digest="sha256:…",
            tag="release-digits",
            sources=["europe-west4-docker.pkg.dev/dev/images/digits"],
        )
        vertex.ModelVersion("digits", model_id="digits", image=image.image)

    https://cloud.google.com/artifact-registry/docs/repositories/cleanup-policy-overview
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[ReleasedImageInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def image(self) -> pulumi.Output[str]:
        """The image by digest in its repository: REPOSITORY@DIGEST."""
        output: pulumi.Output[str] = self._output("image")
        return output

    @property
    def tag_name(self) -> pulumi.Output[str]:
        """The whole tag, with its random digits."""
        output: pulumi.Output[str] = self._output("tagName")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:ReleasedImage",
    ReleasedImage.__doc__ or "",
    properties_of(ReleasedImageInputs),
    outputs_of(ReleasedImage),
)
ReleasedImage.definition = DEFINITION


class ReleasedImageType(ResourceType):
    definition = DEFINITION
    seconds: ClassVar = {"create": 3600.0, "update": 3600.0, "delete": 300.0, "read": 120.0}

    def check_together(self, inputs: Wire) -> Failures:
        if inputs.get("repository") in (inputs.get("sources") or []):
            return [("sources", "has the repository itself. Leave it out.")]
        return []

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        return _outputs(inputs, state.outputs.get("tagName", UNKNOWN) if state else UNKNOWN)

    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State:
        registry, repository = api.registry, Repository.of(inputs["repository"])
        tag = f"{inputs['tag']}-{new_claim()}"
        with api.lock(inputs["repository"]):
            provide(call, registry, inputs)
            registry.tag(call, repository, inputs["digest"], tag)
            # Earlier creates made the other ones: of a run that was killed, or of the state that this one replaces,
            # whose deletion then finds nothing to do.
            others = re.compile(rf"{re.escape(inputs['tag'])}-[0-9a-f]{{8}}")
            for other in registry.tags(call, repository):
                if others.fullmatch(other) and other != tag:
                    _untag(call, registry, repository, other)
        return State(f"{inputs['repository']}:{tag}", inputs, _outputs(inputs, tag))

    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        path, tag = _parsed(state.id)
        digest = api.registry.digest(call, Repository.of(path), tag)
        if not digest:
            return None
        imported = {"repository": path, "tag": re.sub(r"-[0-9a-f]{8}$", "", tag)}
        inputs = {**(state.inputs or imported), "digest": digest}
        return State(state.id, inputs, _outputs(inputs, tag))

    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        path, tag = _parsed(state.id)
        with api.lock(path):
            provide(call, api.registry, inputs)
            api.registry.tag(call, Repository.of(path), inputs["digest"], tag)
        return _outputs(inputs, tag)

    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        path, tag = _parsed(state.id)
        _untag(call, api.registry, Repository.of(path), tag)


def provide(call: EngineCall, registry: RegistryClient, inputs: Wire) -> None:
    """Copies the image into its repository from the first source that has it, if it is not there.

    Raises ProblemError, which names every place that was looked at.
    """
    target, digest = Repository.of(inputs["repository"]), inputs["digest"]
    if registry.digest(call, target, digest):
        return
    unread: list[str] = []
    for path in inputs.get("sources", []):
        source = Repository.of(path)
        try:
            found = registry.digest(call, source, digest)
        except (RefusedError, PassingError) as error:
            unread.append(str(error))
            continue
        if found:
            registry.copy(call, source, target, digest)
            call.log(f"copied {digest} from {source}")
            return
    places = ", ".join([str(target), *inputs.get("sources", [])])
    raise ProblemError(
        " ".join(
            [
                f"The image {digest} is in none of {places}. Build it again, or name another place that has it: "
                "`sources`, which the program may take from a setting such as imageSource.",
                *unread,
            ]
        )
    )


def _untag(call: EngineCall, registry: RegistryClient, repository: Repository, tag: str) -> None:
    """Removes a tag, which only keeps an image from clean-up: a failure is said and is no reason to stop."""
    try:
        registry.untag(call, repository, tag)
    except (RefusedError, PassingError) as error:
        call.warn(f"The tag {tag} stays in {repository}: {error}")


def _outputs(inputs: Wire, tag: str) -> Wire:
    known = UNKNOWN not in (inputs["repository"], inputs["digest"])
    return {"image": f"{inputs['repository']}@{inputs['digest']}" if known else UNKNOWN, "tagName": tag}


def _parsed(id_: str) -> tuple[str, str]:
    """Path and tag of an id. Raises ProblemError."""
    found = _ID.fullmatch(id_)
    if not found:
        raise ProblemError(
            f"{id_!r} is not the id of a released image. Give REPOSITORY:TAG, such as "
            "europe-west4-docker.pkg.dev/my-project/images/digits:release-digits-1a2b3c4d."
        )
    return found[1], found[found.lastindex or 0]
