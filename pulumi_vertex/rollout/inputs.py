"""`Rollout` as programs see it: its inputs and outputs, and the checks of several inputs together."""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from collections.abc import Mapping
from typing import Annotated, Final, Required, TypedDict, Unpack

import pulumi

from ..checks import Failures, given_together
from ..definition import PACKAGE, Definition, Field, outputs_of, properties_of
from ..patterns import ACCELERATOR, ACCELERATOR_HINT, EMAIL, EMAIL_HINT, MACHINE_TYPE, MACHINE_TYPE_HINT
from ..resource import Resource
from ..wire import Wire
from .endpoint import NAME as ENDPOINT_NAME
from .plan import Spec
from .wanted import IDLE_SECONDS, METRICS, spec_of


class Deployed(TypedDict, total=False):
    """One release: a model version, the machines it runs on and its share of the traffic.

    Traffic, replicas, autoscaling and container logging change in place; anything else deploys anew beside the old.
    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints#DeployedModel
    """

    model: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Model version by its full name, the `id` of a ModelVersion.",
                pattern=r"projects/[^/]+/locations/[^/]+/models/[^/@]+@\d+",
                hint="a version's full name, projects/PROJECT/locations/LOCATION/models/ID@VERSION, as the "
                "`id` of a ModelVersion is (an alias or no version would mean something else tomorrow)",
            ),
        ]
    ]
    traffic: Required[
        Annotated[pulumi.Input[int], Field("Percent of the requests; all releases add up to 100.", low=0, high=100)]
    ]
    machine_type: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Machine of one replica, such as n1-standard-4. "
                "https://cloud.google.com/vertex-ai/docs/predictions/configure-compute",
                pattern=MACHINE_TYPE,
                hint=MACHINE_TYPE_HINT,
            ),
        ]
    ]
    min_replicas: Annotated[
        pulumi.Input[int],
        Field(
            "Replicas that always run. 0 scales to zero while nobody asks, a preview of Google's: requests to a model "
            "that is scaled to zero start it and are answered with 429 until it is up. It needs a dedicated endpoint "
            "and a single release; while another model is on the endpoint, during an update, one replica runs. "
            "https://docs.cloud.google.com/gemini-enterprise-agent-platform/machine-learning/predictions/autoscaling",
            low=0,
            default=1,
        ),
    ]
    max_replicas: Annotated[
        pulumi.Input[int],
        Field("Replicas that may run under load; as many as min_replicas, but at least 1, where absent.", low=1),
    ]
    min_scaleup_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "With min_replicas=0: how long the model stays up at least once it has come up.",
            low=300,
            high=28800,
            default=IDLE_SECONDS,
        ),
    ]
    idle_scaledown_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "With min_replicas=0: how long nobody must have asked before the model is scaled to zero.",
            low=300,
            high=28800,
            default=IDLE_SECONDS,
        ),
    ]
    autoscaling_targets: Annotated[
        pulumi.Input[Mapping[str, pulumi.Input[int]]],
        Field(
            "Use that autoscaling aims at, by metric: cpu and accelerator in percent, requests in requests a minute "
            "and replica. Where absent, Vertex AI aims at 60 % of cpu, and of accelerators where there are any.",
            pattern="|".join(METRICS),
            hint="cpu, accelerator or requests",
        ),
    ]
    accelerator_type: Annotated[
        pulumi.Input[str],
        Field(
            "Accelerator of each replica, such as NVIDIA_L4.",
            pattern=ACCELERATOR,
            hint=ACCELERATOR_HINT,
        ),
    ]
    accelerator_count: Annotated[pulumi.Input[int], Field("Accelerators of each replica.", low=1)]
    service_account: Annotated[
        pulumi.Input[str],
        Field(
            "E-mail of the service account that the container runs as. Whoever deploys needs "
            "iam.serviceAccounts.actAs on it; it replaces the default access to the model's files.",
            pattern=EMAIL,
            hint=EMAIL_HINT,
        ),
    ]
    container_logging: Annotated[
        pulumi.Input[bool], Field("Whether the container's output goes to Cloud Logging.", default=True)
    ]
    access_logging: Annotated[
        pulumi.Input[bool], Field("Whether each request is noted in Cloud Logging.", default=False)
    ]
    spot: Annotated[
        pulumi.Input[bool],
        Field("Whether to run on spot machines, which Google may take away.", default=False),
    ]


class RolloutInputs(TypedDict, total=False):
    endpoint: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Endpoint by its full name, the `id` of a gcp.vertex.AiEndpoint. Let that resource ignore changes "
                "of its `traffic_split`.",
                pattern=ENDPOINT_NAME,
                hint="projects/PROJECT/locations/LOCATION/endpoints/ID, the `id` of a gcp.vertex.AiEndpoint",
                replaces=True,
            ),
        ]
    ]
    models: Required[
        Annotated[
            Mapping[str, Deployed],
            Field(
                "What is deployed, by release name. An empty map is an endpoint without machines, which costs "
                "nothing and answers nothing.",
                # digits: the name that a refresh or an import gives to what is deployed under no release
                pattern=r"[a-z][a-z0-9-]{0,62}|\d{1,19}",
                hint="1 to 63 of a-z, 0-9 and -, beginning with a letter",
            ),
        ]
    ]
    drain_seconds: Annotated[
        pulumi.Input[int],
        Field(
            "Seconds between the last traffic and the undeployment of what leaves.",
            low=0,
            high=3600,
            default=30,
        ),
    ]
    adopt: Annotated[
        pulumi.Input[bool],
        Field(
            "Whether to take over deployed models that this rollout did not make. Those that fit a release stay, "
            "the others are undeployed. Without it they are an error.",
            default=False,
        ),
    ]


