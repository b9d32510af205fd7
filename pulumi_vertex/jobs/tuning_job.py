"""`TuningJob`: a study that runs one container again and again to find its best hyperparameters.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.hyperparameterTuningJobs
"""

# No `from __future__ import annotations` here: a TypedDict would then not know which of its keys are required.

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Required, TypedDict, TypeGuard, Unpack

import pulumi

from ..checks import Failures, join
from ..definition import PACKAGE, Definition, Field, outputs_of, properties_of
from ..wire import UNKNOWN, Wire
from .job import Job, JobType
from .specification import JobInputs, job_spec, specification_of

BOUNDED: Final = {"INTEGER": "integerValueSpec", "DOUBLE": "doubleValueSpec"}
LISTED: Final = {"CATEGORICAL": "categoricalValueSpec", "DISCRETE": "discreteValueSpec"}
BAYESIAN: Final = "ALGORITHM_UNSPECIFIED"  # what Vertex AI does where no algorithm is named


class Metric(TypedDict, total=False):
    """A figure that each trial reports, for example with cloudml-hypertune.

    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/StudySpec#MetricSpec
    """

    id: Required[
        Annotated[
            pulumi.Input[str],
            Field("Name under which a trial reports it.", pattern=r"\S+", hint="a name without spaces"),
        ]
    ]
    goal: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "Whether more is better: MAXIMIZE or MINIMIZE.",
                pattern="MAXIMIZE|MINIMIZE",
                hint="MAXIMIZE or MINIMIZE",
            ),
        ]
    ]


class Parameter(TypedDict, total=False):
    """A hyperparameter. A trial gets its value as a last argument, `--NAME=VALUE`.

    INTEGER and DOUBLE have min_value and max_value, both included, CATEGORICAL has categories, DISCRETE has values.
    https://cloud.google.com/vertex-ai/docs/reference/rest/v1/StudySpec#ParameterSpec
    """

    type: Required[
        Annotated[
            pulumi.Input[str],
            Field(
                "INTEGER, DOUBLE, CATEGORICAL or DISCRETE.",
                pattern="INTEGER|DOUBLE|CATEGORICAL|DISCRETE",
                hint="INTEGER, DOUBLE, CATEGORICAL or DISCRETE",
            ),
        ]
    ]
    min_value: Annotated[pulumi.Input[float], Field("Least value of an INTEGER or a DOUBLE.")]
    max_value: Annotated[pulumi.Input[float], Field("Greatest value of an INTEGER or a DOUBLE.")]
    categories: Annotated[pulumi.Input[Sequence[pulumi.Input[str]]], Field("Values of a CATEGORICAL.", low=1)]
    values: Annotated[
        pulumi.Input[Sequence[pulumi.Input[float]]], Field("Values of a DISCRETE, increasing.", low=1, high=1000)
    ]
    scale_type: Annotated[
        pulumi.Input[str],
        Field(
            "How the range is searched, not for a CATEGORICAL; UNIT_LOG_SCALE needs positive values.",
            pattern="UNIT_(LINEAR|LOG|REVERSE_LOG)_SCALE",
            hint="UNIT_LINEAR_SCALE, UNIT_LOG_SCALE or UNIT_REVERSE_LOG_SCALE",
        ),
    ]


class TuningJobInputs(JobInputs, total=False):
    metrics: Required[
        Annotated[
            pulumi.Input[Sequence[Metric]],
            Field("Figures of a trial; the first one decides which trial is the best.", low=1, replaces=True),
        ]
    ]
    parameters: Required[
        Annotated[
            pulumi.Input[Mapping[str, Parameter]],
            Field(
                "Hyperparameters by the names of their arguments.",
                pattern=r"[^\s=-][^\s=]*",
                hint="the name of an argument, without -- in front",
                low=1,
                replaces=True,
            ),
        ]
    ]
    max_trials: Required[Annotated[pulumi.Input[int], Field("Trials of the study in all.", low=1, replaces=True)]]
    parallel_trials: Annotated[
        pulumi.Input[int],
        Field("Trials that run at the same time. The fewer, the more each learns.", low=1, default=1, replaces=True),
    ]
    max_failed_trials: Annotated[
        pulumi.Input[int],
        Field("Failed trials that fail the job; Vertex AI decides where absent.", low=1, replaces=True),
    ]
    algorithm: Annotated[
        pulumi.Input[str],
        Field(
            "GRID_SEARCH or RANDOM_SEARCH; Bayesian optimization where absent.",
            pattern="GRID_SEARCH|RANDOM_SEARCH",
            hint="GRID_SEARCH or RANDOM_SEARCH, or nothing for Bayesian optimization",
            replaces=True,
        ),
    ]


