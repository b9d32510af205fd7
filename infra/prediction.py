"""Model versions, the endpoint they are deployed on, and how the traffic is shared."""

from typing import Final, NamedTuple

import pulumi
import pulumi_gcp as gcp

import pulumi_vertex as vertex
from infra import BUILD
from infra.foundation import RELEASE_TAG, Foundation, vertex_provider
from infra.image import SERVING, Image
from infra.nested_settings import Release
from infra.settings import Settings
from infra.training import Training

PREDICT_ROUTE: Final = "/predictions/people"
HEALTH_ROUTE: Final = "/ping"
# Request size limit, keyed by `dedicated`: https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type
MAX_REQUEST_BYTES: Final = {True: 10 * 2**20, False: 1_500_000}
# The first picture is counted some seconds after a container's start; the rest of it is the image's pull.
STARTUP_PROBE: Final[vertex.Probe] = {"path": HEALTH_ROUTE, "period_seconds": 5, "timeout_seconds": 5}
DEPLOYMENT_TIMEOUT_SECONDS: Final = 1800


class Prediction(pulumi.ComponentResource):
    """One image and one model version for each release, one endpoint, one rollout.

    Without releases, or paused, the endpoint has no machines: it costs nothing and answers nothing. In production
    everything that serves is protected: the rollout, the endpoint, the versions that have traffic.
    """

    def __init__(
        self,
        settings: Settings,
        foundation: Foundation,
        image: Image | None,
        training: Training | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("headcount:index:Prediction", settings.stack, None, opts)
        names = settings.names
        self._settings, self._foundation = settings, foundation
        provider = vertex_provider(settings, self)
        usable = foundation.after("aiplatform.googleapis.com")
        #: Image by digest of each release.
        self.images: dict[str, pulumi.Output[str]] = {}
        #: Model version of each release.
        self.versions: dict[str, vertex.ModelVersion] = {}
        repository = pulumi.Output.concat(foundation.repository.registry_uri, "/", SERVING.name)
        for name, release in settings.releases.items():
            built = release.image == BUILD
            serves = settings.production and release.traffic > 0
            self.images[name] = vertex.ReleasedImage(
                name,
                repository=repository,
                digest=image.digest if image and built else release.image,
                tag=f"{RELEASE_TAG}{name}",
                sources=[f"{settings.image_source}/{SERVING.name}"] if settings.image_source and not built else [],
                opts=pulumi.ResourceOptions(parent=self, provider=provider, protect=serves),
            ).image
            self.versions[name] = vertex.ModelVersion(
                name,
                model_id=names.model,
                display_name=names.model,
                version_description=f"Release {name} of stack {settings.stack}",
                image=self.images[name],
                artifact_uri=training.models[release.job] if training and release.job else release.model or None,
                predict_route=PREDICT_ROUTE,
                health_route=HEALTH_ROUTE,
                startup_probe=STARTUP_PROBE,
                deployment_timeout_seconds=DEPLOYMENT_TIMEOUT_SECONDS,
                env={"HEADCOUNT_BUCKETS": foundation.bucket.name},
                aliases=[name],
                labels=settings.all_labels,
                encryption_key=settings.kms_key or None,
                opts=pulumi.ResourceOptions.merge(
                    pulumi.ResourceOptions(
                        parent=self, provider=provider, protect=serves, depends_on=foundation.image_readers
                    ),
                    usable,
                ),
            )
        protected = settings.production and not settings.replace_endpoint
        logging = settings.request_log
        self.endpoint = gcp.vertex.AiEndpoint(
            "endpoint",
            name=names.endpoint,
            display_name=names.model,
            description=f"Counts people; stack {settings.stack}",
            location=settings.region,
            region=settings.region,
            dedicated_endpoint_enabled=settings.dedicated,
            encryption_spec={"kms_key_name": settings.kms_key} if settings.kms_key else None,
            predict_request_response_logging_config={
                "enabled": True,
                "sampling_rate": logging.sampling,
                "bigquery_destination": {"output_uri": logging.table},
            }
            if logging
            else None,
            labels=settings.all_labels,
            opts=pulumi.ResourceOptions.merge(
                pulumi.ResourceOptions(
                    parent=self,
                    protect=protected,
                    ignore_changes=["trafficSplit"],  # the rollout's
                    replace_on_changes=["dedicatedEndpointEnabled"],  # the google provider would try to update it
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
                name: self._deployed(name, release)
                for name, release in ({} if settings.paused else settings.releases).items()
            },
            opts=pulumi.ResourceOptions(
                parent=self, provider=provider, protect=protected, depends_on=foundation.grants
            ),
        )
        self._grant_predictions(protected)
        #: URL that predictions are POSTed to: with `:predict` JSON, with `:rawPredict` a picture as it is.
        self.url = pulumi.Output.concat(
            self._address(),
            f"/v1/projects/{settings.project}/locations/{settings.region}/endpoints/{names.endpoint}",
        )
        self.register_outputs({})

    def _deployed(self, name: str, release: Release) -> vertex.Deployed:
        settings = self._settings
        count = replicas(settings, release)
        deployed = vertex.Deployed(
            model=self.versions[name].id,
            traffic=release.traffic,
            machine_type=settings.machine_type,
            min_replicas=count.least,
            max_replicas=count.most,
            service_account=self._foundation.service_account.email,
        )
        if settings.autoscaling:
            deployed["autoscaling_targets"] = {str(metric): target for metric, target in settings.autoscaling.items()}
        if settings.accelerator:
            deployed["accelerator_type"] = settings.accelerator
            deployed["accelerator_count"] = 1
        return deployed

    def _grant_predictions(self, protected: bool) -> None:
        """Lets the stack's predictors ask this endpoint, and do nothing else with it or with another one.

        protected: whether the grants are; they are replaced with the endpoint.
        """
        settings = self._settings
        if not settings.predictors:
            return
        role = gcp.projects.IAMCustomRole(
            "predictor",
            role_id=settings.names.predictor_role,
            title=f"Headcount predictor, stack {settings.stack}"[:100],
            permissions=["aiplatform.endpoints.predict"],
            opts=pulumi.ResourceOptions.merge(
                pulumi.ResourceOptions(parent=self, protect=settings.production),
                self._foundation.after("iam.googleapis.com"),
            ),
        )
        for member in settings.predictors:
            gcp.vertex.AiEndpointIamMember(
                f"predictor-{member}",
                endpoint=self.endpoint.name,
                location=settings.region,
                role=role.name,
                member=member,
                opts=pulumi.ResourceOptions(parent=self, protect=protected),
            )

    def _address(self) -> pulumi.Input[str]:
        """The endpoint's host. A dedicated endpoint's name is built, because Google shows it only once something runs.

        https://cloud.google.com/vertex-ai/docs/predictions/create-public-endpoint
        """
        settings = self._settings
        if settings.vertex_endpoint:
            return settings.vertex_endpoint
        if not settings.dedicated:
            return f"https://{settings.region}-aiplatform.googleapis.com"
        number = self._foundation.project_number
        return pulumi.Output.concat(
            f"https://{settings.names.endpoint}.{settings.region}-", number, ".prediction.vertexai.goog"
        )

    def machines(self) -> str:
        """The machines that run after the deployment, in one line."""
        settings = self._settings
        running = {} if settings.paused else settings.releases
        parts = [
            f"{replicas(settings, release)} × {settings.machine_type} for {name}" for name, release in running.items()
        ]
        return f"Machines: {', '.join(parts)}." if parts else "Machines: none, so that nothing is paid for them."

    def how_to_use(self) -> dict[str, pulumi.Output[str]]:
        """Lines to paste, and the console's page where there is a console."""
        settings = self._settings
        local = bool(settings.vertex_endpoint)
        token = "" if local else '-H "Authorization: Bearer $(gcloud auth print-access-token)" '
        lines: dict[str, pulumi.Output[str]] = {}
        if settings.releases and all(release.model for release in settings.releases.values()):
            predict = f"headcount predict --stack {settings.stack} --json-instances instances.json"
            lines["predict"] = pulumi.Output.from_input(predict)
        else:
            lines["count"] = pulumi.Output.from_input(f"headcount count --stack {settings.stack} picture.jpg")
            lines["curl"] = pulumi.Output.concat(
                f"curl -sS {token}-H 'Content-Type: image/jpeg' --data-binary @picture.jpg ", self.url, ":rawPredict"
            )
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


class Replicas(NamedTuple):
    """How many replicas of a release run."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


def replicas(settings: Settings, release: Release) -> Replicas:
    """The replicas of a release: its own, else the stack's."""
    least = settings.min_replicas if release.min_replicas is None else release.min_replicas
    most = settings.max_replicas if release.max_replicas is None else release.max_replicas
    return Replicas(least, max(least, most, 1))
