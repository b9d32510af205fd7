"""The registry of model versions: a folder on this machine, or Vertex AI's Model Registry."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training.files import UsageError, local_path

DEFAULT = "default"  # the alias of the version that serves
MODEL_ID = "census"  # of the model that a job on Vertex AI registers where no registry is named
_MODEL = re.compile(r"projects/[^/]+/locations/(?P<region>[a-z0-9-]+)/models/(?P<id>[a-z_][a-z0-9_-]{0,62})")
_JOB = re.compile(r"(?P<parent>projects/[^/]+/locations/[a-z0-9-]+)/pipelineJobs/[^/]+")
# Replaces the address of Vertex AI, as it does for gcloud; the sandbox sets it for the containers of its jobs.
ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"
# How the serving image is asked, as infra/prediction.py declares it.
PREDICT_ROUTE, HEALTH_ROUTE = "/predictions/people", "/ping"
DEPLOYMENT_TIMEOUT = "1800s"
UPLOAD_SECONDS, POLL_SECONDS = 600.0, 2.0


@dataclass(frozen=True)
class Version:
    """A registered version. model: the first digits of its program's SHA-256. location: its folder, or a gs:// URI."""

    name: str
    model: str
    location: str

    def folder(self) -> Path:
        """Returns the folder with model.pt2 and contract.json. Raises UsageError."""
        return local_path(self.location)


@dataclass(frozen=True)
class Candidate:
    """A model that is to become the default version.

    folder, uri: the same place as a path and as an artifact's URI. model: the first digits of its program's SHA-256.
    metrics: its figures on the evaluation data, whose SHA-256 is `data`. champion: the default version that it was
    compared with, or "". image: serves it.
    """

    folder: Path
    uri: str
    model: str
    metrics: Mapping[str, float]
    data: str
    champion: str
    image: str


class Registry(Protocol):
    """The versions of one model."""

    def default(self) -> Version | None:
        """Returns the version with the alias `default`. Raises UsageError."""

    def register(self, candidate: Candidate) -> str:
        """Adds a version with the alias `default`, and returns its name.

        Raises UsageError, also if the default version is not the one that the candidate was compared with.
        """


def open_registry(registry: str, job: str) -> Registry:
    """Returns the registry that a parameter names.

    registry: a folder, `projects/…/locations/…/models/ID`, or "" for the model `census` in the project and region of
    the pipeline job. job: the resource name of the job. Raises UsageError.
    """
    if not registry and (match := _JOB.fullmatch(job)):
        registry = f"{match['parent']}/models/{MODEL_ID}"
    if not registry:
        raise UsageError("no registry is named; give a folder, or projects/PROJECT/locations/REGION/models/ID")
    if not registry.startswith("projects/"):
        return FolderRegistry(local_path(registry))
    if not (match := _MODEL.fullmatch(registry)):
        raise UsageError(f"{registry} is not a model; write projects/PROJECT/locations/REGION/models/ID")
    return VertexRegistry(registry, os.environ.get(ENDPOINT) or f"https://{match['region']}-aiplatform.googleapis.com")


def check_champion(default: Version | None, candidate: Candidate) -> None:
    """Raises UsageError if another version became the default after the comparison."""
    if (name := default.name if default else "") != candidate.champion:
        was = f"version {candidate.champion}" if candidate.champion else "absent"
        raise UsageError(f"the default version is {name} now and was {was} when the models were compared; run it again")


