"""`Provider`: how Vertex AI is reached."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are
# required.

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypedDict, Unpack
from urllib.parse import urlsplit

import pulumi

from .definition import PACKAGE, Field, Kind, properties_of, to_wire
from .errors import ProblemError
from .patterns import EMAIL, EMAIL_HINT
from .wire import Wire

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

QUOTA_PROJECT: Final = "GOOGLE_CLOUD_QUOTA_PROJECT"
SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"


class ProviderInputs(TypedDict, total=False):
    project: Annotated[
        pulumi.Input[str],
        Field("Google Cloud project by its id. Also from gcp:project or GOOGLE_CLOUD_PROJECT."),
    ]
    location: Annotated[
        pulumi.Input[str],
        Field(
            "Region of models and endpoints, such as europe-west4. Also from gcp:region or GOOGLE_REGION. "
            "https://cloud.google.com/vertex-ai/docs/general/locations",
            pattern=r"[a-z]+-[a-z]+[0-9]+",
            hint="a region such as europe-west4",
        ),
    ]
    endpoint: Annotated[
        pulumi.Input[str],
        Field(
            "Address of the API, for a sandbox or a private endpoint; Google's of the region where absent.",
            pattern=r"https?://[^/\s]+/?",
            hint="an address such as http://127.0.0.1:8790, without a path",
        ),
    ]
    access_token: Annotated[
        pulumi.Input[str],
        Field(
            "OAuth 2.0 token to use as it is. Also from gcp:accessToken or GOOGLE_OAUTH_ACCESS_TOKEN.",
            secret=True,
        ),
    ]
    credentials: Annotated[
        pulumi.Input[str],
        Field(
            "Key or configuration of an account as JSON, or the path of a file with it; Application Default "
            "Credentials where absent. Also from gcp:credentials or GOOGLE_CREDENTIALS.",
            secret=True,
        ),
    ]
    impersonate_service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of a service account to act as; the credentials need roles/iam.serviceAccountTokenCreator on "
            "it. Also from gcp:impersonateServiceAccount or GOOGLE_IMPERSONATE_SERVICE_ACCOUNT.",
            pattern=EMAIL,
            hint=EMAIL_HINT,
        ),
    ]


PROVIDER_INPUTS: Final = properties_of(ProviderInputs)
GCP_NAMES: Final = {"location": "region"}  # where the google provider calls a setting differently
GCP_HAS_NOT: Final = ("endpoint",)


class Provider(pulumi.ProviderResource):
    """How Vertex AI is reached: project, location and credentials.

    What is not given here is taken from the configuration of the google provider (`gcp:project`, `gcp:region`,
    `gcp:accessToken`, …), then from the same environment variables, then from Application Default Credentials.

        cloud = vertex.Provider("cloud", project="my-project", location="europe-west4")
        vertex.ModelVersion("digits", …, opts=pulumi.ResourceOptions(provider=cloud))

    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[ProviderInputs],
    ) -> None:
        given: dict[str, Any] = to_wire(Kind("object", properties=PROVIDER_INPUTS), inputs)
        gcp = pulumi.Config("gcp")
        for setting in PROVIDER_INPUTS:
            name = GCP_NAMES.get(setting.wire, setting.wire)
            if setting.wire not in given and setting.wire not in GCP_HAS_NOT:
                value = gcp.get_secret(name) if setting.field.secret else gcp.get(name)
                if value is not None:
                    given[setting.wire] = value
        for setting in PROVIDER_INPUTS:
            if setting.field.secret and setting.wire in given:
                given[setting.wire] = pulumi.Output.secret(given[setting.wire])
        super().__init__(PACKAGE, resource_name, given, opts)


