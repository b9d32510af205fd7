"""The Google APIs that the program calls, and when each can be used."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

import google.auth
import google.auth.exceptions
import pulumi
import pulumi_gcp as gcp

READY_SECONDS: Final = 300  # "If you enabled this API recently, wait a few minutes", Google's answers say
AGAIN_SECONDS: Final = 2  # from the first good answer of an API that was just enabled to the second


@dataclass(frozen=True)
class Api:
    """One Google API, and a call that changes nothing and answers once the API is usable.

    setting: the google provider's setting for its address.
    """

    service: str
    setting: str
    address: str
    probe: str


RESOURCE_MANAGER: Final = "https://cloudresourcemanager.googleapis.com/v1/"
# Service Usage and Resource Manager, which enable and describe the others, have to be there first.
APIS: Final = (
    Api(
        "storage.googleapis.com",
        "storageCustomEndpoint",
        "https://storage.googleapis.com/storage/v1/",
        "b?project={project}&maxResults=1",
    ),
    Api(
        "artifactregistry.googleapis.com",
        "artifactRegistryCustomEndpoint",
        "https://artifactregistry.googleapis.com/v1/",
        "projects/{project}/locations/{region}/repositories?pageSize=1",
    ),
    Api(
        "iam.googleapis.com",
        "iamBetaCustomEndpoint",
        "https://iam.googleapis.com/v1/",
        "projects/{project}/serviceAccounts?pageSize=1",
    ),
    Api(
        "aiplatform.googleapis.com",
        "vertexAiCustomEndpoint",
        "https://{region}-aiplatform.googleapis.com/v1/",
        "projects/{project}/locations/{region}/endpoints?pageSize=1",
    ),
)
SCANNING: Final = Api(
    "containerscanning.googleapis.com",
    "containerAnalysisCustomEndpoint",
    "https://containeranalysis.googleapis.com/v1/",
    "projects/{project}/occurrences?pageSize=1",
)

KMS: Final = Api(
    "cloudkms.googleapis.com",
    "kmsCustomEndpoint",
    "https://cloudkms.googleapis.com/v1/",
    "projects/{project}/locations/{region}/keyRings?pageSize=1",
)


def enable(
    api: Api,
    where: tuple[str, str],
    token: pulumi.Output[str],
    number: pulumi.Output[str],
    opts: pulumi.ResourceOptions | None = None,
) -> pulumi.Output[list[pulumi.Resource]]:
    """Enables an API. Resources that depend on the result wait until the API is usable.

    The API stays enabled when the stack is destroyed. where: the project's id and the region; number: the project's.
    """
    service = gcp.projects.Service(
        api.service.partition(".")[0], service=api.service, disable_on_destroy=False, opts=opts
    )
    project, region = where
    base = pulumi.Config("gcp").get(api.setting) or api.address
    url = (base + api.probe).format(project=project, region=region)

    async def usable(token: str, number: str) -> list[pulumi.Resource]:
        if not pulumi.runtime.is_dry_run():
            await until_usable(api.service, url, token, (project, number))
        return [service]

    return pulumi.Output.all(service.id, token, number).apply(lambda all_: usable(all_[1], all_[2]))


async def until_usable(
    service: str, url: str, token: str, ours: tuple[str, str], seconds: float = READY_SECONDS
) -> None:
    """Returns when `url` no longer answers that `service` is disabled. Raises pulumi.RunError.

    Google answers SERVICE_DISABLED for a while after an API was enabled, and its provider does not wait for that.
    Single refusals after a first good answer were reported, so this waits for a second good answer. The loop is our
    own, because it ends on two answers in a row, and google.api_core's ends on the first.
    https://cloud.google.com/apis/docs/troubleshooting#service_disabled
    Any other answer is left to the resource that needs the API, whose error says more. ours: the project's id and
    number.
    """
    deadline, pause, refused, good = time.monotonic() + seconds, 0.5, False, 0
    while good < (2 if refused else 1):
        consumer = await asyncio.to_thread(_disabled_for, url, token)
        if consumer is None:
            good += 1
            await asyncio.sleep(AGAIN_SECONDS if refused and good < 2 else 0)
            continue
        if consumer and consumer.removeprefix("projects/") not in ours:
            raise pulumi.RunError(
                f"Google looked for {service} in {consumer}, which is not the project {ours[0]}: the credentials have "
                "no quota project. Set it and run `pulumi up` again:\n"
                f"    gcloud auth application-default set-quota-project {ours[0]}\n"
                f"    pulumi config set gcp:userProjectOverride true && pulumi config set gcp:billingProject {ours[0]}"
            )
        refused, good = True, 0
        if time.monotonic() > deadline:
            raise pulumi.RunError(
                f"{service} was enabled {seconds:.0f} s ago and Google still answers that it is not. "
                "Run `pulumi up` again in a few minutes."
            )
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 10)


async def project_number(project: str, token: str) -> str:
    """Returns the number of a project, as Google's host names have it. Raises pulumi.RunError.

    The google provider's function for one project reads the billing account too, for which a deployer needs no role
    otherwise; its function for many ignores the address that is set for Resource Manager.
    https://cloud.google.com/resource-manager/reference/rest/v1/projects/get
    """
    base = pulumi.Config("gcp").get("resourceManagerCustomEndpoint") or RESOURCE_MANAGER

    def ask() -> str:
        try:
            with _get(f"{base}projects/{project}", token) as answer:
                return str(json.load(answer)["projectNumber"])
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
        except OSError as error:
            text = str(error)
        raise pulumi.RunError(
            f"Google does not return the number of project {project}. Check that the id is right, that the credentials "
            "have resourcemanager.projects.get (role Viewer), and that the API is enabled:\n"
            f"    gcloud services enable cloudresourcemanager.googleapis.com --project {project}\n{text}"
        )

    return await asyncio.to_thread(ask)


def _get(url: str, token: str) -> Any:
    """The response to a GET, as urllib's. Raises OSError."""
    headers = {"Authorization": f"Bearer {token}"}
    if quota := _quota_project():
        headers["x-goog-user-project"] = quota
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)


def _disabled_for(url: str, token: str) -> str | None:
    """The consumer project for which Google answers that the API is disabled, "" if it names none; else None."""
    try:
        with _get(url, token):
            return None
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return _consumer(text) if error.code == 403 else None
    except OSError:
        return None


def _quota_project() -> str | None:
    """The project that Google charges for the provider's calls, if it differs from the credentials' own."""
    config = pulumi.Config("gcp")
    if config.get("accessToken"):
        return None
    if config.get_bool("userProjectOverride") and (project := config.get("billingProject")):
        return project
    try:
        credentials, _ = google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        return None
    found: str | None = getattr(credentials, "quota_project_id", None)
    return found


def _consumer(text: str) -> str | None:
    """The consumer in an error that says that an API is disabled, "" if it names none; else None.

    Newer APIs say it in an ErrorInfo, older ones, of which Storage is one, in the first of their errors.
    """
    try:
        error: dict[str, Any] = json.loads(text)["error"]
    except (ValueError, LookupError, TypeError):
        return None
    for detail in error.get("details", []):
        if detail.get("reason") == "SERVICE_DISABLED":
            return str(detail.get("metadata", {}).get("consumer", ""))
    if any(one.get("reason") == "accessNotConfigured" for one in error.get("errors", [])):
        return ""
    return "" if "has not been used in project" in str(error.get("message")) else None
