"""Bodies of the requests that deploy a model and change its size."""

from __future__ import annotations

from ..vertex_api import V1, V1BETA1
from ..wire import Wire
from .plan import DEFAULT_TARGETS, Resize, Size, Wanted
from .wanted import METRICS


def deployed_model(wanted: Wanted, full_name: str, mark: str) -> Wire:
    """The DeployedModel of a release, without its id.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints#DeployedModel
    """
    spec, size = wanted.spec, wanted.size
    machine: Wire = {"machineType": spec.machine_type}
    if spec.accelerator_type:
        machine |= {"acceleratorType": spec.accelerator_type, "acceleratorCount": spec.accelerator_count}
    resources = {"machineSpec": machine, **replicas(size)}
    if size.targets:
        resources["autoscalingMetricSpecs"] = metric_specs(dict(size.targets))
    if spec.spot:
        resources["spot"] = True
    deployed: Wire = {
        "model": full_name,
        "displayName": f"{spec.model} {mark}",
        "dedicatedResources": resources,
        **logging_of(size, beta=not size.min_replicas),
    }
    if spec.service_account:
        deployed["serviceAccount"] = spec.service_account
    if spec.access_logging:
        deployed["enableAccessLogging"] = True
    return deployed


def resize_request(step: Resize) -> tuple[Wire, str]:
    """The body of mutateDeployedModel for a changed size, and the API version that takes it."""
    old, new = step.old, step.new
    beta = not (old.min_replicas and new.min_replicas)
    resources = replicas(new)
    mask = []
    if old.min_replicas != new.min_replicas:
        mask.append("dedicatedResources.minReplicaCount")
    if old.max_replicas != new.max_replicas:
        mask.append("dedicatedResources.maxReplicaCount")
    if old.idle != new.idle:
        mask.append("dedicatedResources.scaleToZeroSpec")
    if not old.has_targets_of(new):
        mask.append("dedicatedResources.autoscalingMetricSpecs")
        resources["autoscalingMetricSpecs"] = metric_specs(targets_to_send(old, new))
    logging = logging_of(new, beta=beta)
    if old.container_logging != new.container_logging:
        mask += logging
    deployed = {"id": step.id, "dedicatedResources": resources, **logging}
    return {"deployedModel": deployed, "updateMask": ",".join(mask)}, V1BETA1 if beta else V1


def replicas(size: Size) -> Wire:
    counts: Wire = {"minReplicaCount": size.min_replicas, "maxReplicaCount": size.max_replicas}
    if size.idle:
        counts["initialReplicaCount"] = 1
        counts["scaleToZeroSpec"] = {"minScaleupPeriod": f"{size.idle[0]}s", "idleScaledownPeriod": f"{size.idle[1]}s"}
    return counts


def logging_of(size: Size, *, beta: bool) -> Wire:
    """v1 logs unless told not to, v1beta1 only if told to."""
    if beta:
        return {"enableContainerLogging": size.container_logging}
    return {"disableContainerLogging": not size.container_logging}


def metric_specs(targets: dict[str, int]) -> list[Wire]:
    return [{"metricName": METRICS.get(metric, metric), "target": target} for metric, target in targets.items()]


def targets_to_send(old: Size, new: Size) -> dict[str, int]:
    """The targets of `new`, with defaults written out where `old` had others: what an empty list means is not known."""
    dropped = {metric: DEFAULT_TARGETS[metric] for metric, _ in old.targets if metric in DEFAULT_TARGETS}
    return {**dropped, **dict(new.targets)} or {"cpu": DEFAULT_TARGETS["cpu"]}