@dataclass(frozen=True)
class Access:
    """How Vertex AI is reached. The names and the environment variables are those of the google provider."""

    project: str
    location: str
    endpoint: str = ""
    access_token: str = field(default="", repr=False)
    credentials: str = field(default="", repr=False)
    impersonate_service_account: str = ""

    ENVIRONMENT = {  # noqa: RUF012  https://www.pulumi.com/registry/packages/gcp/installation-configuration/
        "project": ("GOOGLE_PROJECT", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"),
        "location": ("GOOGLE_REGION", "GCLOUD_REGION", "CLOUDSDK_COMPUTE_REGION"),
        "accessToken": ("GOOGLE_OAUTH_ACCESS_TOKEN",),
        "credentials": ("GOOGLE_CREDENTIALS", "GOOGLE_CLOUD_KEYFILE_JSON", "GCLOUD_KEYFILE_JSON"),
        "impersonateServiceAccount": ("GOOGLE_IMPERSONATE_SERVICE_ACCOUNT",),
    }

    @classmethod
    def of(cls, given: Wire) -> "Access":
        """From the provider's inputs, and the environment for what they leave out. Raises ProblemError."""
        said = {
            name: str(given.get(name) or next(filter(None, map(os.environ.get, variables)), ""))
            for name, variables in cls.ENVIRONMENT.items()
        }
        for name, example in (("project", "my-project"), ("location", "europe-west4")):
            if not said[name]:
                raise ProblemError(
                    f"The vertex provider has no {name}. Set it with `pulumi config set vertex:{name} {example}`, in "
                    f"vertex.Provider({name}=…), or in the environment variable {cls.ENVIRONMENT[name][0]}."
                )
        return cls(
            said["project"],
            said["location"],
            str(given.get("endpoint") or ""),
            said["accessToken"],
            said["credentials"],
            said["impersonateServiceAccount"],
        )

    @property
    def url(self) -> str:
        return (self.endpoint or f"https://{self.location}-aiplatform.googleapis.com").rstrip("/")

    @property
    def logging_url(self) -> str:
        """Address of Cloud Logging; a sandbox, on this machine, has it below its own."""
        return f"{self.url}/logging" if is_loopback(self.url) else "https://logging.googleapis.com"

    @property
    def storage_url(self) -> str:
        """Address of Cloud Storage; a sandbox has it under its own."""
        return self.url if is_loopback(self.url) else "https://storage.googleapis.com"

    def kfp_url(self, uri: str) -> str:
        """Address of a template at https://LOCATION-kfp.pkg.dev/…; a sandbox has it below its own."""
        host, _, path = uri.removeprefix("https://").partition("/")
        return f"{self.url}/kfp/{host.removesuffix('-kfp.pkg.dev')}/{path}" if is_loopback(self.url) else uri

    @property
    def quota_repair(self) -> str:
        """What gives the credentials a quota project."""
        if self.access_token or self.credentials:
            return f"Set the environment variable {QUOTA_PROJECT}={self.project}."
        return f"Run `gcloud auth application-default set-quota-project {self.project}`."

    def authorize(self) -> "Credentials":
        """The token, else the key, else Application Default Credentials; then impersonation."""
        import google.auth
        import google.auth.credentials
        import google.auth.impersonated_credentials
        import google.oauth2.credentials
        from google.auth import exceptions

        auth: Any = google.auth  # it has no types
        source: Any
        try:
            if self.access_token:
                quota = os.environ.get(QUOTA_PROJECT)  # google-auth itself reads it for keys and ADC
                source = google.oauth2.credentials.Credentials(token=self.access_token, quota_project_id=quota)  # type: ignore[no-untyped-call]
            elif self.credentials.lstrip().startswith("{"):
                source, _ = auth.load_credentials_from_dict(json.loads(self.credentials), scopes=[SCOPE])
            elif self.credentials:
                source, _ = auth.load_credentials_from_file(str(Path(self.credentials).expanduser()), scopes=[SCOPE])
            elif is_loopback(self.url):
                source = auth.credentials.AnonymousCredentials()
            else:
                source, _ = auth.default(scopes=[SCOPE])
            if self.impersonate_service_account:
                source = auth.impersonated_credentials.Credentials(
                    source, target_principal=self.impersonate_service_account, target_scopes=[SCOPE]
                )
        except (exceptions.GoogleAuthError, OSError, ValueError) as error:
            said = type(error).__name__ if self.credentials else str(error)  # never quote a key
            raise ProblemError(
                f"No usable Google credentials ({said}). Run `gcloud auth application-default login`, or give "
                "vertex.Provider an access_token or credentials."
            ) from None
        credentials: Credentials = source
        return credentials


def is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
