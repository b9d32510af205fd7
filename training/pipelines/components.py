"""The steps of the census pipeline as components of KFP, and the pipeline itself.

KFP copies the source of each function into the compiled template and runs it in the training image, which has this
repository's code. A function therefore imports inside its body, and leaves the work to training/pipelines/steps.py.
The text that a step returns, or its output `summary`, is the sentence that a run prints about it.

KFP reads the annotations at run time, so that this module cannot postpone their evaluation.
"""

from typing import Any, NamedTuple

from kfp import dsl

DEFAULT_TRAINING_IMAGE = "headcount-training:latest"  # as the README builds it
DEFAULT_SERVING_IMAGE = "headcount:latest"


def component(function: Any) -> Any:
    """Makes a component of a function. The training image has KFP, hence nothing is installed at run time."""
    return dsl.component(function, base_image=DEFAULT_TRAINING_IMAGE, install_kfp_package=False)


def container_component(function: Any) -> Any:
    return dsl.container_component(function)


@component
def download(data: str, raw: dsl.Output[dsl.Dataset]) -> str:
    """Copies the two files of the UCI Adult table.

    data: a folder or a gs:// prefix with adult.data and adult.test, or "" for the published files.
    """
    from pathlib import Path

    from training.pipelines import steps

    return steps.download(data, Path(raw.path))


@component
def clean(
    raw: dsl.Input[dsl.Dataset], max_dropped: float, cleaned: dsl.Output[dsl.Dataset], report: dsl.Output[dsl.Metrics]
) -> str:
    """Writes train.csv and eval.csv without broken records, duplicates and leaks, and counts what was dropped.

    max_dropped: the step fails if a larger fraction of the records is broken.
    """
    from pathlib import Path

    from training.pipelines import steps

    found = steps.clean(Path(raw.path), Path(cleaned.path), max_dropped)
    for name, count in found.counts.items():
        report.log_metric(name, count)
    return found.summary


@container_component
def train(
    data: dsl.Input[dsl.Dataset],
    train_steps: int,
    seed: int,
    model: dsl.Output[dsl.Model],
    run: dsl.Output[dsl.Artifact],
) -> dsl.ContainerSpec:
    """Runs the existing program `python -m training.census`. run: its checkpoints and its TensorBoard files."""
    return dsl.ContainerSpec(
        image=DEFAULT_TRAINING_IMAGE,
        # The program takes the folders of its outputs from Vertex AI's variables (training/common.py).
        command=[
            "env", f"AIP_MODEL_DIR={model.path}", f"AIP_CHECKPOINT_DIR={run.path}/checkpoints",
            f"AIP_TENSORBOARD_LOG_DIR={run.path}/logs", "python", "-m", "training.census",
        ],
        args=[
            "--train-files", f"{data.path}/train.csv", "--eval-files", f"{data.path}/eval.csv",
            "--train-steps", str(train_steps), "--seed", str(seed),
        ],
    )  # fmt: skip


@component
def evaluate(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    classes: dsl.Output[dsl.ClassificationMetrics],
) -> str:
    """Measures the exported model on eval.csv, with the code that serves it."""
    from pathlib import Path

    from training.pipelines import steps

    found = steps.evaluate(Path(model.path), Path(data.path))
    for name, value in found.metrics.items():
        metrics.log_metric(name, value)
    classes.log_confusion_matrix(list(found.classes), found.confusion)
    return found.summary


@component
def infer(model: dsl.Input[dsl.Model], data: dsl.Input[dsl.Dataset], predictions: dsl.Output[dsl.Dataset]) -> str:
    """Predicts the records of eval.csv without their labels, as JSON lines in the format of a batch prediction."""
    from pathlib import Path

    from training.pipelines import steps

    return steps.infer(Path(model.path), Path(data.path), Path(predictions.path))


@component
def compare(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    metrics: dsl.Input[dsl.Metrics],
    registry: str,
    job: str,
) -> NamedTuple("Comparison", [("Output", bool), ("champion", str), ("summary", str)]):  # type: ignore[valid-type]
    """Evaluates the default version of the registry on the same data, and decides whether the model is better.

    The decision has KFP's name Output, because KFP's local runner knows no other one in a condition.
    """
    from pathlib import Path

    from training.pipelines import steps

    return tuple(steps.compare(Path(model.path), Path(data.path), metrics.metadata, registry, job))


@component
def register(
    model: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    metrics: dsl.Input[dsl.Metrics],
    champion: str,
    registry: str,
    serving_image: str,
    job: str,
) -> str:
    """Adds the model to the registry as the default version. champion: the default version so far, or ""."""
    from pathlib import Path

    from training.pipelines import steps

    return steps.register(
        Path(model.path), model.uri, Path(data.path), metrics.metadata, champion, registry, serving_image, job
    )


def census_pipeline(training_image: str, serving_image: str) -> Any:
    """Returns the pipeline. serving_image: default of the parameter with that name."""
    serving = serving_image  # the name is a parameter's below

    @dsl.pipeline(name="census", description="Trains, evaluates and registers the census model.")  # type: ignore[untyped-decorator]
    def census(
        data: str = "",
        max_dropped: float = 0.05,
        train_steps: int = 2000,
        seed: int = 0,
        registry: str = "",
        serving_image: str = serving,
    ) -> None:
        job = dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER
        raw = download(data=data)
        cleaned = clean(raw=raw.outputs["raw"], max_dropped=max_dropped)
        dataset = cleaned.outputs["cleaned"]
        trained = train(data=dataset, train_steps=train_steps, seed=seed)
        model = trained.outputs["model"]
        evaluated = evaluate(model=model, data=dataset)
        metrics = evaluated.outputs["metrics"]
        inferred = infer(model=model, data=dataset)
        compared = compare(model=model, data=dataset, metrics=metrics, registry=registry, job=job)
        with dsl.If(compared.outputs["Output"] == True, name="better"):  # noqa: E712 # KFP overloads the operator
            registered = register(
                model=model,
                data=dataset,
                metrics=metrics,
                champion=compared.outputs["champion"],
                registry=registry,
                serving_image=serving_image,
                job=job,
            )
        for task in (raw, cleaned, trained, evaluated, inferred, compared, registered):
            task.set_container_image(training_image)
        for task in (compared, registered):  # the registry changes without their knowledge
            task.set_caching_options(False)

    return census
