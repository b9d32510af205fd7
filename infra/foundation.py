"""The foundation of a stack: enabled APIs, the bucket, the image repository, the serving account."""

from typing import Any, Final

import pulumi
import pulumi_gcp as gcp

import pulumi_vertex as vertex
from infra.apis import APIS, SCANNING, enable, project_number
from infra.settings import Settings

READER: Final = "roles/artifactregistry.reader"


class Foundation(pulumi.ComponentResource):
    """APIs, buckets, image repository and service account of one stack.

    APIs stay enabled when the stack is destroyed, because others in the project may use them. Nothing is public. No
    project-wide role is granted: the serving account reads the buckets of pictures and models and nothing else. In
    production everything here is protected.
    """

    def __init__(self, settings: Settings, opts: pulumi.ResourceOptions | None = None) -> None:
        protected = pulumi.ResourceOptions(protect=settings.production)
        super().__init__(
            "headcount:index:Foundation", settings.stack, None, pulumi.ResourceOptions.merge(opts, protected)
        )
        names = settings.names
        self._settings = settings
        self._parent = pulumi.ResourceOptions(parent=self)
        self._key_grants: dict[str, pulumi.Resource] = {}  # by service
        self._token = gcp.organizations.get_client_config_output().access_token
        #: The project's number, as Google's host names have it.
        self.project_number: pulumi.Output[str] = self._token.apply(
            lambda token: project_number(settings.project, token)
        )
        apis = (*APIS, SCANNING) if settings.scan_images else APIS
        where = (settings.project, settings.region)
        self._usable = {api.service: enable(api, where, self._token, self.project_number, self._parent) for api in apis}
        #: Vertex AI's service agent, which pulls the images. It exists as soon as this resource does.
        self.agent = self._identity("aiplatform.googleapis.com")
        if settings.kms_key:
            self._key_grants = self._grant_key(settings.kms_key)

        #: Pictures that requests name by gs://. They show people, so none is kept for long.
        self.bucket = self._bucket(
            "bucket",
            names.bucket,
            versioning={"enabled": settings.keep_deleted_days > 0},
            lifecycle_rules=_lifecycle(settings),
        )
        #: Exported models, and what jobs read and write. A bucket of its own, because pictures are deleted after days.
        self.model_bucket = self._bucket("models", names.model_bucket, versioning={"enabled": False})
        self.repository = gcp.artifactregistry.Repository(
            "images",
            repository_id=names.repository,
            location=settings.region,
            format="DOCKER",
            description="Serving images of headcount",
            # KEEP wins over DELETE: https://cloud.google.com/artifact-registry/docs/repositories/cleanup-policy-overview
            cleanup_policies=[
                {"id": "keep-recent", "action": "KEEP", "most_recent_versions": {"keep_count": 20}},
                {
                    "id": "keep-released",
                    "action": "KEEP",
                    "condition": {"tag_state": "TAGGED", "tag_prefixes": [RELEASE_TAG]},
                },
                {"id": "delete-old", "action": "DELETE", "condition": {"older_than": f"{90 * 86400}s"}},
            ],
            kms_key_name=settings.kms_key or None,
            vulnerability_scanning_config={
                "enablement_config": "INHERITED" if settings.scan_images else "DISABLED",
            },
            labels=settings.all_labels,
            opts=self._after("artifactregistry.googleapis.com"),
        )
        readers: dict[str, pulumi.Input[str]] = {"agent": self.agent.member, **{m: m for m in settings.image_readers}}
        #: Permissions to pull images; resources that pull one depend on them.
        self.image_readers = [
            gcp.artifactregistry.RepositoryIamMember(
                f"images-{name}",
                location=self.repository.location,
                repository=self.repository.name,
                role=READER,
                member=member,
                opts=self._parent,
            )
            for name, member in readers.items()
        ]
        #: The account that the container runs as.
        self.service_account = gcp.serviceaccount.Account(
            "serving",
            account_id=names.service_account,
            display_name=f"Headcount serving, stack {settings.stack}"[:100],
            opts=self._after("iam.googleapis.com"),
        )
        #: Permissions of the serving account; resources that run as it depend on them.
        readable: dict[str, pulumi.Input[str]] = {"pictures": self.bucket.name, "models": self.model_bucket.name}
        # A service account of one's own does not read the artifacts of a model version by itself:
        # https://cloud.google.com/vertex-ai/docs/general/custom-service-account
        readable |= {bucket: bucket for bucket in other_buckets(settings)}
        self.grants = [
            gcp.storage.BucketIAMMember(
                f"serving-reads-{name}",
                bucket=bucket,
                role="roles/storage.objectViewer",
                member=self.service_account.member,
                opts=self._parent,
            )
            for name, bucket in readable.items()
        ]
        self.register_outputs({})

    @property
    def token(self) -> pulumi.Output[str]:
        """The deployer's access token, which the registry takes as a password. A secret."""
        return pulumi.Output.secret(self._token)

    def after(self, service: str) -> pulumi.ResourceOptions:
        """Options of a resource that waits until `service` can be used, and may use the stack's key if there is one."""
        grant = self._key_grants.get(service)
        return pulumi.ResourceOptions.merge(
            pulumi.ResourceOptions(depends_on=self._usable[service]),
            pulumi.ResourceOptions(depends_on=[grant] if grant else []),
        )

    def _after(self, service: str) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions.merge(self._parent, self.after(service))

    def _bucket(self, resource: str, name: str, **more: Any) -> gcp.storage.Bucket:
        """A bucket that is not public."""
        settings = self._settings
        return gcp.storage.Bucket(
            resource,
            name=name,
            location=settings.region.upper(),  # as Google answers it: no diff
            uniform_bucket_level_access=True,
            public_access_prevention="enforced",
            # With soft delete Google keeps deleted objects, and charges for them.
            soft_delete_policy={"retention_duration_seconds": 0},
            encryption={"default_kms_key_name": settings.kms_key} if settings.kms_key else None,
            force_destroy=not settings.production,
            labels=settings.all_labels,
            opts=self._after("storage.googleapis.com"),
            **more,
        )

    def _identity(self, service: str) -> gcp.projects.ServiceIdentity:
        """Creates the service agent of a Google service, so that it can be granted roles before its first use."""
        name = service.partition(".")[0]
        return gcp.projects.ServiceIdentity(f"{name}-agent", service=service, opts=self._after(service))

    def _grant_key(self, key: str) -> dict[str, pulumi.Resource]:
        """Lets the agents of the services that store data use the Cloud KMS key, keyed by service."""
        storage = gcp.storage.get_project_service_account_output(project=self._settings.project)
        agents = {
            "storage.googleapis.com": pulumi.Output.concat("serviceAccount:", storage.email_address),
            "artifactregistry.googleapis.com": self._identity("artifactregistry.googleapis.com").member,
            "aiplatform.googleapis.com": self.agent.member,
        }
        return {
            service: gcp.kms.CryptoKeyIAMMember(
                f"key-{service.partition('.')[0]}",
                crypto_key_id=key,
                role="roles/cloudkms.cryptoKeyEncrypterDecrypter",
                member=member,
                opts=self._parent,
            )
            for service, member in agents.items()
        }


