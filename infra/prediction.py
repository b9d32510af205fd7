"""Model versions, the endpoint they are deployed on, and how the traffic is shared."""

import pulumi
import pulumi_gcp as gcp

import pulumi_vertex as vertex
from infra import BUILD
from infra.foundation import Foundation
from infra.image import NAME, Image
from infra.settings import Release, Settings

PREDICT_ROUTE = "/predictions/people"
HEALTH_ROUTE = "/ping"
# By whether the endpoint is dedicated: https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type
MAX_REQUEST_BYTES = {True: 10 * 2**20, False: 1_500_000}


class Prediction(pulumi.ComponentResource):
    """One model version for each release, one endpoint, one rollout.

    Without releases, or paused, the endpoint has no machines: it costs nothing and answers nothing.
    """

    def __init__(
        self,
        settings: Settings,
        foundation: Foundation,
        image: Image | None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("headcount:index:Prediction", settings.stack, None, opts)
        names = settings.names
        provider = vertex.Provider(
            "vertex",
            project=settings.project,
            location=settings.region,
            **({"endpoint": settings.vertex_endpoint} if settings.vertex_endpoint else {}),
            opts=pulumi.ResourceOptions(parent=self),
        )
        repository = settings.image_repository or foundation.repository.registry_uri
        usable = foundation.after("aiplatform.googleapis.com")
        #: Image by digest of each release.
        self.images: dict[str, pulumi.Output[str]] = {}
        #: Model version of each release.
        self.versions: dict[str, vertex.ModelVersion] = {}
        for name, release in settings.releases.items():
            digest = image.digest if image and release.image == BUILD else release.image
            self.images[name] = pulumi.Output.concat(repository, "/", NAME, "@", digest)
            self.versions[name] = vertex.ModelVersion(
                name,
                model_id=names.model,
                display_name=names.model,
                version_description=f"Release {name} of stack {settings.stack}",
                image=self.images[name],
                predict_route=PREDICT_ROUTE,
                health_route=HEALTH_ROUTE,
                env={"HEADCOUNT_BUCKETS": foundation.bucket.name},
                aliases=[name],
                labels=names.labels,
                opts=pulumi.ResourceOptions.merge(pulumi.ResourceOptions(parent=self, provider=provider), usable),
            )
        self.endpoint = gcp.vertex.AiEndpoint(
            "endpoint",
            name=names.endpoint,
            display_name=names.model,
            description=f"Counts people; stack {settings.stack}",
            location=settings.region,
            region=settings.region,
            dedicated_endpoint_enabled=settings.dedicated,
            labels=names.labels,
            opts=pulumi.ResourceOptions.merge(
                pulumi.ResourceOptions(
                    parent=self,
                    protect=settings.production,
                    ignore_changes=["trafficSplit"],  # the rollout's
                    delete_before_replace=True,  # its id is fixed
                ),
                usable,
            ),
        )
        self.rollout = vertex.Rollout(
            "rollout",
            endpoint=self.endpoint.id,
            drain_seconds=settings.drain_seconds,
            models={
                name: _deployed(settings, foundation, self.versions[name], release)
                for name, release in ({} if settings.paused else settings.releases).items()
            },
            opts=pulumi.ResourceOptions(parent=self, provider=provider, depends_on=foundation.grants),
        )
        #: URL that predictions are POSTed to: with `:predict` JSON, with `:rawPredict` a picture as it is.
        self.url = self.endpoint.dedicated_endpoint_dns.apply(
            lambda dns: (
                f"{_address(settings, dns)}/v1/projects/{settings.project}/locations/{settings.region}"
                f"/endpoints/{names.endpoint}"
            )
        )
        self._settings = settings
        self.register_outputs({})

    def how_to_use(self) -> dict[str, pulumi.Output[str]]:
        """Lines to paste, and the console's page where there is a console."""
        settings = self._settings
        local = bool(settings.vertex_endpoint)
        token = "" if local else '-H "Authorization: Bearer $(gcloud auth print-access-token)" '
        lines = {
            "count": pulumi.Output.from_input(f"headcount count --stack {settings.stack} picture.jpg"),
            "curl": pulumi.Output.concat(
                f"curl -sS {token}-H 'Content-Type: image/jpeg' --data-binary @picture.jpg ",
                self.url,
                ":rawPredict",
            ),
        }
        if not local:
            console = "https://console.cloud.google.com/vertex-ai"
            where = f"locations/{settings.region}"
            lines["console"] = pulumi.Output.from_input(
                f"{console}/online-prediction/{where}/endpoints/{settings.names.endpoint}?project={settings.project}"
            )
            lines["consoleModels"] = pulumi.Output.from_input(
                f"{console}/models/{where}/models/{settings.names.model}/versions?project={settings.project}"
            )
        return lines


def _deployed(
    settings: Settings, foundation: Foundation, version: vertex.ModelVersion, release: Release
) -> vertex.Deployed:
    deployed = vertex.Deployed(
        model=version.id,
        traffic=release.traffic,
        machine_type=settings.machine_type,
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        service_account=foundation.service_account.email,
    )
    if settings.accelerator:
        deployed["accelerator_type"] = settings.accelerator
        deployed["accelerator_count"] = 1
    return deployed


def _address(settings: Settings, dns: str | None) -> str:
    if settings.vertex_endpoint:
        return settings.vertex_endpoint
    return f"https://{dns if settings.dedicated else f'{settings.region}-aiplatform.googleapis.com'}"
