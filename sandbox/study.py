"""The study of a tuning job: its parameters, suggestions by Optuna, and the metrics that trials report.

https://docs.cloud.google.com/vertex-ai/docs/training/hyperparameter-tuning-overview
Vertex AI suggests by Vizier's Gaussian process. Here Optuna's TPE sampler stands for it, which needs no PyTorch.
"""

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox.clock import seconds
from sandbox.errors import invalid, unimplemented
from sandbox.store import JSON

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = float | str
KINDS = ("doubleValueSpec", "integerValueSpec", "discreteValueSpec", "categoricalValueSpec")
LOG, REVERSE_LOG = "UNIT_LOG_SCALE", "UNIT_REVERSE_LOG_SCALE"
UNSUPPORTED = (
    "decayCurveStoppingSpec",
    "medianAutomatedStoppingSpec",
    "convexAutomatedStoppingSpec",
    "studyStoppingConfig",
)


@dataclass(frozen=True)
class Parameter:
    """A parameter to be tuned. `values` are those of a discrete or categorical one, in their order."""

    name: str
    kind: str
    low: float
    high: float
    scale: str
    values: tuple[Value, ...]

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        logarithmic = self.scale in (LOG, REVERSE_LOG)
        if self.kind == "categoricalValueSpec":
            return CategoricalDistribution(self.values)
        if self.kind == "discreteValueSpec":
            return IntDistribution(0, len(self.values) - 1)
        if self.kind == "integerValueSpec":
            return IntDistribution(int(self.low), int(self.high), log=logarithmic)
        return FloatDistribution(self.low, self.high, log=logarithmic)

    def inner(self, value: Value) -> Any:
        """The value as the distribution has it."""
        if self.kind == "discreteValueSpec":
            return self.values.index(value)
        if self.kind == "integerValueSpec":
            value = int(value)
        return self._mirrored(value)

    def outer(self, inner: Any) -> Value:
        """The value as a trial shows it."""
        return self.values[inner] if self.kind == "discreteValueSpec" else self._mirrored(inner)

    def _mirrored(self, value: Value) -> Value:
        # "Reverse" is logarithmic from the upper end.
        return self.low + self.high - value if self.scale == REVERSE_LOG and not isinstance(value, str) else value

    def choices(self) -> list[Value]:
        """All values, of a parameter that is not continuous."""
        return list(self.values) or list(range(int(self.low), int(self.high) + 1))


def parameters(spec: JSON) -> list[Parameter]:
    """The parameters of a StudySpec. Raises INVALID_ARGUMENT for one that Vertex AI refuses."""
    result = []
    for one in spec.get("parameters", []):
        name, kinds = one.get("parameterId", ""), [kind for kind in KINDS if kind in one]
        if not name or len(kinds) != 1:
            raise invalid("Each of study_spec.parameters needs a parameter_id and exactly one value spec.")
        if one.get("conditionalParameterSpecs"):
            raise unimplemented("study_spec.parameters with conditionalParameterSpecs")
        kind, values = kinds[0], one[kinds[0]]
        if "defaultValue" in values:
            raise invalid(f'Parameter "{name}": default_value is not supported by HyperparameterTuningJob.')
        result.append(
            Parameter(
                name,
                kind,
                float(values.get("minValue", 0)),
                float(values.get("maxValue", 0)),
                one.get("scaleType", ""),
                tuple(values.get("values", [])),
            )
        )
        _check(result[-1])
    if not result or len({p.name for p in result}) < len(result):
        raise invalid("study_spec.parameters must not be empty, and each parameter_id must be there once.")
    return result


def _check(parameter: Parameter) -> None:
    name, listed = parameter.name, parameter.kind in KINDS[2:]
    if listed and not parameter.values:
        raise invalid(f'Parameter "{name}" needs at least one value.')
    if parameter.kind == "discreteValueSpec" and list(parameter.values) != sorted(set(parameter.values)):
        raise invalid(f'The values of parameter "{name}" must be in increasing order.')
    if not listed and parameter.low > parameter.high:
        raise invalid(f'Parameter "{name}": min_value must not be greater than max_value.')
    least = parameter.values[0] if listed else parameter.low
    if parameter.scale in (LOG, REVERSE_LOG):
        if isinstance(least, str):
            raise invalid(f'Parameter "{name}": scale_type must be unset for a categorical parameter.')
        if least <= 0:
            raise invalid(f'Parameter "{name}": a logarithmic scale needs a feasible space that is strictly positive.')