class Trial(TypedDict):
    """One run of the container with one choice of the hyperparameters."""

    id: Annotated[str, Field("Number of the trial, from 1.")]
    state: Annotated[str, Field("State of the trial, such as SUCCEEDED, ACTIVE, or INFEASIBLE where it has failed.")]
    parameters: Annotated[Mapping[str, str], Field("Hyperparameters by name, as they are written in an argument.")]
    metrics: Annotated[Mapping[str, float], Field("Last metrics by name; none before it has ended.")]


class TuningJob(Job):
    """A study that runs one container again and again, as a trial, to find its best hyperparameters.

    It behaves as a CustomJob does: an update waits for it, a failed one runs again, the same specification never runs
    twice, a changed one runs anew. `scheduling`, machines and time are those of each trial. Its id is
    `projects/PROJECT/locations/LOCATION/hyperparameterTuningJobs/ID`.

        tuning = vertex.TuningJob(
            "digits",
            image=image.ref,
            machine_type="n1-standard-4",
            base_output_directory="gs://my-bucket/digits",
            metrics=[vertex.Metric(id="accuracy", goal="MAXIMIZE")],
            parameters={
                "learning-rate": vertex.Parameter(
                    type="DOUBLE", min_value=0.001, max_value=0.1, scale_type="UNIT_LOG_SCALE"
                ),
            },
            max_trials=30,
            parallel_trials=2,
        )
        vertex.ModelVersion("digits", model_id="digits", image=serving.ref, artifact_uri=tuning.artifact_uri)

    https://cloud.google.com/vertex-ai/docs/training/using-hyperparameter-tuning
    """

    def __init__(
        self,
        resource_name: str,
        opts: pulumi.ResourceOptions | None = None,
        **inputs: Unpack[TuningJobInputs],
    ) -> None:
        self._register(resource_name, inputs, opts)

    @property
    def artifact_uri(self) -> pulumi.Output[str]:
        """The model folder of the best trial, output_directory/TRIAL/model; empty where there is none."""
        output: pulumi.Output[str] = self._output("artifactUri")
        return output

    @property
    def trials(self) -> pulumi.Output[Sequence[Trial]]:
        """All trials of the study, by their numbers."""
        output: pulumi.Output[Sequence[Trial]] = self._output("trials")
        return output

    @property
    def best_trial(self) -> pulumi.Output[str]:
        """Number of the best trial; empty where none has succeeded."""
        output: pulumi.Output[str] = self._output("bestTrial")
        return output

    @property
    def best_parameters(self) -> pulumi.Output[Mapping[str, str]]:
        """Hyperparameters of the best trial by name, as they are written in an argument."""
        output: pulumi.Output[Mapping[str, str]] = self._output("bestParameters")
        return output

    @property
    def best_metrics(self) -> pulumi.Output[Mapping[str, float]]:
        """Metrics of the best trial by name."""
        output: pulumi.Output[Mapping[str, float]] = self._output("bestMetrics")
        return output


DEFINITION: Final = Definition(
    f"{PACKAGE}:index:TuningJob", TuningJob.__doc__ or "", properties_of(TuningJobInputs), outputs_of(TuningJob)
)
TuningJob.definition = DEFINITION


