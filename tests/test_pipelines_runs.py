"""A compiled pipeline runs on this machine: order, failures, the cache, and what a run prints."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import docker
import images
import machine
import pytest
import training_data
from helpers import ROOT, eventually
from kfp import dsl
from tiny_pipelines import Here, Ran, compiled, component, container, shell

from training.files import UsageError
from training.pipelines.execution import Containers, Execution


@container
def write(text: str, out: dsl.Output[dsl.Dataset]) -> dsl.ContainerSpec:
    return shell('mkdir "$2"; echo "$1" > "$2/text"; echo written', text, out.path)


@container
def double(given: dsl.Input[dsl.Dataset], out: dsl.Output[dsl.Dataset]) -> dsl.ContainerSpec:
    return shell('cat "$1/text" "$1/text" > "$2"', given.path, out.path)


@container
def script(line: str, out: dsl.Output[dsl.Artifact]) -> dsl.ContainerSpec:
    """Runs a line of shell, whose $1 is the path of the output."""
    return shell('line=$1; shift; eval "$line"', line, out.path)


@component
def vanish(how: str) -> str:
    import os

    os._exit(0)


@component
def measure(value: float, metrics: dsl.Output[dsl.Metrics]) -> str:
    metrics.log_metric("value", value)
    return f"it is {value}"


@component
def is_large(metrics: dsl.Input[dsl.Metrics]) -> NamedTuple("Found", [("large", bool), ("summary", str)]):  # type: ignore[valid-type]
    return metrics.metadata["value"] > 1, "looked at it"


def chain(text: str = "a") -> None:
    double(given=write(text=text).outputs["out"])


def one_line(line: str) -> None:
    script(line=line)


def outputs(root: Path, step: str) -> list[Path]:
    """Returns what the step wrote as `out`, in the order of the runs."""
    return sorted(root.glob(f"*/{step}/out"))


def test_a_second_run_repeats_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = compiled(chain, tmp_path)
    first = Ran(spec, tmp_path / "root")
    assert first.succeeded
    assert first["write"].startswith("done in ")
    assert outputs(tmp_path / "root", "double")[0].read_text() == "a\na\n"
    again = Ran(spec, tmp_path / "root")
    assert again["write"].startswith("unchanged, taken from the run of 20")
    assert again["double"].startswith("unchanged, taken from the run of 20")
    assert len(outputs(tmp_path / "root", "double")) == 1
    assert Ran(spec, tmp_path / "root", fresh=True)["write"].startswith("done")
    assert capsys.readouterr().out == ""  # what KFP prints is in its log
    assert "Running pipeline" in (tmp_path / "root" / "kfp.log").read_text()
    assert (next((tmp_path / "root").glob("*/write.log"))).read_text() == "written\n"


def test_a_step_runs_again_when_its_input_or_its_image_changes(tmp_path: Path) -> None:
    spec = compiled(chain, tmp_path)
    Ran(spec, tmp_path / "root")
    changed = Ran(spec, tmp_path / "root", text="b")
    assert changed["double"].startswith("done")
    assert outputs(tmp_path / "root", "double")[-1].read_text() == "b\nb\n"
    rebuilt = Here()
    rebuilt.code = "2"
    assert Ran(spec, tmp_path / "root", rebuilt)["write"].startswith("done")


def test_an_input_counts_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    def pipeline(line: str) -> None:
        writing = script(line=line).set_caching_options(False)
        double(given=writing.outputs["out"])

    spec = compiled(pipeline, tmp_path)
    assert Ran(spec, tmp_path / "root", line='mkdir "$1"; echo a > "$1/text"')["double"].startswith("done")
    same = Ran(spec, tmp_path / "root", line='mkdir -p "$1"; echo a > "$1/text"')
    assert same["script"].startswith("done")
    assert same["double"].startswith("unchanged")
    assert Ran(spec, tmp_path / "root", line='mkdir "$1"; echo b > "$1/text"')["double"].startswith("done")


@pytest.mark.parametrize("damage", ["rm -r", "rm -r {}; mkdir", "echo other > {}/text; true"])
def test_outputs_that_somebody_changed_are_not_taken(tmp_path: Path, damage: str) -> None:
    spec = compiled(chain, tmp_path)
    Ran(spec, tmp_path / "root")
    written = outputs(tmp_path / "root", "write")[0]
    subprocess.run(["sh", "-c", f"{damage.replace('{}', str(written))} {written}"], check=True)
    again = Ran(spec, tmp_path / "root")
    assert again["write"].startswith("done")
    assert again["double"].startswith("unchanged")


def test_a_failing_step_is_named_with_the_end_of_its_log_and_a_rerun_goes_on_from_it(tmp_path: Path) -> None:
    def pipeline(line: str) -> None:
        script(line=line).after(write(text="a"))

    spec, repaired = compiled(pipeline, tmp_path), tmp_path / "repaired"
    line = f'echo loading; test -e {repaired} || {{ echo "ValueError: no rows" >&2; exit 3; }}; touch "$1"'
    failed = Ran(spec, tmp_path / "root", line=line)
    assert not failed.succeeded
    assert "it ended with the exit code 3: no rows" in failed["script"]
    assert "  | loading\n  | ValueError: no rows\n" in failed.text
    assert failed.text.endswith("goes on from the failed step.\n")
    repaired.touch()
    again = Ran(spec, tmp_path / "root", line=line)
    assert again.succeeded
    assert again["write"].startswith("unchanged")
    assert again["script"].startswith("done")


def test_the_steps_after_a_failed_one_do_not_run(tmp_path: Path) -> None:
    def pipeline(line: str) -> None:
        double(given=script(line=line).outputs["out"])

    failed = Ran(compiled(pipeline, tmp_path), tmp_path / "root", line="exit 1")
    assert failed["double"] == "not run, because another step failed"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('touch "$1"; kill -9 $$', "it was killed by SIGKILL"),
        ("true", "it ended without its output out"),
        ("exit 1", "it ended with the exit code 1"),
    ],
)
def test_a_step_that_ends_without_success_or_without_output_has_failed(tmp_path: Path, line: str, says: str) -> None:
    failed = Ran(compiled(one_line, tmp_path), tmp_path / "root", line=line)
    assert not failed.succeeded
    assert says in failed["script"]
    assert not list((tmp_path / "root" / ".cache").glob("*"))


def test_a_function_that_vanishes_has_failed(tmp_path: Path) -> None:
    def pipeline() -> None:
        vanish(how="silently")

    failed = Ran(compiled(pipeline, tmp_path), tmp_path / "root")
    assert "it ended without a result" in failed["vanish"]
    assert not list((tmp_path / "root").rglob("*.py"))  # KFP's copy of the function


def test_a_condition_on_an_output_decides_and_figures_are_cached(tmp_path: Path) -> None:
    def pipeline(value: float = 0.5) -> None:
        looked = is_large(metrics=measure(value=value).outputs["metrics"])
        with dsl.If(looked.outputs["large"] == True):  # noqa: E712
            write(text="large")

    spec = compiled(pipeline, tmp_path)
    small = Ran(spec, tmp_path / "root")
    assert small.succeeded
    assert small["write"] == "not run, because its condition is not met"
    assert small["is-large"].endswith(": looked at it")
    again = Ran(spec, tmp_path / "root")
    assert again["measure"].startswith("unchanged")
    assert again["measure"].endswith(": it is 0.5")
    assert Ran(spec, tmp_path / "root", value=2.0)["write"].startswith("done")


def test_a_retry_does_not_take_the_outputs_of_the_attempt_before(tmp_path: Path) -> None:
    def pipeline(line: str) -> None:
        script(line=line).set_retry(1, backoff_duration="0s")

    tried = tmp_path / "tried"
    line = f'test -e {tried} && exit 0; touch {tried} "$1"; exit 1'
    failed = Ran(compiled(pipeline, tmp_path), tmp_path / "root", line=line)
    assert "it ended without its output out" in failed["script"]


def test_steps_of_a_loop_have_folders_of_their_own(tmp_path: Path) -> None:
    def pipeline() -> None:
        with dsl.ParallelFor(["a", "b"]) as text:
            write(text=text)

    ran = Ran(compiled(pipeline, tmp_path), tmp_path / "root")
    assert ran.succeeded
    assert sorted(file.read_text() for file in (tmp_path / "root").rglob("write/out/text")) == ["a\n", "b\n"]


def test_an_interrupted_run_ends_its_steps(tmp_path: Path) -> None:
    compiled(one_line, tmp_path)
    started = tmp_path / "started"
    line = f"line=sleep 600 & echo $! > {started}.new; mv {started}.new {started}; wait"
    command = [sys.executable, "-m", "training.pipelines", "run", "--template", str(tmp_path / "pipeline.yaml")]
    process = subprocess.Popen(
        [*command, "--root", str(tmp_path / "root"), "--param", line], stderr=subprocess.PIPE, text=True
    )
    assert eventually(started.exists)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "stopped; the same command goes on with the step that ran\n"
    assert eventually(lambda: not Path(f"/proc/{started.read_text().strip()}").exists())


def test_containers_need_a_docker_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/absent")
    with pytest.raises(UsageError, match="start Docker, or run without --docker"):
        Containers([tmp_path])


@pytest.mark.slow
def test_the_whole_pipeline_runs_from_its_command(tmp_path: Path) -> None:
    """Real components in real processes: the first model is registered, and a second run repeats nothing."""
    folder = tmp_path / "data"
    folder.mkdir()
    training_data.write_adult(folder / "adult.data", 400, 0)
    training_data.write_adult(folder / "adult.test", 200, 1)
    command = [
        sys.executable, "-m", "training.pipelines", "run", "--root", str(tmp_path / "root"),
        "--param", f"data={folder}", "--param", "train_steps=60",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in first.stdout.splitlines())
    assert sorted(lines) == ["clean", "compare", "download", "evaluate", "infer", "register", "train"]
    assert all(line.startswith("done in") for line in lines.values())
    assert lines["register"].endswith(": version 1 is the default now")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in again.stdout.splitlines())
    assert lines["compare"].endswith("version 1, the default, is this model")
    assert lines["register"] == "not run, because its condition is not met"
    assert {name for name, line in lines.items() if not line.startswith("unchanged")} == {"compare", "register"}


@pytest.fixture(scope="module")
def image(docker_engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    machine.require("build")
    folder, name = tmp_path_factory.mktemp("tiny"), f"pipelines:{images.RUN}"
    images.write_tiny_sources(folder)
    images.build(folder, name)
    yield name
    docker_engine.images.remove(name, force=True)


@pytest.fixture
def in_containers(image: str, tmp_path: Path) -> Iterator[Execution]:
    """An execution in containers of an image whose entry point is another program."""

    class Tiny(Containers):
        def prepare(self, images: Any) -> None:
            super().prepare([image])

        def identity(self, _: str) -> str:
            return super().identity(image)

        def run(self, command: Any, log: Any) -> str:
            return super().run(dataclasses.replace(command, image=image), log)

    (tmp_path / "root").mkdir()
    execution = Tiny([tmp_path / "root"])
    yield execution
    execution.close()


@pytest.mark.slow
def test_steps_run_in_containers_that_replace_the_entry_point(tmp_path: Path, in_containers: Any) -> None:
    spec = compiled(chain, tmp_path)
    ran = Ran(spec, tmp_path / "root", in_containers)
    assert ran.succeeded, ran.text
    assert outputs(tmp_path / "root", "double")[0].read_text() == "a\na\n"
    assert outputs(tmp_path / "root", "double")[0].stat().st_uid == os.getuid()
    assert Ran(spec, tmp_path / "root", in_containers)["double"].startswith("unchanged")


@pytest.mark.slow
def test_a_container_that_vanishes_is_a_failure(
    tmp_path: Path, in_containers: Any, docker_engine: docker.DockerClient
) -> None:
    """KFP's own Docker runner calls this a success."""
    started = tmp_path / "root" / "started"

    def remove() -> None:
        assert eventually(started.exists)
        found = docker_engine.containers.list(filters={"label": "headcount.step=script"})
        (own,) = [one for one in found if one.attrs["Mounts"][0]["Source"] == str(tmp_path / "root")]
        own.remove(force=True)

    thread = threading.Thread(target=remove)
    thread.start()
    line = f'touch "$1" {started}; sleep 600'
    failed = Ran(compiled(one_line, tmp_path), tmp_path / "root", in_containers, line=line)
    thread.join()
    assert not failed.succeeded
    assert "its container vanished" in failed["script"] or "SIGKILL" in failed["script"]
