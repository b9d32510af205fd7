"""Shared by all tests: a clean environment, the machine's parts, sample pictures, the checkpoint, and a server."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import httpx
import hypothesis
import images
import machine
import pytest
from browser import launched
from helpers import ROOT, free_port
from playwright.sync_api import Browser
from xdist.scheduler import LoadScopeScheduling

from headcount.data import fetch, find_weights
from sandbox.artifact_registry.registry import RegistryServer
from sandbox.testing import RunningSandbox

# One for a run, whatever processes it takes (pytest-xdist).
RUN = os.environ["HEADCOUNT_TEST_RUN"] if "PYTEST_XDIST_WORKER" in os.environ else uuid.uuid4().hex[:12]
# The user's environment changes no result. HEADCOUNT_HOME and HEADCOUNT_MIRROR only say where files are.
_KEPT = {"HEADCOUNT_REQUIRE", "HEADCOUNT_HOME", "HEADCOUNT_MIRROR"}
_DROPPED = ("HEADCOUNT_", "AIP_", "GOOGLE_", "GCLOUD_", "CLOUDSDK_", "GCP_", "PULUMI_", "STORAGE_EMULATOR_HOST",
            "JAVA_HOME", "JAVA_TOOL_OPTIONS", "OMP_", "CLOUD_ML_",
            "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")  # fmt: skip
for _name in list(os.environ):
    if _name.upper().startswith(_DROPPED) and _name not in _KEPT:
        del os.environ[_name]
os.environ |= {
    "OMP_NUM_THREADS": "1",  # two threads of arithmetic that wait for each other on a busy machine are slower by far
    "HEADCOUNT_ACCELERATOR": "cpu",  # the expectations are a CPU's, also on a machine with a GPU
    "CLOUDSDK_CONFIG": os.devnull,  # no credentials of the user
    "HEADCOUNT_TEST_RUN": RUN,  # in the environment of all that a test starts: see pytest_sessionfinish
}
# Groups of tests, see GroupScheduling. Those that mostly wait come after those that compute.
LONGEST = ("image", "server", "test_training_runs", "test_infra_without_engine", "test_network", "test_local_compile",
           "test_sandbox_jobs_docker", "test_sandbox_docker", "test_vertex_jobs", "test_vertex_program",
           "test_sandbox_restarts")  # fmt: skip
GROUPS = dict.fromkeys(("test_container", "test_vertex_docker"), "image") | dict.fromkeys(
    ("test_server", "test_openapi", "test_page", "test_readme", "test_web", "test_client"), "server"
)
# Importing kfp takes seconds, in the tests' process and in that of the sandbox.
GROUPS |= dict.fromkeys(("test_sandbox_pipeline_jobs", "test_sandbox_pipeline_clients"), "pipelines")
# The tests' modules and all that they import live until the end. The garbage collector passes over them, and is not
# started while they are imported, which takes twice as long with it.
gc.disable()
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*parts): parts of the machine, by their names in tests/machine.py")


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Runs the tests of a file in one process, and those of files that share the image or the server, too.

    pytest-xdist's own groups need marks in the ids of tests, which pytest 9.2 does not pass on.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest groups first."""
    items.sort(key=lambda item: _rank(_group(item.nodeid)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _rank(group: str) -> int:
    return LONGEST.index(group) if group in LONGEST else len(LONGEST) + ("::" not in group)


def _group(nodeid: str) -> str:
    file = Path(nodeid.partition("::")[0]).stem
    if file == "test_vertex_kills":  # each of its tests has a sandbox of its own
        return nodeid
    return GROUPS.get(file, file)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        machine.require(*mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which tests did not run, why, and how to get the missing parts."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if not reasons:
        return
    terminalreporter.section("tests that did not run")
    for reason, tests in reasons.most_common():
        part = machine.PARTS.get(reason.partition(":")[0].removeprefix("needs "))
        terminalreporter.line(f"{tests} {reason}" + (f". To run them: {part.remedy}." if part else ""))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run if a process that a test started is still there."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    left = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            pid = int(environment.parent.name)
            if f"HEADCOUNT_TEST_RUN={RUN}".encode() in environment.read_bytes() and pid != os.getpid():
                left.append(f"{pid} {_command(pid)[:100]}")
    if left:
        print("\nprocesses that a test left:", *left, sep="\n", file=sys.stderr)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder people/ with the pictures bus.jpg and zidane.jpg."""
    machine.require("samples")
    folder = tmp_path_factory.mktemp("data")
    (folder / "people").mkdir()
    for name in ("bus.jpg", "zidane.jpg"):
        (folder / "people" / name).write_bytes(fetch(name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def bus(data: Path) -> bytes:
    """A picture with four people, 810×1080."""
    return (data / "people" / "bus.jpg").read_bytes()


@pytest.fixture(scope="session")
def zidane(data: Path) -> bytes:
    """A picture with two people, 1280×720."""
    return (data / "people" / "zidane.jpg").read_bytes()


@pytest.fixture(scope="session")
def coco128() -> Path:
    """A folder with 128 labelled pictures: images/*.jpg, and labels/*.txt where there is anything to label."""
    machine.require("coco128")
    return fetch("coco128")


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[docker.DockerClient]:
    """The Docker engine's API."""
    machine.require("docker")
    client = docker.from_env(version="auto", timeout=120)
    yield client
    client.close()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Docker registry of this run, 127.0.0.1:PORT."""
    machine.require("docker", "registry")
    one = RegistryServer(tmp_path_factory.mktemp("registry"), 0, images.RUN)
    one.start()
    yield one.address
    images.forget_images(one.address)
    one.remove("")


@pytest.fixture(scope="session")
def stub_sandbox() -> Iterator[RunningSandbox]:
    """One sandbox without containers, for all tests that keep to a project of their own."""
    with RunningSandbox("--registry-port", "0") as running:
        yield running
        assert [v for v in running.violations() if v["part"] == "response"] == []


@pytest.fixture
def project() -> str:
    """The id of a Google Cloud project that no other test uses."""
    return f"project-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def tiny_image(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny image in the registry, by digest."""
    machine.require("build")
    folder = tmp_path_factory.mktemp("tiny")
    images.write_tiny_sources(folder)
    name = f"{registry}/tiny:{images.RUN}"
    images.build(folder, name)
    yield images.push(name)
    images.remove_all()


@pytest.fixture(scope="session")
def serving_image(checkpoint: Path) -> Iterator[str]:
    """The serving image, built from this checkout."""
    machine.require("build")
    built = subprocess.run(
        ["make", "image", f"IMAGE={images.RUN}", f"DOCKER={machine.docker_client()}",
         f"BUILD_ARGS=--label {images.LABEL}={images.RUN}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]
    yield images.RUN
    images.docker("rmi", "-f", images.RUN, check=False)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The checkpoint that serves on this machine."""
    return find_weights("yolov5n")


@dataclass
class Server:
    """A launcher with everything it started, on free ports."""

    archive: Path
    environment: dict[str, str] = field(default_factory=dict)
    log: Path = Path(os.devnull)
    process: subprocess.Popen[bytes] | None = None
    program: tuple[str, ...] = ("-m", "serving.launcher")
    arguments: tuple[str, ...] = ()  # instead of --archive

    def start(self) -> Server:
        """Start without waiting for it to be ready."""
        self.port, self.grpc = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.predict = f"{self.url}/predictions/people"
        environment = {
            "HEADCOUNT_WORKERS": "2", "AIP_HTTP_PORT": str(self.port), "HEADCOUNT_GRPC": f"127.0.0.1:{self.grpc}",
            "HEADCOUNT_GRACE_SECONDS": "0",
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, *(self.arguments or ("--archive", str(self.archive)))],
                stdout=log, stderr=subprocess.STDOUT, cwd=self.log.parent,
                env=os.environ | environment | self.environment,
            )  # fmt: skip
        return self

    def wait(self, status: int = 200, seconds: float = 60) -> float:
        """Seconds until /ping answers with the status."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ping", timeout=2).status_code == status:
                    return time.monotonic() - began
            time.sleep(0.05)
        pytest.fail(f"/ping did not answer {status} in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def workers(self) -> list[int]:
        """Process ids of TorchServe's workers."""
        return [pid for pid in self.processes() if "model_service_worker" in _command(pid)]

    def processes(self) -> list[int]:
        """Process ids of everything below the launcher."""
        assert self.process is not None
        parents: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(stat.parent.name))
        found, todo = [], [self.process.pid]
        while todo:
            children = parents.get(todo.pop(), [])
            found += children
            todo += children
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


@pytest.fixture(scope="module")  # no longer, because it occupies the thread's event loop
def chromium() -> Iterator[Browser]:
    machine.require("chromium")
    yield from launched()


@pytest.fixture(scope="session")
def archive(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model archive, without compiled networks."""
    from serving.archive import make_archive

    folder = tmp_path_factory.mktemp("archive") / "people"
    make_archive(checkpoint, folder)
    return folder


@contextlib.contextmanager
def running(archive: Path, log: Path, **environment: str) -> Iterator[Server]:
    """A server of one test's own."""
    server = Server(archive, environment, log).start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share; none of them may leave it broken."""
    with running(archive, tmp_path_factory.mktemp("server") / "log") as one:
        yield one
