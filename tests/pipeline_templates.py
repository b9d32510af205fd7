"""Pipelines compiled by KFP for tests of the sandbox. Without `from __future__`, because KFP reads annotations."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import yaml
from kfp import compiler, dsl

IMAGE = "europe-west4-docker.pkg.dev/a-project/images/steps:1"
# Two values with a quote and a bracket, which a text must survive.
ODD = "it's [odd]"


def compiled(pipeline: Any) -> Any:
    """The template of a pipeline, as the compiler writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return yaml.safe_load(path.read_text())


@dsl.container_component
def make(text: str, data: dsl.Output[dsl.Dataset], count: dsl.OutputPath(int)):  # type: ignore[no-untyped-def, valid-type]
    return dsl.ContainerSpec(image=IMAGE, command=["make"], args=[text, data.path, count])


@dsl.container_component
def use(n: int, data: dsl.Input[dsl.Dataset], model: dsl.Output[dsl.Model]):  # type: ignore[no-untyped-def]
    return dsl.ContainerSpec(image=IMAGE, command=["use", "--n"], args=[n, "--data", data.path, "--model", model.uri])


@dsl.container_component
def say(text: str):  # type: ignore[no-untyped-def]
    return dsl.ContainerSpec(image=IMAGE, command=["say"], args=[text])


@dsl.container_component
def choose(best: dsl.OutputPath(str), score: dsl.OutputPath(float)):  # type: ignore[no-untyped-def, valid-type]
    return dsl.ContainerSpec(image=IMAGE, command=["choose"], args=[best, score])


@dsl.container_component
def enumerate_parts(parts: dsl.OutputPath(list)):  # type: ignore[no-untyped-def, valid-type]
    return dsl.ContainerSpec(image=IMAGE, command=["parts"], args=[parts])


@dsl.container_component
def gather(counts: list):  # type: ignore[no-untyped-def, type-arg]
    return dsl.ContainerSpec(image=IMAGE, command=["gather"], args=[counts])


@dsl.container_component
def perhaps(text: Optional[str] = None, number: Optional[int] = None):  # type: ignore[no-untyped-def]  # noqa: UP045
    said = dsl.IfPresentPlaceholder(input_name="text", then=["--text", text], else_=["--none"])
    return dsl.ContainerSpec(image=IMAGE, command=["perhaps"], args=[said])


@dsl.component(base_image=IMAGE)
def told(status: dsl.PipelineTaskFinalStatus, text: str):  # type: ignore[no-untyped-def]
    print(status.state, text)


@dsl.component(base_image=IMAGE)
def measured(data: dsl.Input[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]) -> float:
    metrics.log_metric("accuracy", 0.5)
    return 0.5


def pipeline(function: Callable[..., Any]) -> Any:
    """The template of a function that is a pipeline of its name."""
    return compiled(dsl.pipeline(name=function.__name__.replace("_", "-"))(function))


def linear(seconds: str = "", fail: str = "", **changes: Any) -> Any:
    """make → use, with the parameters `times` and `text`, a default. The stub of `use` may take long or fail."""

    def linear(times: int, text: str = "hello"):  # type: ignore[no-untyped-def]
        first = make(text=text)
        second = use(n=times, data=first.outputs["data"])
        if seconds:
            second.set_env_variable("STUB_SECONDS", seconds)
        if fail:
            second.set_env_variable("STUB_EXIT", fail)
        for name, value in changes.items():
            getattr(second, name)(*value)

    return pipeline(linear)


def branches(best: str, score: str) -> Any:
    """If, Elif and Else, by the outputs of a task, one of which has a value that quotes must not end."""

    def branches(threshold: float = 0.7):  # type: ignore[no-untyped-def]
        chosen = choose().set_env_variable("STUB_OUTPUTS", f'{{"best": "{best}", "score": "{score}"}}')
        with dsl.If(chosen.outputs["best"] == "left", name="is-left"):
            say(text="left")
        with dsl.Elif(chosen.outputs["score"] > threshold, name="is-good"):
            say(text="good")
        with dsl.Else():
            say(text="neither")

    return pipeline(branches)


def loops() -> Any:
    """A loop over a task's output, a loop over constants in a condition, and what they have made, collected."""

    def loops(wanted: bool = True):  # type: ignore[no-untyped-def]
        parts = enumerate_parts().set_env_variable("STUB_OUTPUTS", '{"parts": "[\\"a\\", \\"b\\", \\"c\\"]"}')
        with dsl.ParallelFor(parts.outputs["parts"], parallelism=2) as part:
            made = make(text=part)
        gather(counts=dsl.Collected(made.outputs["count"]))
        with dsl.If(wanted == True), dsl.ParallelFor([1, 2]) as number:  # noqa: E712
            say(text=f"number {number}")

    return pipeline(loops)


def loops_in_loops() -> Any:
    """Loops over a part of an item, over nothing, and over a task that a condition chooses; all of it collected."""

    def loops_in_loops(groups: list = [{"parts": [1, 2]}, {"parts": [3]}], none: list = []):  # type: ignore[no-untyped-def, type-arg]  # noqa: B006
        with dsl.ParallelFor(groups) as group, dsl.ParallelFor(group.parts) as part:
            say(text=f"part {part}")
        with dsl.ParallelFor(none) as item:
            never = make(text=item)
        gather(counts=dsl.Collected(never.outputs["count"])).set_display_name("nothing")
        with dsl.ParallelFor([1, 2, 3]) as number, dsl.If(number > 1):
            some = make(text=f"{number}")
        gather(counts=dsl.Collected(some.outputs["count"]))

    return pipeline(loops_in_loops)