class FolderRegistry:
    """A folder with registry.json, which has the versions, their evaluations and the aliases, and versions/NAME.

    A version is copied before registry.json names it, and registry.json is replaced in one step.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "registry.json"

    def default(self) -> Version | None:
        return self._default(self._read())

    def register(self, candidate: Candidate) -> str:
        with self._locked():
            content = self._read()
            check_champion(self._default(content), candidate)
            name = str(max(map(int, content["versions"]), default=0) + 1)
            target = self._folder / "versions" / name
            shutil.rmtree(target, ignore_errors=True)  # a killed registration left it
            shutil.copytree(candidate.folder, target)
            content["versions"][name] = {
                "model": candidate.model,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "evaluation": {"data": candidate.data, **candidate.metrics},
            }
            content["aliases"][DEFAULT] = name
            self._write(content)
        return name

    def _default(self, content: dict[str, Any]) -> Version | None:
        name = content["aliases"].get(DEFAULT)
        if name is None:
            return None
        try:
            return Version(name, content["versions"][name]["model"], str(self._folder / "versions" / name))
        except (KeyError, TypeError):
            raise UsageError(f"{self._file}: the alias {DEFAULT} names the version {name!r}, which is absent") from None

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"versions": {}, "aliases": {}}
        except ValueError as error:
            raise UsageError(f"{self._file} is not JSON: {error}; repair it, or name another registry") from None
        if not (isinstance(content, dict) and all(isinstance(content.get(x), dict) for x in ("versions", "aliases"))):
            raise UsageError(f"{self._file} has no objects `versions` and `aliases`; name another registry")
        return content

    def _write(self, content: dict[str, Any]) -> None:
        partial = self._file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other runs from registering."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class VertexRegistry:
    """A model of Vertex AI's Model Registry over REST, with Application Default Credentials.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models/upload
    """

    def __init__(self, model: str, endpoint: str) -> None:
        """endpoint: URL of Vertex AI; one without TLS is a sandbox's, which takes no credentials."""
        self._model, self._endpoint = model, endpoint.rstrip("/")
        self._session = _session(with_credentials=self._endpoint.startswith("https://"))

    def default(self) -> Version | None:
        found = self._ask("GET", f"{self._model}@{DEFAULT}")
        if found is None:
            return None
        return Version(
            str(found["versionId"]), found.get("labels", {}).get("model", ""), str(found.get("artifactUri", ""))
        )

    def register(self, candidate: Candidate) -> str:
        check_champion(self.default(), candidate)
        parent, _, model_id = self._model.partition("/models/")
        # Labels take small letters, digits, _ and -.
        figures = {name: f"{value:.5f}".replace(".", "_") for name, value in candidate.metrics.items()}
        text = ", ".join(f"{name} {value:.5f}" for name, value in candidate.metrics.items())
        model = {
            "displayName": model_id,
            "versionDescription": f"{text} on the data {candidate.data[:12]}",
            "versionAliases": [DEFAULT],
            "labels": {"model": candidate.model, "data": candidate.data[:12], **figures},
            "artifactUri": candidate.uri,
            "containerSpec": {
                "imageUri": candidate.image,
                "predictRoute": PREDICT_ROUTE,
                "healthRoute": HEALTH_ROUTE,
                "startupProbe": {"httpGet": {"path": HEALTH_ROUTE}, "periodSeconds": 5, "timeoutSeconds": 5},
                "deploymentTimeout": DEPLOYMENT_TIMEOUT,
            },
        }
        which = {"parentModel": self._model} if candidate.champion else {"modelId": model_id}
        operation = self._ask("POST", f"{parent}/models:upload", {"model": model, **which})
        end = time.monotonic() + UPLOAD_SECONDS
        while operation is not None and not operation.get("done"):
            if time.monotonic() > end:
                raise UsageError(f"the upload has not ended after {UPLOAD_SECONDS:g} s: {operation['name']}")
            time.sleep(POLL_SECONDS)
            operation = self._ask("GET", operation["name"])
        if operation is None or "response" not in operation:
            why = (operation or {}).get("error", {}).get("message", "the operation is gone")
            raise UsageError(f"Vertex AI did not take the model: {why}")
        return str(operation["response"]["modelVersionId"])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Returns an answer, or None where nothing has that name. Raises UsageError."""
        import google.auth.exceptions
        import requests

        url = f"{self._endpoint}/v1/{path}"
        try:
            answer = self._session.request(method, url, json=body, timeout=60)
            content: dict[str, Any] = answer.json()
        except (requests.RequestException, google.auth.exceptions.GoogleAuthError) as error:
            raise UsageError(f"{url} does not answer: {error}") from None
        if answer.status_code == 404 and method == "GET":
            return None
        if answer.status_code >= 400:
            raise UsageError(f"{url} answers {answer.status_code}: {content.get('error', {}).get('message', '')}")
        return content


def _session(with_credentials: bool) -> Any:
    """Returns an HTTP session that repeats reads while the service is busy."""
    import google.auth
    import google.auth.exceptions
    import google.auth.transport.requests
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    if with_credentials:
        try:
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        except google.auth.exceptions.DefaultCredentialsError:
            raise UsageError("no Google credentials: run `gcloud auth application-default login`") from None
        session: requests.Session = google.auth.transport.requests.AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
    else:
        session = requests.Session()
        session.trust_env = False  # no proxy
    retry = Retry(total=5, backoff_factor=1, status_forcelist=(429, 500, 502, 503), allowed_methods=["GET"])
    session.mount(f"http{'s' if with_credentials else ''}://", HTTPAdapter(max_retries=retry))
    return session