def check_study(spec: JSON) -> None:
    """Raises INVALID_ARGUMENT for a StudySpec that Vertex AI refuses, UNIMPLEMENTED for what the sandbox lacks."""
    for name in UNSUPPORTED:
        if name in spec:
            raise unimplemented(f"study_spec with {name}")
    metrics: list[JSON] = spec.get("metrics", [])
    names = {metric.get("metricId", "") for metric in metrics}
    if not metrics or "" in names or len(names) < len(metrics):
        raise invalid("study_spec.metrics must not be empty, and each needs a metric_id of its own.")
    for metric in metrics:
        if metric.get("goal") not in ("MAXIMIZE", "MINIMIZE"):
            raise invalid(f'Metric "{metric["metricId"]}" needs a goal, MAXIMIZE or MINIMIZE.')
        if "safetyConfig" in metric:
            raise unimplemented("study_spec.metrics with safetyConfig")
    found = parameters(spec)
    if spec.get("algorithm") == "GRID_SEARCH" and any(p.kind == "doubleValueSpec" for p in found):
        raise invalid("To use grid search, all parameters must be INTEGER, CATEGORICAL, or DISCRETE.")


# ---------------------------------------------------------------------------------------------------- suggestions


def suggest(spec: JSON, trials: list[JSON], seed: str) -> list[JSON] | None:
    """The parameters of the next trial, or None when a grid is exhausted. The same for the same trials and seed.

    It blocks: importing Optuna takes a second or two, a suggestion some milliseconds.
    """
    tuned = parameters(spec)
    if spec.get("algorithm") == "GRID_SEARCH":
        combinations = itertools.product(*(parameter.choices() for parameter in tuned))
        chosen = next(itertools.islice(combinations, len(trials), None), None)
        return _shown(dict(zip((p.name for p in tuned), chosen, strict=True))) if chosen is not None else None

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    number = int.from_bytes(hashlib.sha256(f"{seed}/{len(trials)}".encode()).digest()[:4])
    random = spec.get("algorithm") == "RANDOM_SEARCH"
    sampler = optuna.samplers.RandomSampler(number) if random else optuna.samplers.TPESampler(seed=number)
    study = optuna.create_study(directions=[m["goal"].lower() for m in spec["metrics"]], sampler=sampler)
    distributions = {parameter.name: parameter.distribution() for parameter in tuned}
    for trial in trials:
        values = {p["parameterId"]: p["value"] for p in trial["parameters"]}
        state, results = optuna.trial.TrialState.RUNNING, None
        if trial["state"] == "SUCCEEDED":
            state, results = optuna.trial.TrialState.COMPLETE, _results(spec, trial["finalMeasurement"])
        elif trial["state"] == "INFEASIBLE":
            state = optuna.trial.TrialState.FAIL
        told = optuna.trial.create_trial(
            state=state,
            values=results,
            params={p.name: p.inner(values[p.name]) for p in tuned},
            distributions=distributions,
        )
        study.add_trial(told)
    asked = study.ask(distributions)
    return _shown({parameter.name: parameter.outer(asked.params[parameter.name]) for parameter in tuned})


def _shown(values: dict[str, Value]) -> list[JSON]:
    return [{"parameterId": name, "value": value} for name, value in values.items()]


def arguments(values: list[JSON]) -> list[str]:
    """A trial's parameters as the arguments of its containers: whole numbers without a point."""

    def text(value: Value) -> str:
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    return [f"--{one['parameterId']}={text(one['value'])}" for one in values]


# -------------------------------------------------------------------------------------------------------- metrics


def measurements(spec: JSON, content: str, began: str) -> list[JSON]:
    """What a trial has reported, by step, from the file that cloudml-hypertune writes.

    Lines that are no report, and values that are no number, are left out. `began` is the trial's startTime.
    """
    known = {metric["metricId"] for metric in spec["metrics"]}
    steps: dict[int, tuple[float, dict[str, float]]] = {}
    for line in content.splitlines():
        try:
            report = json.loads(line)
            step, time = int(report.get("global_step", 0)), float(report["timestamp"])
            values = {name: float(report[name]) for name in known & report.keys()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if values:
            steps[step] = (time, {**steps.get(step, (0.0, {}))[1], **values})
    return [
        {
            "elapsedDuration": f"{max(0.0, time - seconds(began)):.3f}s",
            **({"stepCount": str(step)} if step else {}),
            "metrics": [{"metricId": name, "value": value} for name, value in sorted(values.items())],
        }
        for step, (time, values) in sorted(steps.items())
    ]


def _results(spec: JSON, measurement: JSON) -> list[float]:
    values = {metric["metricId"]: metric["value"] for metric in measurement["metrics"]}
    return [values[metric["metricId"]] for metric in spec["metrics"]]


def final_measurement(spec: JSON, reported: list[JSON]) -> JSON | None:
    """The measurement that counts: the last, or the best by the first metric. None where a metric is missing."""
    wanted = {metric["metricId"] for metric in spec["metrics"]}
    whole = [one for one in reported if {metric["metricId"] for metric in one["metrics"]} == wanted]
    if not whole:
        return None
    if spec.get("measurementSelectionType") != "BEST_MEASUREMENT":
        return whole[-1]
    sign = 1 if spec["metrics"][0]["goal"] == "MAXIMIZE" else -1
    return max(whole, key=lambda one: sign * _results(spec, one)[0])
