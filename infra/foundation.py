"""What everything else stands on: enabled APIs, the bucket, the image repository, the serving account."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Final

import pulumi
import pulumi_gcp as gcp

from infra.settings import Settings

READY_SECONDS: Final = 300  # "If you enabled this API recently, wait a few minutes", Google's answers say


@dataclass(frozen=True)
class Api:
    """One Google API, and a call that changes nothing and answers once the API is usable."""

    service: str
    setting: str  # the google provider's setting for its address
    address: str
    probe: str


# Only what this program calls. Service Usage and Resource Manager, which enable the others, are there first.
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


class Foundation(pulumi.ComponentResource):
    """APIs, bucket, image repository and service account of one stack.

    APIs stay enabled when the stack is destroyed: others in the project may use them. Nothing is public. No
    project-wide role is granted: the serving account reads one bucket and nothing else.
    """

    def __init__(self, settings: Settings, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("headcount:index:Foundation", settings.stack, None, opts)
        names = settings.names
        self._settings = settings
        self._token = gcp.organizations.get_client_config_output().access_token
        self._usable = {api.service: self._enable(api) for api in APIS}
        keep = pulumi.ResourceOptions(parent=self, protect=settings.production)

        #: Pictures that requests name by gs://, and later training data.
        self.bucket = gcp.storage.Bucket(
            "bucket",
            name=names.bucket,
            location=settings.region.upper(),  # as Google answers it: no diff
            uniform_bucket_level_access=True,
            public_access_prevention="enforced",
            versioning={"enabled": True},
            lifecycle_rules=[
                {
                    "action": {"type": "Delete"},
                    "condition": {
                        "days_since_noncurrent_time": settings.retention_days,
                        "with_state": "ARCHIVED",
                    },
                },
                {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 7}},
            ],
            # Soft delete keeps, and charges for, what a destroyed stack leaves: production only.
            soft_delete_policy={"retention_duration_seconds": 7 * 86400 if settings.production else 0},
            force_destroy=not settings.production,
            labels=names.labels,
            opts=pulumi.ResourceOptions.merge(keep, self.after("storage.googleapis.com")),
        )
        self.repository = gcp.artifactregistry.Repository(
            "images",
            repository_id=names.repository,
            location=settings.region,
            format="DOCKER",
            description="Serving images of headcount",
            # Vertex AI copies an image when a model version is made: what runs needs none of these.
            cleanup_policies=[
                {"id": "keep-recent", "action": "KEEP", "most_recent_versions": {"keep_count": 20}},
                {"id": "delete-old", "action": "DELETE", "condition": {"older_than": f"{90 * 86400}s"}},
            ],
            labels=names.labels,
            opts=pulumi.ResourceOptions.merge(keep, self.after("artifactregistry.googleapis.com")),
        )
        for member in settings.image_readers:
            gcp.artifactregistry.RepositoryIamMember(
                f"images-{member}",
                location=self.repository.location,
                repository=self.repository.name,
                role="roles/artifactregistry.reader",
                member=member,
                opts=pulumi.ResourceOptions(parent=self),
            )
        #: What the container runs as.
        self.service_account = gcp.serviceaccount.Account(
            "serving",
            account_id=names.service_account,
            display_name=f"Headcount serving, stack {settings.stack}"[:100],
            opts=pulumi.ResourceOptions.merge(pulumi.ResourceOptions(parent=self), self.after("iam.googleapis.com")),
        )
        #: Whatever runs as the serving account depends on these.
        self.grants = [
            gcp.storage.BucketIAMMember(
                "serving-reads-pictures",
                bucket=self.bucket.name,
                role="roles/storage.objectViewer",
                member=self.service_account.member,
                opts=pulumi.ResourceOptions(parent=self),
            )
        ]
        self.register_outputs({})

    @property
    def token(self) -> pulumi.Output[str]:
        """The deployer's access token, a secret: what the registry takes as a password."""
        return pulumi.Output.secret(self._token)

    def after(self, service: str) -> pulumi.ResourceOptions:
        """Options of a resource that waits until `service` can be used."""
        return pulumi.ResourceOptions(depends_on=self._usable[service])

    def _enable(self, api: Api) -> pulumi.Output[list[pulumi.Resource]]:
        service = gcp.projects.Service(
            api.service.partition(".")[0],
            service=api.service,
            disable_on_destroy=False,
            opts=pulumi.ResourceOptions(parent=self),
        )
        base = pulumi.Config("gcp").get(api.setting) or api.address
        url = (base + api.probe).format(project=self._settings.project, region=self._settings.region)

        async def usable(resolved: tuple[str, str]) -> list[pulumi.Resource]:
            if not pulumi.runtime.is_dry_run():
                await until_usable(api.service, url, resolved[1])
            return [service]

        return pulumi.Output.all(service.id, self._token).apply(lambda both: usable((both[0], both[1])))


async def until_usable(service: str, url: str, token: str, seconds: float = READY_SECONDS) -> None:
    """Returns when `url` no longer answers that `service` is disabled. Raises pulumi.RunError.

    Google answers SERVICE_DISABLED for a while after an API was enabled; its provider does not wait for that.
    https://cloud.google.com/apis/docs/troubleshooting#service_disabled
    Any other answer is left to the resource that needs the API, whose error says more.
    """
    deadline, pause = time.monotonic() + seconds, 0.5
    while await asyncio.to_thread(_disabled, url, token):
        if time.monotonic() > deadline:
            raise pulumi.RunError(
                f"{service} was enabled {seconds:.0f} s ago and Google still answers that it is not. "
                "Run `pulumi up` again in a few minutes."
            )
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 10)


def _disabled(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return False
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return error.code == 403 and ("SERVICE_DISABLED" in text or _reason(text) == "accessNotConfigured")
    except OSError:
        return False


def _reason(text: str) -> str:
    """The reason in the older APIs' errors, of which Storage is one."""
    try:
        return str(json.loads(text)["error"]["errors"][0]["reason"])
    except (ValueError, LookupError, TypeError):
        return ""
