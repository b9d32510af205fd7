"""The settings with which a deployed model is served, read from its version's container spec and its own resources.

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

import hashlib
import re
from dataclasses import dataclass

from sandbox.projects import project_number
from sandbox.runner import LABEL, Launch
from sandbox.store import JSON

# Vertex AI's own default is not documented.
DEPLOYMENT_TIMEOUT = 30 * 60.0


@dataclass(frozen=True)
class Idle:
    """How a model scales to zero: with how many replicas it comes back, and the two periods in seconds."""

    replicas: int
    up_at_least: float
    idle: float


@dataclass(frozen=True)
class Serving:
    """How one deployed model is served: all that is needed to start a replica of it."""

    endpoint: str
    deployed_id: str
    version: str  # …/models/ID@N
    launch: Launch
    predict_route: str
    health_route: str
    timeout: float
    startup: JSON
    health: JSON
    liveness: JSON
    idle: Idle | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.endpoint, self.deployed_id

    @property
    def route_probe(self) -> JSON:
        """Vertex AI's own health check, where the model says no other: its marker is `route`."""
        return {"route": self.health_route}


def expand(text: str, variables: dict[str, str]) -> str:
    """Kubernetes' $(VAR): an unknown one stays as it is, $$(VAR) is a literal $(VAR)."""

    def value(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        return variables.get(match[1], match[0])

    return re.sub(r"\$?\$\(([A-Za-z_][A-Za-z0-9_]*)\)", value, text)


def endpoint_number(endpoint: str) -> str:
    """The number that an endpoint has on Vertex AI even where its id is a name of the caller's; made from the name."""
    own = endpoint.rpartition("/")[2]
    if own.isdigit():
        return own
    return str(10**17 + int.from_bytes(hashlib.sha256(endpoint.encode()).digest()[:7]) % (9 * 10**17))


def serving(
    state: str, endpoint: str, deployed: JSON, version_name: str, version: JSON, idle_seconds: float | None = None
) -> Serving:
    """Reads a deployed model and its version's container spec as Vertex AI does.

    AIP_* variables: the page above, "Environment variables available in the container". `idle_seconds` replaces the
    periods of scale to zero.
    """
    resource = version["resource"]
    spec: JSON = resource["containerSpec"]
    port = spec.get("ports", [{}])[0].get("containerPort", 8080)
    number, deployed_id = endpoint_number(endpoint), deployed["id"]
    route = f"/v1/endpoints/{number}/deployedModels/{deployed_id}"
    health_route, predict_route = spec.get("healthRoute", route), spec.get("predictRoute", f"{route}:predict")
    resources: JSON = deployed["dedicatedResources"]
    machine: JSON = resources["machineSpec"]
    env = {
        "AIP_ACCELERATOR_TYPE": machine.get("acceleratorType", ""),
        "AIP_DEPLOYED_MODEL_ID": deployed_id,
        "AIP_ENDPOINT_ID": number,
        "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
        "AIP_HEALTH_ROUTE": health_route,
        "AIP_HTTP_PORT": str(port),
        "AIP_MACHINE_TYPE": machine["machineType"],
        "AIP_MODE": "PREDICTION",
        "AIP_MODE_VERSION": "1.0.0",
        "AIP_MODEL_NAME": number,  # "for compatibility reasons", as AIP_VERSION_NAME
        "AIP_PREDICT_ROUTE": predict_route,
        "AIP_PROJECT_NUMBER": project_number(endpoint.split("/")[1]),
        "AIP_STORAGE_URI": resource.get("artifactUri", ""),
        "AIP_VERSION_NAME": deployed_id,
    }
    for variable in spec.get("env", []):  # may refer to AIP_* and to earlier entries
        env[variable["name"]] = expand(variable.get("value", ""), env)
    labels = {
        "state": state,
        "endpoint": endpoint,
        "deployed-model": deployed_id,
        "version": version_name,
        "port": str(port),
    }
    return Serving(
        endpoint=endpoint,
        deployed_id=deployed_id,
        version=version_name,
        launch=Launch(
            image=version["image"],
            command=[expand(c, env) for c in spec.get("command", [])],
            args=[expand(a, env) for a in spec.get("args", [])],
            env=env,
            port=port,
            shared_memory_mb=int(spec.get("sharedMemorySizeMb", 0)),
            labels={LABEL + k: v for k, v in labels.items()},
            name=f"sandbox-{endpoint.rpartition('/')[2]}-{deployed_id}",
            accelerators=machine.get("acceleratorCount", 0),
        ),
        predict_route=predict_route,
        health_route=health_route,
        timeout=float(spec.get("deploymentTimeout", "0s").removesuffix("s")) or DEPLOYMENT_TIMEOUT,
        startup=spec.get("startupProbe", {}),
        health=spec.get("healthProbe", {}),
        liveness=spec.get("livenessProbe", {}),
        idle=None if resources["minReplicaCount"] else _idle(resources, idle_seconds),
    )


def _idle(resources: JSON, seconds: float | None) -> Idle:
    spec: JSON = resources["scaleToZeroSpec"]
    periods = (float(spec[name].removesuffix("s")) for name in ("minScaleupPeriod", "idleScaledownPeriod"))
    least, idle = (seconds if seconds is not None else period for period in periods)
    return Idle(resources["initialReplicaCount"], least, idle)
