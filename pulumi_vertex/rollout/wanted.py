"""A rollout's inputs as the planner takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..wire import UNKNOWN, Wire
from .plan import Size, Spec, Targets, Wanted

METRICS: Final = {  # https://cloud.google.com/vertex-ai/docs/reference/rest/v1/AutoscalingMetricSpec
    "cpu": "aiplatform.googleapis.com/prediction/online/cpu/utilization",
    "accelerator": "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle",
    "requests": "aiplatform.googleapis.com/prediction/online/request_count",
}
IDLE_SECONDS: Final = 3600  # both periods of scale to zero where nothing is said
DRAIN_SECONDS: Final = 30


def wanted_of(inputs: Wire) -> dict[str, Wanted]:
    """The releases of a rollout by name, in the order of their names: a map from the engine comes in any order."""
    models = inputs.get("models")
    return {
        name: Wanted(name, spec_of(release), size_of(release), traffic if isinstance(traffic, int) else None)
        for name, release in sorted(models.items() if isinstance(models, dict) else ())
        if isinstance(release, dict)
        for traffic in [release.get("traffic")]
    }


def spec_of(release: Wire) -> Spec:
    return Spec(
        model=short(str(release["model"])) if release.get("model", UNKNOWN) != UNKNOWN else None,
        machine_type=str(release.get("machineType", "")),
        accelerator_type=str(release.get("acceleratorType", "")),
        accelerator_count=_known(release.get("acceleratorCount"), 0),
        service_account=str(release.get("serviceAccount", "")),
        access_logging=bool(release.get("accessLogging", False)),
        spot=bool(release.get("spot", False)),
    )


def size_of(release: Wire) -> Size:
    least = _known(release.get("minReplicas"), 1)
    periods = [_known(release.get(name), IDLE_SECONDS) for name in ("minScaleupSeconds", "idleScaledownSeconds")]
    targets = release.get("autoscalingTargets")
    return Size(
        min_replicas=least,
        max_replicas=_known(release.get("maxReplicas"), max(least, 1)),
        targets=targets_of(targets if isinstance(targets, dict) else {}),
        container_logging=bool(release.get("containerLogging", True)),
        idle=None if least else (periods[0], periods[1]),
    )


def targets_of(targets: Mapping[str, Any]) -> Targets:
    return tuple(sorted((metric, target) for metric, target in targets.items() if isinstance(target, int)))


def drain_seconds(inputs: Wire) -> int:
    return _known(inputs.get("drainSeconds"), DRAIN_SECONDS)


def short(model: str) -> str:
    """ID@VERSION of a model version's full name; the project may be named by id or by number, so it is left out."""
    return model.rsplit("/", 1)[-1]


def _known(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default
