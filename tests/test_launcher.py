"""The launcher: its surroundings, its messages, its start and its end.

Here a stand-in takes the place of Java and TorchServe; tests/test_server.py has the real ones.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_storage import FakeStorage
from front_harness import Launched, fake_archive, identity

from serving import capacity, logs, supervisor
from serving.contract import PREDICT_ROUTE
from serving.run_folder import RunFolder, sweep

GB = 1_000_000_000


def wait(holds: Callable[[], bool]) -> None:
    """Wait until something holds. The test's time limit ends it otherwise."""
    while not holds():
        time.sleep(0.01)


# Capacity


@pytest.mark.parametrize(
    ("cpus", "memory", "gpus", "spool", "workers"),
    [
        (8, 100 * GB, 0, GB // 2, 8), (1, 100 * GB, 0, GB // 2, 1), (4, 8 * GB, 0, GB // 2, 4),  # c3-highcpu-4
        (16, 16 * GB, 0, GB // 2, 9), (8, 4 * GB, 0, GB // 2, 1), (8, 4 * GB, 0, 1_000_000, 2),
        (8, 100_000_000, 0, GB // 2, 1), (8, 100 * GB, 1, GB // 2, 4), (8, 100 * GB, 2, GB // 2, 8),
        (2, 100 * GB, 8, GB // 2, 2),
    ],
)  # fmt: skip
def test_workers_fit_the_machine(cpus: int, memory: int, gpus: int, spool: int, workers: int) -> None:
    assert capacity.workers_that_fit(cpus, memory, gpus, spool) == workers


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """Writes the cgroup file system and /proc/self/cgroup of a machine with eight CPUs and 64 GB."""
    values = {"SC_PHYS_PAGES": 64 * GB // 4000, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(membership: str, files: dict[str, str]) -> tuple[Path, Path]:
        root, member = tmp_path / "cgroup", tmp_path / "membership"
        root.mkdir()
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text + "\n")
        if membership:
            member.write_text(membership + "\n")
        return root, member

    return write


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("", {}, 8), ("0::/", {"cpu.max": "max 100000"}, 8), ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 1), ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("4:cpu:/docker/x", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)  # fmt: skip
def test_cpus_are_the_container_s(system: Any, membership: str, files: dict[str, str], cpus: int) -> None:
    assert capacity.available_cpus(*system(membership, files)) == cpus


@pytest.mark.parametrize(
    ("membership", "files", "memory"),
    [
        ("", {}, 64 * GB), ("0::/", {"memory.max": "max"}, 64 * GB), ("0::/", {"memory.max": str(4 * GB)}, 4 * GB),
        ("0::/", {"memory.max": str(99 * GB)}, 64 * GB),
        ("0::/a.slice/b", {"a.slice/memory.max": str(5 * GB), "a.slice/b/memory.max": "max"}, 5 * GB),
        ("0::/a.slice/b", {"a.slice/memory.max": str(5 * GB), "a.slice/b/memory.max": str(3 * GB)}, 3 * GB),
        ("0::/../other", {"memory.max": "max", "../other/memory.max": "1"}, 64 * GB),
        ("9:memory:/", {"memory/memory.limit_in_bytes": str(5 * GB)}, 5 * GB),
        ("9:memory:/a", {"memory/a/memory.limit_in_bytes": str(5 * GB)}, 5 * GB),
        ("9:memory:/docker/x", {"memory/memory.limit_in_bytes": str(5 * GB)}, 5 * GB),
        ("9:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 64 * GB),
    ],
)  # fmt: skip
def test_memory_is_the_machine_s_or_the_container_s(
    system: Any, membership: str, files: dict[str, str], memory: int
) -> None:
    assert capacity.available_memory(*system(membership, files)) == memory


def test_a_gpu_can_be_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("HEADCOUNT_ACCELERATOR")
    assert capacity.gpus(tmp_path) == 2
    monkeypatch.setenv("HEADCOUNT_ACCELERATOR", "cpu")
    assert capacity.gpus(tmp_path) == 0


def test_here_it_is_what_the_system_says() -> None:
    assert 1 <= capacity.available_cpus() <= (os.cpu_count() or 1)
    total = int(next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x).split()[1]) * 1024
    assert 0 < capacity.available_memory() <= total


# Run folders


def test_a_worker_lives_as_long_as_its_process(tmp_path: Path) -> None:
    """Not as long as its process id: another process may have got it."""
    folder = RunFolder.create(tmp_path)
    program = (
        "import sys; from pathlib import Path; from serving.run_folder import RunFolder;"
        "RunFolder(Path(sys.argv[1])).register({'precision': 'float32'}); print('on', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"on\n"
        assert list(folder.workers()) == [worker.pid]
        assert folder.workers()[worker.pid] < 3600
        assert folder.worker_facts() == {"precision": "float32"}
        worker.kill()
        worker.wait()
    assert folder.workers() == {}
    (tmp_path / folder.path / "workers" / str(os.getpid())).write_text("{}")
    assert folder.workers() == {}, "this process lives, but it is no worker"


def test_the_folder_of_a_dead_launcher_is_swept_and_nothing_else(tmp_path: Path) -> None:
    living, dead, young = (RunFolder.create(tmp_path) for _ in range(3))
    for folder in (dead, young):
        os.close(folder._lock)
    foreign = tmp_path / "headcount-results"
    linked = tmp_path / "headcount-linked"
    fifo = tmp_path / "headcount-fifo"
    for folder_ in (foreign, fifo, tmp_path / "elsewhere"):
        folder_.mkdir()
    (foreign / "count.csv").touch()
    (tmp_path / "elsewhere" / "lock").touch()
    linked.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(fifo / "lock")
    for lock in tmp_path.glob("*/lock"):
        if lock.parent != young.path:
            os.utime(lock, (0, 0))
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {living.path.name, young.path.name, foreign.name, linked.name, fifo.name, "elsewhere"}
    assert (foreign / "count.csv").exists()
    assert (tmp_path / "elsewhere" / "lock").exists()


def test_the_folder_of_another_user_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path)
    os.close(folder._lock)
    os.utime(folder.path / "lock", (0, 0))
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: 4711)
        sweep(tmp_path)
    assert folder.path.exists()
    sweep(tmp_path)
    assert not folder.path.exists()


# Messages


def record(message: str, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    one = logging.LogRecord("headcount", level, "", 0, message, (), None)
    one.fields = fields
    return one


def test_people_read_short_lines() -> None:
    line = logs.ForPeople().format(record("counted", request_id="7", status=200, count=None))
    assert line.split(" ", 1)[1] == "counted request_id=7 status=200"


@pytest.mark.parametrize("sample", ["bus.jpg", "my pictures/it's a bus.jpg"])
def test_the_line_to_paste_names_the_sample(sample: str) -> None:
    said = logs.welcome("http://127.0.0.1:8080", sample, workers=2, seconds=4.4, precision="bfloat16")
    assert "2 workers, ready after 4.4 s" in said
    (line,) = (line for line in said.splitlines() if "curl" in line)
    assert shlex.split(line) == ["curl", "--data-binary", f"@{sample}", f"http://127.0.0.1:8080{PREDICT_ROUTE}"]


def test_without_a_sample_the_line_fetches_one() -> None:
    said = logs.welcome("http://127.0.0.1:8080", "", workers=2, seconds=4.4)
    fetch, post = next(line for line in said.splitlines() if "curl" in line).split(" | ")
    assert shlex.split(fetch) == ["curl", "-sL", logs.SAMPLE_URL]
    assert shlex.split(post) == ["curl", "--data-binary", "@-", f"http://127.0.0.1:8080{PREDICT_ROUTE}"]


def test_machines_read_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(logs.JsonLines().format(record('bad "day"\n', logging.ERROR, status=500)))
    assert (line["severity"], line["message"], line["status"]) == ("ERROR", 'bad "day"\n', 500)
    assert time.strptime(line["time"].partition(".")[0], "%Y-%m-%dT%H:%M:%S")


# Starting


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers with the stand-in behind them, and ends them after the test."""
    started: list[Launched] = []

    def begin(*arguments: str, **options: str) -> Launched:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Launched(folder, *arguments, **options))
        return started[-1]

    yield begin
    for one in started:
        one.__exit__()
        wait(one.leaves_no_process)


def test_it_counts_and_ends_without_a_trace(start: Callable[..., Launched]) -> None:
    one = start()
    answer = one.post(b"picture")
    assert (answer.status_code, answer.content) == (200, identity(b"picture"))
    assert one.line("counted")["status"] == 200
    assert one.end(signal.SIGTERM) == 0
    assert not any((one.folder / "tmp").iterdir())


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"AIP_HTTP_PORT": "http"}, "AIP_HTTP_PORT is 'http'"),
        ({"AIP_HTTP_PORT": "70000"}, "cannot listen on 127.0.0.1:70000: "),
        ({"AIP_HTTP_PORT": "{taken}"}, "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"HEADCOUNT_GRPC": "127.0.0.1:{taken}"}, "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"HEADCOUNT_GRPC": "7070"}, "'7070' is not HOST:PORT"),
        ({"HEADCOUNT_WORKERS": "two"}, "HEADCOUNT_WORKERS is 'two'"),
        ({"HEADCOUNT_GRACE_SECONDS": "-1"}, "HEADCOUNT_GRACE_SECONDS is '-1'; set it to a whole number of at least 0"),
        ({"HEADCOUNT_MAX_PIXELS": "50MP"}, "HEADCOUNT_MAX_PIXELS is '50MP'"),
        ({"HEADCOUNT_SPOOL_BYTES": "1000"}, "HEADCOUNT_SPOOL_BYTES is 1000, less than one request"),
        ({"HEADCOUNT_LOG_LEVEL": "LOUD"}, "HEADCOUNT_LOG_LEVEL is 'LOUD'; set it to one of DEBUG, INFO"),
        ({"AIP_STORAGE_URI": "/nowhere"}, "/nowhere has no model: there are 0 .pt files"),
        ({"JAVA_HOME": "/nowhere"}, "JAVA_HOME is /nowhere"),
        ({"HEADCOUNT_HOST": "::1::"}, "cannot listen on ::1::"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_server_that_cannot_start_says_why(
    start: Callable[..., Launched], environment: dict[str, str], says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = str(holder.getsockname()[1])
        one = start(**{name: value.replace("{taken}", taken) for name, value in environment.items()})
        assert one.process.wait() == 1
    last = one.lines()[-1]
    assert last["severity"] == "CRITICAL"
    assert says.replace("{taken}", taken) in last["message"]
    assert not any((one.folder / "tmp").iterdir())


def test_an_archive_that_is_none_is_named(start: Callable[..., Launched]) -> None:
    one = start("--archive", "/nowhere")
    assert one.process.wait() == 1
    assert "/nowhere is no model archive" in one.lines()[-1]["message"]


@pytest.mark.needs("curl")
def test_people_are_told_how_to_count(start: Callable[..., Launched], tmp_path: Path) -> None:
    """The text that `make serve` prints; the test types its line."""
    sample = tmp_path / "a picture.jpg"
    sample.write_bytes(b"picture")
    one = start("--console", "--sample", str(sample))
    wait(lambda: "Ctrl-C" in one.log.read_text())
    said = one.log.read_text()
    (line,) = (line for line in said.splitlines() if "curl" in line)
    assert " 1 workers" in said
    shell = subprocess.run(["bash", "-c", line], check=True, capture_output=True)
    assert shell.stdout == identity(b"picture")
    assert one.end(signal.SIGINT) == 0


def test_the_log_level_leaves_out_a_line_a_request(start: Callable[..., Launched]) -> None:
    one = start(HEADCOUNT_LOG_LEVEL="WARNING")
    wait(lambda: one.process.poll() is not None or any((one.folder / "tmp").glob("headcount-*/workers/*")))
    one.end(signal.SIGTERM)
    assert one.lines() == []


@pytest.mark.needs("ipv6")
def test_an_ipv6_address_serves(start: Callable[..., Launched]) -> None:
    one = start(HEADCOUNT_HOST="::1")
    assert one.line("starting")["url"].startswith("http://[::1]:")
    assert one.post(b"six").status_code == 200


def test_settings_reach_the_front(start: Callable[..., Launched], tmp_path: Path) -> None:
    one = start(HEADCOUNT_TIMEOUT="1", HEADCOUNT_MAX_REQUEST_BYTES="1000", HEADCOUNT_SPOOL_BYTES="1500",
                AIP_PREDICT_ROUTE="/v1/count", AIP_HEALTH_ROUTE="/health")  # fmt: skip
    assert one.post(bytes(1000)).content == identity(bytes(1000))
    assert one.get("/health").json() == {"status": "Healthy"}
    assert one.http.post(one.line("ready")["url"] + "/v1/count", content=b"x").content == identity(b"x")
    assert one.post(bytes(1001)).status_code == 413
    assert one.post(f"after {tmp_path / 'never'}".encode()).status_code == 504


def test_the_room_for_bodies_can_be_set(start: Callable[..., Launched], tmp_path: Path) -> None:
    one = start(HEADCOUNT_MAX_REQUEST_BYTES="1000", HEADCOUNT_SPOOL_BYTES="1500", HEADCOUNT_QUEUE="1")
    go = tmp_path / "go"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.post, f"after {go}".encode().ljust(900))
        wait(lambda: one.in_flight() == 1)
        assert "too many pictures" in one.post(bytes(601)).text
        assert "1 requests wait" in one.post(b"1").text
        go.touch()
        assert waiting.result().status_code == 200


def test_a_model_that_cannot_be_fetched_at_once_is_fetched_later(start: Callable[..., Launched]) -> None:
    patch = "from serving import supervisor; supervisor.FETCH_PAUSES = (0.01,) * 1000"
    with FakeStorage({"ours/models/own.pt": b"weights"}, status=503) as storage:
        one = start(AIP_STORAGE_URI="gs://ours/models", STORAGE_EMULATOR_HOST=storage.url, patch=patch)
        assert "gs://ours/" in one.line("the model could not be fetched, trying again")["reason"]
        storage.status = 200
        one.line("ready")
        assert (one.run_folder() / "own.pt").read_bytes() == b"weights"


def test_a_model_that_cannot_be_fetched_ends_the_server(start: Callable[..., Launched]) -> None:
    patch = "from serving import supervisor; supervisor.FETCH_PAUSES = (0, 0, None)"
    for status, attempts in ((503, 3), (403, 1)):
        with FakeStorage(status=status) as storage:
            one = start(AIP_STORAGE_URI="gs://ours/models", STORAGE_EMULATOR_HOST=storage.url, patch=patch)
            assert one.process.wait() == 1
            assert "cannot serve: " in one.lines()[-1]["message"]
            assert len(storage.asked) == attempts


# Ending


def test_sigterm_takes_requests_for_the_grace_and_finishes_the_rest(
    start: Callable[..., Launched], tmp_path: Path
) -> None:
    one = start(HEADCOUNT_GRACE_SECONDS="1", patch="from serving import supervisor; supervisor.DRAIN_SECONDS = 60")
    go = tmp_path / "go"
    waits = f"after {go}".encode()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.post, waits)
        wait(lambda: one.in_flight() == 1)
        one.process.terminate()
        assert one.line("leaving")["open_requests"] == 1
        assert one.get("/ping").json() == {"status": "Draining"}
        assert one.post(b"late").status_code == 200, "requests are taken for the grace"
        one.process.terminate()  # a second one changes nothing
        wait(lambda: "shutting down" in one.post(b"late").text)
        for _ in range(50):  # for longer than an idle server waits
            assert one.post(b"late").status_code == 503
        go.touch()
        assert waiting.result().content == identity(waits), "whoever was taken is answered"
    assert one.process.wait() == 0
    assert not any((one.folder / "tmp").iterdir())


def test_a_request_that_does_not_end_does_not_keep_it(start: Callable[..., Launched], tmp_path: Path) -> None:
    one = start(HEADCOUNT_GRACE_SECONDS="0", patch="from serving import supervisor; supervisor.DRAIN_SECONDS = 0.1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.post, f"after {tmp_path / 'never'}".encode())
        wait(lambda: one.in_flight() == 1)
        assert one.end(signal.SIGTERM) == 0
        assert waiting.result().status_code == 503, "try again"
    assert supervisor.Options.grace + supervisor.DRAIN_SECONDS + supervisor.CLOSE_SECONDS < 10


def test_ctrl_c_has_no_grace_and_the_second_waits_for_nothing(start: Callable[..., Launched], tmp_path: Path) -> None:
    patch = "from serving import supervisor; supervisor.DRAIN_SECONDS = 3600"
    idle = start(HEADCOUNT_GRACE_SECONDS="3600", patch=patch)
    idle.line("ready")
    assert idle.end(signal.SIGINT) == 0
    busy = start(HEADCOUNT_GRACE_SECONDS="3600", patch=patch)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(busy.post, f"after {tmp_path / 'never'}".encode())
        wait(lambda: busy.in_flight() == 1)
        busy.process.send_signal(signal.SIGINT)
        busy.line("leaving")
        wait(lambda: busy.post(b"late").status_code == 503)  # the line comes before the front is told
        assert busy.end(signal.SIGINT) == 0
        assert waiting.result().status_code == 503, "try again"


def test_sigterm_during_the_imports_ends_it(tmp_path: Path) -> None:
    """The kernel ignores a signal without a handler for process 1, and the imports take a while."""
    (tmp_path / "uvicorn.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()\n")
    done = subprocess.run(
        [sys.executable, "-m", "serving.launcher", "--archive", fake_archive(tmp_path / "archive")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        check=False, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_torchserve_that_dies_ends_the_server(start: Callable[..., Launched]) -> None:
    one = start()
    one.line("ready")
    os.kill(one.worker(), signal.SIGKILL)
    assert one.process.wait() == 1
    assert one.lines()[-1]["message"] == "cannot serve: TorchServe ended by itself with status -9"


def test_only_processes_of_its_own_are_killed(tmp_path: Path) -> None:
    """TorchServe is not reaped before its group has been killed, because until then no process can get its id."""
    program = f"""
import asyncio, os, subprocess, sys
from pathlib import Path
from serving.torchserve import TorchServe

async def main():
    command = ["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]
    torchserve = TorchServe(command, Path({str(tmp_path)!r}), dict(os.environ))
    while torchserve.running():
        await asyncio.sleep(0.01)
    pid = torchserve._process.pid
    print(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0])
    print(torchserve.end(), torchserve.end())
    print(Path(f"/proc/{{pid}}").exists())

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Z", "0 0", "False"]