class TuningJobType(JobType):
    definition = DEFINITION
    collection: ClassVar = "hyperparameterTuningJobs"

    def check_together(self, inputs: Wire) -> Failures:
        return super().check_together(inputs) + check_study(inputs)

    def body(self, inputs: Wire, mark: str) -> Wire:
        failed = {"maxFailedTrialCount": inputs["maxFailedTrials"]} if "maxFailedTrials" in inputs else {}
        return {
            "studySpec": study_spec(inputs),
            "trialJobSpec": job_spec(inputs, mark),
            "maxTrialCount": inputs["maxTrials"],
            "parallelTrialCount": inputs.get("parallelTrials", 1),
            **failed,
        }

    def imported(self, job: Wire) -> Wire:
        return {
            **specification_of(job["trialJobSpec"], job.get("labels", {})),
            **study_of(job["studySpec"]),
            "maxTrials": job.get("maxTrialCount"),
            "parallelTrials": job.get("parallelTrialCount"),
            "maxFailedTrials": job.get("maxFailedTrialCount"),
            "displayName": job.get("displayName"),
            "encryptionKey": job.get("encryptionSpec", {}).get("kmsKeyName"),
        }

    def directory(self, job: Wire) -> str:
        return str(job.get("trialJobSpec", {}).get("baseOutputDirectory", {}).get("outputUriPrefix", "")).rstrip("/")

    def results(self, job: Wire, directory: str) -> Wire:
        trials = trials_of(job)
        best = best_of(trials, job.get("studySpec", {}).get("metrics", []))
        return {
            "artifactUri": f"{directory}/{best['id']}/model" if best and directory else "",
            "trials": trials,
            "bestTrial": best.get("id", ""),
            "bestParameters": best.get("parameters", {}),
            "bestMetrics": best.get("metrics", {}),
        }

    def progress(self, job: Wire) -> str:
        trials, metrics = trials_of(job), job.get("studySpec", {}).get("metrics", [])
        ended = sum(trial["state"] in ("SUCCEEDED", "INFEASIBLE") for trial in trials)
        said = f"{ended} of {job.get('maxTrialCount', '?')} trials"
        if best := best_of(trials, metrics):
            metric = metrics[0]["metricId"]
            said += f", best {metric} {best['metrics'][metric]:.6g} (trial {best['id']})"
        return said


def check_study(inputs: Wire) -> Failures:
    """What several properties of a study together can be wrong about."""
    failures: Failures = []
    most, parallel = inputs.get("maxTrials"), inputs.get("parallelTrials")
    if isinstance(most, int) and isinstance(parallel, int) and parallel > most:
        failures.append(("parallelTrials", f"must be at most maxTrials, {most}, not {parallel}."))
    parameters, metrics = inputs.get("parameters"), inputs.get("metrics")
    for name, parameter in (parameters if isinstance(parameters, dict) else {}).items():
        if isinstance(parameter, dict):
            failures += _check_parameter(join("parameters", name), parameter)
    names = [m.get("id") for m in metrics if isinstance(m, dict)] if isinstance(metrics, list) else []
    for index, name in enumerate(names):
        if name != UNKNOWN and name in names[:index]:
            failures.append((f"metrics[{index}].id", f"is {name} a second time. Leave one of them out."))
    return failures


def _check_parameter(path: str, parameter: Wire) -> Failures:
    failures: Failures = []
    kind = parameter.get("type")
    fitting = {
        **dict.fromkeys(BOUNDED, ("minValue", "maxValue")),
        "CATEGORICAL": ("categories",),
        "DISCRETE": ("values",),
    }
    if kind not in fitting:
        return failures
    for name in ("minValue", "maxValue", "categories", "values"):
        if name in fitting[kind] and name not in parameter:
            failures.append((f"{path}.{name}", f"is missing: a parameter of type {kind} needs it."))
        elif name in parameter and name not in fitting[kind]:
            failures.append((f"{path}.{name}", f"has no meaning for a parameter of type {kind}. Leave it out."))
    least, most, scale = parameter.get("minValue"), parameter.get("maxValue"), parameter.get("scaleType")
    numbers_given = [n for n in (least, most, *_list(parameter.get("values"))) if _is_number(n)]
    if _is_number(least) and _is_number(most) and most < least:
        failures.append((f"{path}.maxValue", f"must be at least minValue, {least}, not {most}."))
    if kind == "INTEGER":
        failures += [
            (f"{path}.{name}", f"must be a whole number, not {parameter[name]}.")
            for name in ("minValue", "maxValue")
            if isinstance(parameter.get(name), float) and not float(parameter[name]).is_integer()
        ]
    values = _list(parameter.get("values"))
    if all(map(_is_number, values)) and values != sorted(set(values)):
        failures.append((f"{path}.values", "must increase. Sort them, and name each one once."))
    if kind == "CATEGORICAL" and scale is not None:
        failures.append((f"{path}.scaleType", "has no meaning for a parameter of type CATEGORICAL. Leave it out."))
    elif scale == "UNIT_LOG_SCALE" and any(n <= 0 for n in numbers_given):
        failures.append((f"{path}.scaleType", "needs values above 0. Change the values, or the scale."))
    return failures