class Rollout(Resource):
    """What is deployed on one endpoint and how the traffic is shared.

    An update deploys what is missing without traffic, waits until it is available, moves the traffic in one call, waits
    `drain_seconds` and undeploys what is gone. If a release cannot be deployed, it is undeployed again, the traffic
    stays where it was, and the error says why. A release is recognised by what it is, not by its name: a canary that
    becomes `stable` is not deployed again.

    The preview lists the steps. Deleting the rollout undeploys what it made and leaves the endpoint. One endpoint has
    one Rollout. Its id is the endpoint's full name: give that to `pulumi import`. Timeouts: 60 minutes to create or
    update, 30 to delete, changed with `custom_timeouts`.

        vertex.Rollout(
            "digits",
            endpoint=endpoint.id,
            models={
                "stable": vertex.Deployed(model=old.id, traffic=90, machine_type="n1-standard-2"),
                "next": vertex.Deployed(model=new.id, traffic=10, machine_type="n1-standard-2"),
            },
        )

    https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[RolloutInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def deployed_models(self) -> pulumi.Output[Mapping[str, str]]:
        """Deployed-model id of each release; what is on its way out stands under its own id."""
        output: pulumi.Output[Mapping[str, str]] = self._output("deployedModels")
        return output

    @property
    def traffic_split(self) -> pulumi.Output[Mapping[str, int]]:
        """Percent of the requests by deployed-model id, as the endpoint has it."""
        output: pulumi.Output[Mapping[str, int]] = self._output("trafficSplit")
        return output

    @property
    def other_deployed_models(self) -> pulumi.Output[Mapping[str, str]]:
        """Deployed models that somebody else made: the model version of each deployed-model id."""
        output: pulumi.Output[Mapping[str, str]] = self._output("otherDeployedModels")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:Rollout", Rollout.__doc__ or "", properties_of(RolloutInputs), outputs_of(Rollout)
)
Rollout.definition = DEFINITION


def check_together(inputs: Wire) -> Failures:
    """What several properties together can be wrong about."""
    failures: Failures = []
    models = inputs.get("models")
    if not isinstance(models, dict):
        return failures
    releases = {name: release for name, release in models.items() if isinstance(release, dict)}
    shares = {name: release.get("traffic") for name, release in releases.items()}
    if releases and all(isinstance(share, int) for share in shares.values()):
        total = sum(share for share in shares.values() if isinstance(share, int))
        if total != 100:
            said = ", ".join(f"{name} {share}" for name, share in shares.items())
            failures.append(("models", f"must share 100 % of the traffic, not {total} % ({said}). Change a `traffic`."))
    for name, release in releases.items():
        failures += _check_size(f"models.{name}", release, alone=len(models) == 1)
        failures += given_together(f"models.{name}", release, "acceleratorType", "acceleratorCount")
    seen: dict[Spec, str] = {}
    for name, release in releases.items():
        spec = spec_of(release)
        if spec.model is None or "machineType" not in release:
            continue
        if spec in seen:
            failures.append(
                (
                    f"models.{name}",
                    f"is the same model version on the same machines as {seen[spec]}. Leave one of them out and give "
                    "the other the traffic of both.",
                )
            )
        seen[spec] = name
    return failures


def _check_size(path: str, release: Wire, *, alone: bool) -> Failures:
    """What is wrong with replicas and autoscaling; `alone` where there is no other release."""
    failures: Failures = []
    least, most = release.get("minReplicas", 1), release.get("maxReplicas")
    if isinstance(least, int) and isinstance(most, int) and most < least:
        failures.append((f"{path}.maxReplicas", f"must be at least minReplicas, {least}, not {most}."))
    if least == 0 and not alone:
        failures.append(
            (f"{path}.minReplicas", "can be 0 only where there is one release: give each of several at least 1.")
        )
    for period in ("minScaleupSeconds", "idleScaledownSeconds"):
        if period in release and isinstance(least, int) and least:
            failures.append((f"{path}.{period}", "has a meaning only with minReplicas 0. Leave it out."))
    targets = release.get("autoscalingTargets")
    for metric, target in (targets if isinstance(targets, dict) else {}).items():
        highest = None if metric == "requests" else 100
        if isinstance(target, int) and (target < 1 or (highest and target > highest)):
            bounds = f"between 1 and {highest}" if highest else "at least 1"
            failures.append((f"{path}.autoscalingTargets.{metric}", f"must be {bounds}, not {target}."))
    return failures