def vertex_provider(settings: Settings, parent: pulumi.Resource) -> vertex.Provider:
    """The provider of the resources of Vertex AI that belong to a component."""
    return vertex.Provider(
        "vertex",
        project=settings.project,
        location=settings.region,
        **({"endpoint": settings.vertex_endpoint} if settings.vertex_endpoint else {}),
        opts=pulumi.ResourceOptions(parent=parent),
    )


def other_buckets(settings: Settings) -> list[str]:
    """The buckets of the releases' models that are none of the stack's own."""
    models = [release.model for release in settings.releases.values() if release.model and not release.job]
    used = {model.split("/")[2] for model in models}
    return sorted(used - {settings.names.bucket, settings.names.model_bucket})


#: Prefix of the tags that the releases' images have, so that no clean-up takes them.
RELEASE_TAG: Final = "release-"


def _lifecycle(settings: Settings) -> list[gcp.storage.BucketLifecycleRuleArgsDict]:
    rules: list[gcp.storage.BucketLifecycleRuleArgsDict] = [
        {"action": {"type": "Delete"}, "condition": {"age": settings.picture_days, "with_state": "LIVE"}},
        {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 7}},
    ]
    if days := settings.keep_deleted_days:
        rules.append(
            {"action": {"type": "Delete"}, "condition": {"days_since_noncurrent_time": days, "with_state": "ARCHIVED"}}
        )
    return rules
