"""`ModelVersion`: one version of a model in the Vertex AI Model Registry.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

from .. import operations
from ..checks import Failures
from ..engine_call import EngineCall
from ..errors import HalfMadeError, ProblemError, RefusedError
from ..ownership import alias_of, as_output, claim_of, claims_in, mark_of, new_claim, without_claims
from ..resource import ResourceType, State
from ..retries import HELD_AFTER_UNDEPLOY, Wait, converge
from ..vertex_api import VertexApi
from ..wire import UNKNOWN, Wire
from .container_spec import MARKER, check_container, container_of, container_spec, environment
from .inputs import DEFINITION

STOPPED_SECONDS: Final = 15.0  # for a last look after Ctrl-C
DEFAULT_ALIAS: Final = "default"  # exactly one version of a model holds it; Vertex AI gives it to the first
_NAME = re.compile(r"projects/([^/]+)/locations/([^/]+)/models/([^/@]+)@(\d+)")
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


class ModelVersionType(ResourceType):
    definition = DEFINITION
    seconds: ClassVar = {"create": 1800.0, "update": 900.0, "delete": 900.0, "read": 120.0}

    def check_together(self, inputs: Wire) -> Failures:
        return check_container(inputs)

    def preview(self, call: EngineCall, api: VertexApi, inputs: Wire, state: State | None) -> Wire:
        known = state.outputs if state else {}
        outputs = {p.wire: known.get(p.wire, UNKNOWN) for p in DEFINITION.outputs}
        if state and inputs.get("aliases") != state.inputs.get("aliases"):
            outputs["versionAliases"] = UNKNOWN
        return outputs

    def diff(self, state: State, inputs: Wire) -> dict[str, str]:
        if unfinished(state.id):  # only a create can give the version's own name as the id
            return {"name": "update_replace"}
        return super().diff(state, inputs)

    def create(self, call: EngineCall, api: VertexApi, inputs: Wire) -> State:
        name, taken_over = find_or_upload(call, api, inputs)
        claim = new_claim() if taken_over else ""
        try:
            settle(call, api, name, {}, inputs, claim)
            return State(name, inputs, _outputs(name, _existing(call, api, name), claim))
        except ProblemError as error:
            raise HalfMadeError(f"Version {name} was uploaded, but: {error}", name, _parts(name, claim)) from None

    def read(self, call: EngineCall, api: VertexApi, state: State) -> State | None:
        name, claim = state.id, claim_of(state.outputs)
        if model := unfinished(name):
            if operations.running(call, api, model):
                return state
            found = _find(call, api, model, marker(call.urn, state.inputs))
            if not found:
                return None
            name = f"{model}@{found[0]['versionId']}"
        parse(name)
        version = api.find(call, name)
        if version is None:
            return None
        if state.inputs:
            return State(name, _refreshed(state.inputs, version), _outputs(name, version, claim))
        claims = claims_in(version.get("versionAliases", []))  # an import takes over whose it is
        return State(name, _imported(version), _outputs(name, version, min(claims, default="")))

    def update(self, call: EngineCall, api: VertexApi, state: State, inputs: Wire) -> Wire:
        claim = claim_of(state.outputs)
        settle(call, api, state.id, state.inputs, inputs, claim)
        return _outputs(state.id, _existing(call, api, state.id), claim)

    def delete(self, call: EngineCall, api: VertexApi, state: State) -> None:
        """Deletes the version, unless a later create has taken it over: see ownership.py."""
        name, claim = state.id, claim_of(state.outputs)
        model = unfinished(name)
        if not model:
            parse(name)
            model = name.rsplit("@", 1)[0]
        with api.lock(model):
            if unfinished(name):
                operations.wait_for_others(call, api, model)
                mark = marker(call.urn, state.inputs)
                mine = [f"{model}@{v['versionId']}" for v in _find(call, api, model, mark)]
            else:
                mine = [name]
            for version in mine:
                claims = claims_in((api.find(call, version) or {}).get("versionAliases", []))
                if claims <= {claim}:
                    delete_version(call, api, version)
                else:
                    call.log(f"A later create has taken over {version}; it is left to that one.")


# --- names and versions -------------------------------------------------------------------------------------


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


def unfinished(id_: str) -> str:
    """The model of an id that names an upload instead of a version, because nobody waited for the end of the upload."""
    model, separator, _ = id_.partition("/operations/")
    return model if separator else ""


def versions(call: EngineCall, api: VertexApi, model: str) -> list[Wire]:
    """All versions of a model, oldest first; none if there is no such model."""
    return sorted(api.listed(call, f"{model}:listVersions", "models"), key=number)


def number(version: Wire) -> int:
    return int(version["versionId"])


def _existing(call: EngineCall, api: VertexApi, name: str) -> Wire:
    version = api.find(call, name)
    if version is None:
        raise ProblemError(f"The model version {name} is gone. Run `pulumi refresh`, then `pulumi up`.")
    return version


def _find(call: EngineCall, api: VertexApi, model: str, mark: str) -> list[Wire]:
    """The versions that carry a marker: one, or more where an upload was repeated because its answer got lost."""
    return [v for v in versions(call, api, model) if environment(v).get(MARKER) == mark]


def marker(urn: str, inputs: Wire) -> str:
    """What a version carries in its environment so that a create that was killed finds its own version again.

    The container spec is the one part of a version that never changes and is not merged with the model's on reading, as
    labels are.
    """
    return mark_of(DEFINITION, urn, inputs)


# --- create, update -----------------------------------------------------------------------------------------


def find_or_upload(call: EngineCall, api: VertexApi, inputs: Wire) -> tuple[str, bool]:
    """The full name of the version that the inputs describe, and whether it is the work of an earlier run.

    Raises HalfMadeError, with the upload's operation as the id, where an upload goes on that was not waited for.
    """
    model = f"{api.parent}/models/{inputs['modelId']}"
    mark = marker(call.urn, inputs)
    number = ""  # of the version
    operation = ""  # the upload of this run, while it runs
    started: list[str] = []

    def step() -> bool:
        nonlocal operation, number
        if found := _find(call, api, model, mark):
            number = str(found[0]["versionId"])
            for copy in found[1:]:
                delete_version(call, api, f"{model}@{copy['versionId']}")
        if number:
            return True
        if operations.running(call, api, model):
            operations.wait_for_others(call, api, model)
            return False
        body = upload_body(inputs, mark)
        if versions(call, api, model):
            body["parentModel"] = model
        else:
            body["modelId"] = inputs["modelId"]
        call.say(f"uploading {inputs['modelId']}")
        started.append(model)
        operation = str(api.change("POST", f"{api.parent}/models:upload", body)["name"])
        try:
            response = operations.wait(call, api, operation, f"uploading {inputs['modelId']}")
            number = str(response.get("modelVersionId", ""))
        except RefusedError:
            operation = ""
            raise
        operation = ""
        return False

    with api.lock(model):
        try:
            converge(call, step, also=(RACE,))
        except ProblemError as error:
            if started and not operation and not isinstance(error, RefusedError):
                operation = _running_upload(call, api, model)
            if not operation:
                raise
            raise HalfMadeError(
                f"{error} The upload goes on; the next `pulumi up` continues with it, and `pulumi destroy` waits for "
                "it and removes it.",
                f"{model}/operations/{operation.rpartition('/')[2]}",  # an answer would name the project by number
                _parts("", ""),
            ) from None
    return f"{model}@{number}", not started


def _running_upload(call: EngineCall, api: VertexApi, model: str) -> str:
    """The operation of an upload whose answer may have been lost, "" where none runs."""
    tidy = call.tidying(STOPPED_SECONDS, stoppable=False)
    try:
        return next((str(o["name"]) for o in operations.running(tidy, api, model)), "")
    except ProblemError:
        return f"{model}/operations/unknown"


def upload_body(inputs: Wire, mark: str) -> Wire:
    version = {
        "displayName": inputs.get("displayName") or inputs["modelId"],
        "versionDescription": inputs.get("versionDescription", ""),
        "artifactUri": inputs.get("artifactUri", ""),
        "labels": inputs.get("labels", {}),
        "containerSpec": container_spec(inputs, mark),
        "encryptionSpec": {"kmsKeyName": inputs["encryptionKey"]} if "encryptionKey" in inputs else None,
    }
    body: Wire = {"model": {key: value for key, value in version.items() if value}}
    if "serviceAccount" in inputs:
        body["serviceAccount"] = inputs["serviceAccount"]
    return body


def settle(call: EngineCall, api: VertexApi, name: str, old: Wire, new: Wire, claim: str) -> None:
    """Brings aliases, labels, description and display name to what `new` declares; `old` is what was declared.

    The claim is one more alias.
    """
    model, _ = name.rsplit("@", 1)
    dropped_labels = set(old.get("labels", {})) - set(new.get("labels", {}))
    patched: set[str] = set()

    def patch(path: str, target: str, value: Any) -> bool:
        patched.add(path)
        api.change("PATCH", target, {path: value}, updateMask=path)
        return False

    def step() -> bool:
        version = api.read(call, name)
        have, want = set(version.get("versionAliases", [])), set(new.get("aliases", []))
        want |= {alias_of(claim)} if claim else set()
        gone = (set(old.get("aliases", [])) | set(map(alias_of, claims_in(list(have))))) - want
        gone &= have
        if change := [*sorted(want - have), *(f"-{alias}" for alias in sorted(gone))]:
            api.change("POST", f"{name}:mergeVersionAliases", {"versionAliases": change})
            return False
        labels, there = new.get("labels", {}), version.get("labels", {})
        changed = any(there.get(key) != value for key, value in labels.items())
        # A label of the model shows on its versions too, so a dropped one may stay visible: it is patched once.
        if changed or ("labels" not in patched and dropped_labels & set(there)):
            return patch("labels", name, labels)
        description = new.get("versionDescription")
        if description is None and "versionDescription" in old:
            description = ""
        if description is not None and version.get("versionDescription", "") != description:
            return patch("versionDescription", name, description)
        display = new.get("displayName") or (new["modelId"] if "displayName" in old else None)
        if display is not None and version.get("displayName") != display:
            return patch("displayName", model, display)
        return True

    with api.lock(model):
        converge(call, step)


# --- read ---------------------------------------------------------------------------------------------------


def _outputs(name: str, version: Wire, claim: str) -> Wire:
    return {
        "name": name,
        "versionId": version["versionId"],
        "createTime": version.get("versionCreateTime", ""),
        "versionAliases": sorted(without_claims(version.get("versionAliases", []))),
        **as_output(claim),
    }


def _parts(name: str, claim: str) -> Wire:
    """The outputs of a version that could not be read."""
    version_id = name.rpartition("@")[2]
    return {"name": name, "versionId": version_id, "createTime": "", "versionAliases": [], **as_output(claim)}


def _refreshed(old: Wire, version: Wire) -> Wire:
    """The declared inputs with what drifted.

    The container is left as declared: it cannot drift, and Vertex AI need not spell it as the program did.
    """
    new, labels = dict(old), version.get("labels", {})
    if "aliases" in old:
        new["aliases"] = [alias for alias in old["aliases"] if alias in version.get("versionAliases", [])]
    if "labels" in old:
        new["labels"] = {key: labels[key] for key in old["labels"] if key in labels}
    if "versionDescription" in old:
        new["versionDescription"] = version.get("versionDescription", "")
    if "displayName" in old:
        new["displayName"] = version.get("displayName", "")
    return new


def _imported(version: Wire) -> Wire:
    model = version["name"].rsplit("/", 1)[-1].split("@")[0]
    found: Wire = {
        "modelId": model,
        **container_of(version.get("containerSpec", {})),
        "artifactUri": version.get("artifactUri"),
        "encryptionKey": version.get("encryptionSpec", {}).get("kmsKeyName"),
        "displayName": version.get("displayName") if version.get("displayName") != model else None,
        "versionDescription": version.get("versionDescription"),
        "aliases": sorted(a for a in without_claims(version.get("versionAliases", [])) if a != DEFAULT_ALIAS),
        "labels": version.get("labels"),
    }
    return {key: value for key, value in found.items() if value}


# --- delete -------------------------------------------------------------------------------------------------


def delete_version(call: EngineCall, api: VertexApi, name: str) -> None:
    """Deletes a version, and the model with its last version. To be called with the model's lock held."""
    model, version_id = name.rsplit("@", 1)

    def step() -> bool:
        found = versions(call, api, model)
        mine = next((v for v in found if v["versionId"] == version_id), None)
        if mine is None:
            return True
        others = [v for v in found if v is not mine]
        if operations.running(call, api, model):
            operations.wait_for_others(call, api, model)
            return False
        if not others:
            operation = api.change("DELETE", model)
        elif DEFAULT_ALIAS in mine.get("versionAliases", []):
            newest = f"{model}@{others[-1]['versionId']}"
            api.change("POST", f"{newest}:mergeVersionAliases", {"versionAliases": [DEFAULT_ALIAS]})
            return False
        else:
            operation = api.change("DELETE", f"{name}:deleteVersion")
        operations.wait(call, api, operation["name"], f"deleting version {version_id}")
        return False

    converge(call, step, also=(HELD_AFTER_UNDEPLOY, HALF_DELETED))