def study_spec(inputs: Wire) -> Wire:
    """The StudySpec of inputs."""
    spec: Wire = {
        "metrics": [{"metricId": metric["id"], "goal": metric["goal"]} for metric in inputs["metrics"]],
        "parameters": [_parameter_spec(name, p) for name, p in sorted(inputs["parameters"].items())],
    }
    if "algorithm" in inputs:
        spec["algorithm"] = inputs["algorithm"]
    return spec


def study_of(spec: Wire) -> Wire:
    """The inputs that a StudySpec was made from."""
    algorithm = spec.get("algorithm", BAYESIAN)
    return {
        "metrics": [{"id": metric["metricId"], "goal": metric["goal"]} for metric in spec.get("metrics", [])],
        "parameters": {p["parameterId"]: _parameter_of(p) for p in spec.get("parameters", [])},
        "algorithm": None if algorithm == BAYESIAN else algorithm,
    }


def _parameter_spec(name: str, parameter: Wire) -> Wire:
    kind = parameter["type"]
    values: Wire
    if kind in BOUNDED:
        values = {bound: parameter[bound] for bound in ("minValue", "maxValue")}
        if kind == "INTEGER":  # JSON writes 64-bit numbers as texts
            values = {bound: str(int(value)) for bound, value in values.items()}
    else:
        values = {"values": parameter["categories" if kind == "CATEGORICAL" else "values"]}
    scale = {"scaleType": parameter["scaleType"]} if "scaleType" in parameter else {}
    return {"parameterId": name, (BOUNDED | LISTED)[kind]: values, **scale}


def _parameter_of(spec: Wire) -> Wire:
    kind, field = next((kind, field) for kind, field in (BOUNDED | LISTED).items() if field in spec)
    given, found = spec[field], {"type": kind}
    if kind in BOUNDED:
        convert: Any = int if kind == "INTEGER" else float
        found |= {bound: convert(given.get(bound, 0)) for bound in ("minValue", "maxValue")}
    else:
        found["categories" if kind == "CATEGORICAL" else "values"] = given.get("values", [])
    scale = spec.get("scaleType", "SCALE_TYPE_UNSPECIFIED")
    return found if scale == "SCALE_TYPE_UNSPECIFIED" else found | {"scaleType": scale}


def trials_of(job: Wire) -> list[Wire]:
    """The trials of a job, by number."""
    found = [
        {
            "id": str(trial.get("id", "")),
            "state": trial.get("state", "STATE_UNSPECIFIED"),
            "parameters": {p["parameterId"]: as_argument(p.get("value", "")) for p in trial.get("parameters", [])},
            "metrics": {
                metric["metricId"]: value
                for metric in trial.get("finalMeasurement", {}).get("metrics", [])
                if _is_number(value := metric.get("value", 0.0))
            },
        }
        for trial in job.get("trials", [])
    ]
    return sorted(found, key=lambda trial: (len(trial["id"]), trial["id"]))


def best_of(trials: list[Wire], metrics: list[Wire]) -> Wire:
    """The best of the trials that have succeeded, by the first metric, and the earliest of equals; {} without any."""
    if not metrics:
        return {}
    metric, sign = metrics[0]["metricId"], -1 if metrics[0]["goal"] == "MINIMIZE" else 1
    good = [trial for trial in trials if trial["state"] == "SUCCEEDED" and metric in trial["metrics"]]
    return max(good, key=lambda trial: sign * float(trial["metrics"][metric]), default={})


def as_argument(value: Any) -> str:
    """A parameter's value as an argument is written: 128 and not 128.0, which JSON makes of it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number. A diverged trial's is not: JSON has a text for it, such as "NaN"."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
