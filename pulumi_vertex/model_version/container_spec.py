"""The container of a model version: its inputs, their checks, and Vertex AI's ModelContainerSpec.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/ModelContainerSpec
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

from collections.abc import Sequence
from typing import Annotated, Final, TypedDict

import pulumi

from ..checks import Failures, by_digest
from ..definition import Field
from ..wire import Wire

Texts = Sequence[pulumi.Input[str]]
MARKER: Final = "PULUMI_VERTEX_VERSION"  # an environment variable: see `model_version.marker`
PROBES: Final = ("startupProbe", "healthProbe", "livenessProbe")


class Probe(TypedDict, total=False):
    """How Vertex AI asks a container whether it is well: a command in it, or an HTTP GET.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/ModelContainerSpec#Probe
    """

    command: Annotated[pulumi.Input[Texts], Field("Command to run in the container; exit status 0 is well.", low=1)]
    path: Annotated[
        pulumi.Input[str],
        Field("Path to GET; a status from 200 to 399 is well.", pattern=r"/.*", hint="a path from /"),
    ]
    port: Annotated[pulumi.Input[int], Field("Port to GET from; the container's own if absent.", low=1, high=65535)]
    period_seconds: Annotated[pulumi.Input[int], Field("Seconds from one probe to the next.", low=1)]
    timeout_seconds: Annotated[pulumi.Input[int], Field("Seconds after which a probe has failed.", low=1)]
    initial_delay_seconds: Annotated[pulumi.Input[int], Field("Seconds before the first probe.", low=0, default=0)]
    failure_threshold: Annotated[pulumi.Input[int], Field("Failures in a row that count as failed.", low=1)]
    success_threshold: Annotated[pulumi.Input[int], Field("Successes in a row that count as well.", low=1)]


def check_container(inputs: Wire) -> Failures:
    failures = by_digest("image", inputs.get("image"), "a tag can move, and Vertex AI copies the image only once")
    env = inputs.get("env")
    if isinstance(env, dict) and MARKER in env:
        failures.append((f"env.{MARKER}", "is the provider's own variable. Choose another name."))
    for name in PROBES:
        probe = inputs.get(name)
        if isinstance(probe, dict) and ("command" in probe) == ("path" in probe):
            failures.append((name, "needs either a command or a path, and not both."))
        if isinstance(probe, dict) and "port" in probe and "path" not in probe:
            failures.append((f"{name}.port", "has no meaning without a path. Leave it out."))
    return failures


def container_spec(inputs: Wire, mark: str) -> Wire:
    """The ModelContainerSpec of inputs; `mark` goes into the environment."""
    env = {**inputs.get("env", {}), MARKER: mark}
    spec: Wire = {
        "imageUri": inputs["image"],
        "command": inputs.get("command"),
        "args": inputs.get("args"),
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "ports": [{"containerPort": inputs["port"]}] if "port" in inputs else None,
        "predictRoute": inputs.get("predictRoute"),
        "healthRoute": inputs.get("healthRoute"),
        # JSON writes 64-bit numbers as texts, and durations with an s.
        "sharedMemorySizeMb": str(inputs["sharedMemoryMb"]) if "sharedMemoryMb" in inputs else None,
        "deploymentTimeout": f"{inputs['deploymentTimeoutSeconds']}s" if "deploymentTimeoutSeconds" in inputs else None,
        **{name: _probe(inputs[name]) for name in PROBES if name in inputs},
    }
    return {key: value for key, value in spec.items() if value}


def container_of(spec: Wire) -> Wire:
    """The inputs that a ModelContainerSpec was made from, None where it has nothing to say."""
    env = {variable["name"]: variable.get("value", "") for variable in spec.get("env", [])}
    memory, ports = spec.get("sharedMemorySizeMb"), spec.get("ports") or [{}]
    return {
        "image": spec.get("imageUri"),
        "command": spec.get("command"),
        "args": spec.get("args"),
        "env": {name: value for name, value in env.items() if name != MARKER},
        "port": ports[0].get("containerPort"),
        "predictRoute": spec.get("predictRoute"),
        "healthRoute": spec.get("healthRoute"),
        "sharedMemoryMb": int(memory) if memory else None,
        "deploymentTimeoutSeconds": seconds(spec.get("deploymentTimeout")),
        **{name: _probe_inputs(spec[name]) for name in PROBES if name in spec},
    }


def environment(version: Wire) -> dict[str, str]:
    """The environment of a version's container."""
    return {v["name"]: v.get("value", "") for v in version.get("containerSpec", {}).get("env", [])}


def seconds(duration: str | None) -> int | None:
    """A duration as JSON writes it, such as "600s"."""
    return int(float(duration.removesuffix("s"))) if duration else None


_NUMBERS = ("periodSeconds", "timeoutSeconds", "initialDelaySeconds", "failureThreshold", "successThreshold")


def _probe(inputs: Wire) -> Wire:
    asked: Wire = (
        {"exec": {"command": inputs["command"]}}
        if "command" in inputs
        else {"httpGet": _without_none({"path": inputs.get("path"), "port": inputs.get("port")})}
    )
    return asked | {name: inputs[name] for name in _NUMBERS if name in inputs}


def _probe_inputs(probe: Wire) -> Wire:
    found = {
        "command": probe.get("exec", {}).get("command"),
        "path": probe.get("httpGet", {}).get("path"),
        "port": probe.get("httpGet", {}).get("port"),
        **{name: probe.get(name) for name in _NUMBERS},
    }
    return {key: value for key, value in found.items() if value}


def _without_none(value: Wire) -> Wire:
    return {key: item for key, item in value.items() if item is not None}