def nested() -> Any:
    """A pipeline in a pipeline that takes an artifact only, an importer, and two tasks of one component."""

    @dsl.pipeline
    def inner(data: dsl.Input[dsl.Dataset]) -> dsl.Model:
        return use(n=1, data=data).outputs["model"]

    def nested(uri: str = "gs://a-bucket/data.csv"):  # type: ignore[no-untyped-def]
        found = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset, metadata={"rows": 3})
        inner(data=found.output)
        first, second = make(text="one"), make(text="two")
        use(n=1, data=first.outputs["data"])
        use(n=2, data=second.outputs["data"])

    return pipeline(nested)


def optional() -> Any:
    def optional(text: Optional[str] = None, number: Optional[int] = None):  # type: ignore[no-untyped-def]  # noqa: UP045
        perhaps(text=text, number=number)

    return pipeline(optional)


def chosen_artifact() -> Any:
    """dsl.OneOf of artifacts."""

    def chosen_artifact(left: bool = True):  # type: ignore[no-untyped-def]
        with dsl.If(left == True):  # noqa: E712
            one = make(text="left")
        with dsl.Else():
            other = make(text="right")
        use(n=1, data=dsl.OneOf(one.outputs["data"], other.outputs["data"]))

    return pipeline(chosen_artifact)


def workspace() -> Any:
    """A task that uses a workspace, which KFP has on Kubernetes."""
    spec = linear()
    spec["deploymentSpec"]["executors"]["exec-make"]["container"]["args"].append(dsl.WORKSPACE_PATH_PLACEHOLDER)
    return spec


def limited_by_a_task() -> Any:
    """A task whose limit is the output of another one, on which it depends by nothing else."""

    def limited_by_a_task():  # type: ignore[no-untyped-def]
        limit = choose().set_env_variable("STUB_OUTPUTS", '{"best": "8"}')
        say(text="limited").set_cpu_limit(limit.outputs["best"])

    return pipeline(limited_by_a_task)


def exit_handled(fail: str) -> Any:
    def exit_handled():  # type: ignore[no-untyped-def]
        with dsl.ExitHandler(told(text="over")):
            make(text="x").set_env_variable("STUB_EXIT", fail)

    return pipeline(exit_handled)


def lightweight() -> Any:
    def lightweight():  # type: ignore[no-untyped-def]
        measured(data=make(text="x").outputs["data"])

    return pipeline(lightweight)


def unwritten() -> Any:
    """A task whose stub leaves an output unwritten."""

    def unwritten():  # type: ignore[no-untyped-def]
        choose().set_env_variable("STUB_OUTPUTS", '{"score": null}')

    return pipeline(unwritten)


def independent() -> Any:
    """a-first, which fails; after-first, which needs it; and z-last, which does not."""

    def independent():  # type: ignore[no-untyped-def]
        first = make(text="x").set_display_name("first").set_env_variable("STUB_EXIT", "1")
        say(text="after").after(first)
        enumerate_parts()

    spec = pipeline(independent)
    tasks = spec["root"]["dag"]["tasks"]
    names = {"make": "a-first", "say": "after-first", "enumerate-parts": "z-last"}
    spec["root"]["dag"]["tasks"] = {names[name]: task for name, task in tasks.items()}
    spec["root"]["dag"]["tasks"]["after-first"]["dependentTasks"] = ["a-first"]
    return spec


COUNT = """
import pathlib, sys
source, copy, lines = map(pathlib.Path, sys.argv[1:])
text = source.read_text()
if not text:
    sys.exit("no lines")
copy.parent.mkdir(parents=True, exist_ok=True)
copy.write_text(text.upper())
lines.write_text(str(len(text.splitlines())))
"""
REPORT = """
import pathlib, sys, time
lines, copy, go = sys.argv[1:]
print("waiting", flush=True)
while not pathlib.Path(go).exists():
    time.sleep(0.1)
print(lines, "lines:", *pathlib.Path(copy).read_text().split(), flush=True)
"""


def real(image: str, source: str, folder: str) -> Any:
    """Programs of the standard library: count, report, and a loop of greetings where there is more than one line."""

    @dsl.container_component
    def count(source: dsl.Input[dsl.Dataset], copy: dsl.Output[dsl.Dataset], lines: dsl.OutputPath(int), text: str):  # type: ignore[no-untyped-def, valid-type]
        return dsl.ContainerSpec(image=image, command=["python", "-c", COUNT], args=[source.path, copy.path, lines])

    @dsl.container_component
    def report(lines: int, copy: dsl.Input[dsl.Dataset]):  # type: ignore[no-untyped-def]
        args = [lines, copy.path, f"{folder}/go"]
        return dsl.ContainerSpec(image=image, command=["python", "-c", REPORT], args=args)

    @dsl.container_component
    def greet(name: str):  # type: ignore[no-untyped-def]
        return dsl.ContainerSpec(image=image, command=["python", "-c", "import sys; print(sys.argv)"], args=[name])

    def real(text: str = "hello"):  # type: ignore[no-untyped-def]
        found = dsl.importer(artifact_uri=source, artifact_class=dsl.Dataset)
        counted = count(source=found.output, text=text).set_cpu_limit("1")
        report(lines=counted.outputs["lines"], copy=counted.outputs["copy"])
        with dsl.If(counted.outputs["lines"] > 1), dsl.ParallelFor(["a", "b"]) as name:
            greet(name=name)

    return pipeline(real)


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(600)
"""


def patient(image: str) -> Any:
    """One task that ends when it is told to."""

    @dsl.container_component
    def patient():  # type: ignore[no-untyped-def]
        return dsl.ContainerSpec(image=image, command=["python", "-c", PATIENT])

    return compiled(patient)
