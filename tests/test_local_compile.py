"""The compiled network of `make serve`: made once in the background, taken at the next start, and never in the way."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from front_harness import Launched
from helpers import ROOT

from serving import local_compile
from serving.contract import Limits, Parameters
from serving.detector import Detector, dtype_name
from serving.local_compile import CompileError, LocalCompile, compile_in_background

# A shell script in the place of the compiler: $1 is the folder that it writes into.
MADE = 'echo {} > "$1/float32.json"; echo library > "$1/float32-any.so"'


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "yolov5n.pt"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Puts a script in the compiler's place; returns a list that gets longer with each call."""
    calls: list[int] = []

    def use(script: str) -> list[int]:
        def command(self: LocalCompile, out: Path) -> list[str]:
            calls.append(1)
            return ["sh", "-c", script, "sh", str(out)]

        monkeypatch.setattr(LocalCompile, "command", command)
        monkeypatch.setattr(local_compile, "missing", lambda: "")
        return calls

    return use


def in_background(weights: Path, out: Path, counted: str = "person") -> None:
    asyncio.run(compile_in_background(weights, out, counted))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_made_once_and_replaces_the_old_one_as_a_whole(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    calls, out = compiler(MADE), tmp_path / "compiled" / "yolov5n"
    out.mkdir(parents=True)
    (out / "bfloat16.json").write_text("of another torch")
    in_background(weights, out)
    assert sorted(file.name for file in out.iterdir()) == ["float32-any.so", "float32.json", "key"]
    assert LocalCompile(weights, out, "person").done()
    said = [record.message for record in caplog.records]
    assert [line.partition(";")[0] for line in said] == [
        "compiling the network for this machine in the background", "compiled the network for this machine",
    ]  # fmt: skip
    in_background(weights, out)
    assert len(calls) == 1
    assert len(caplog.records) == 2
    assert sorted(file.name for file in out.parent.iterdir()) == ["yolov5n", "yolov5n.lock"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"{MADE}; echo cannot find -lm >&2; exit 1", "cannot find -lm"),
        ("echo not compiling for float32: this processor lacks avx2", "this processor lacks avx2"),
        (f"{MADE}; kill -9 $$", "the compiler ended with status -9"),
    ],
)
def test_a_failure_is_said_once_and_not_tried_again_for_the_same_checkpoint(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture,
    script: str, reason: str,
) -> None:  # fmt: skip
    calls, out = compiler(script), tmp_path / "yolov5n"
    for _ in range(2):
        in_background(weights, out)
    assert len(calls) == 1
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert reason in record.fields["reason"]  # type: ignore[attr-defined]
    assert reason in json.loads((tmp_path / "yolov5n.failed").read_text())["reason"]
    assert not out.exists()
    assert not (tmp_path / "yolov5n.scratch").exists()
    weights.write_bytes(b"other weights")
    compiler(MADE)
    in_background(weights, out)
    assert out.exists()
    assert not (tmp_path / "yolov5n.failed").exists()


def test_what_was_there_stays_when_compiling_fails(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]]
) -> None:
    out = tmp_path / "yolov5n"
    compiler(MADE)
    in_background(weights, out)
    weights.write_bytes(b"other weights")
    compiler("exit 1")
    with pytest.raises(CompileError, match="ended with status 1"):
        asyncio.run(LocalCompile(weights, out, "person").run(humble=True))
    assert (out / "float32-any.so").exists()
    assert not LocalCompile(weights, out, "person").done()


def test_the_compiler_is_humble_and_keeps_to_the_folder(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]]
) -> None:
    compiler(
        f'{MADE}; (nice; ulimit -t; cat /proc/self/oom_score_adj; echo "$TMPDIR $TORCHINDUCTOR_CACHE_DIR") > "$1/facts"'
    )
    out = tmp_path / "yolov5n"
    in_background(weights, out)
    scratch = tmp_path / "yolov5n.scratch"
    assert (out / "facts").read_text().split() == [
        "19", str(local_compile.CPU_SECONDS), "1000", str(scratch), str(scratch / "cache"),
    ]  # fmt: skip
    assert not scratch.exists()


def test_cancelling_ends_the_compiler_with_its_children(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]]
) -> None:
    compiler(f'sleep 1000 & echo $! > "{tmp_path}/new" && mv "{tmp_path}/new" "{tmp_path}/pid"; wait')

    async def begin_and_cancel() -> int:
        task = asyncio.create_task(compile_in_background(weights, tmp_path / "yolov5n", "person"))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        child = int((tmp_path / "pid").read_text())
        assert alive(child)
        task.cancel()
        await asyncio.wait([task])
        return child

    child = asyncio.run(begin_and_cancel())
    while alive(child):
        pass
    assert sorted(file.name for file in tmp_path.glob("yolov5n*")) == ["yolov5n.lock", "yolov5n.pt"], "not a failure"


def test_only_one_of_two_servers_compiles(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    calls, out = compiler(MADE), tmp_path / "yolov5n"
    with LocalCompile(weights, out, "person").lock(wait=False):
        in_background(weights, out)
    assert not calls
    assert not caplog.records
    in_background(weights, out)
    assert calls


def test_the_leftovers_of_a_killed_compiler_are_removed(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]]
) -> None:
    left = tmp_path / "yolov5n.scratch" / "made" / "half.so"
    left.parent.mkdir(parents=True)
    left.touch()
    compiler(MADE)
    in_background(weights, tmp_path / "yolov5n")
    assert not left.exists()
    assert not (tmp_path / "yolov5n" / "half.so").exists()


def test_the_key_names_all_that_the_libraries_depend_on(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(counted: str = "person") -> str:
        return LocalCompile(weights, tmp_path / "out", counted).key

    keys = [key(), key("bus")]
    assert key() == keys[0]
    with monkeypatch.context() as other:
        other.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else "")
        keys.append(key())
    with monkeypatch.context() as other:
        other.setattr(local_compile, "_read", lambda _: "model name : Z80\nflags : avx2\nMHz : 4")
        keys.append(key())
        other.setattr(local_compile, "_read", lambda _: "model name : Z80\nflags : avx2\nMHz : 3")
        assert key() == keys[-1], "the clock is no property of the processor"
    with monkeypatch.context() as other:
        other.setattr(local_compile, "SOURCES", ("compile.py",))
        keys.append(key())
    weights.write_bytes(b"other weights")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_without_a_compiler_a_line_says_how_to_get_one(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("CXX", "no-such-compiler")
    in_background(weights, tmp_path / "yolov5n")
    (record,) = caplog.records
    assert "no C++ compiler `no-such-compiler`; install the package g++" in record.message
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "python3-dev" in local_compile.missing()


def test_the_command_line_compiles_now_and_says_if_that_fails(
    weights: Path, tmp_path: Path, compiler: Callable[[str], list[int]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "yolov5n"
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(weights), "--out", str(out), *arguments])
        local_compile.main()
        return capsys.readouterr().out

    compiler("echo it is broken; exit 1")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"cannot be compiled: it is broken .*yolov5n\.failed"):
            run()
    capsys.readouterr()
    assert run("--show") == ""
    calls = compiler(MADE)
    calls.clear()
    run()
    run()
    assert len(calls) == 1
    assert run("--show") == f"{out}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_line_ends_with_its_compiler(weights: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = f'echo $$ > "{tmp_path}/new" && mv "{tmp_path}/new" "{tmp_path}/pid"; exec sleep 1000'
    program = (
        "import signal\nfrom serving import local_compile\nlocal_compile.missing = lambda: ''\n"
        f"local_compile.LocalCompile.command = lambda self, out: ['sh', '-c', {script!r}]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nlocal_compile.main()"
    )
    arguments = ["--checkpoint", str(weights), "--out", str(tmp_path / "yolov5n")]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
    compiler = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait()
    while alive(compiler):
        pass


# The launcher


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Launched]]:
    """Starts a launcher with a script in the compiler's place, as `make serve` starts one."""
    started: list[Launched] = []

    def begin(script: str) -> Launched:
        folder = tmp_path / f"launcher-{len(started)}"
        folder.mkdir()
        patch = (
            "from serving import local_compile\nlocal_compile.missing = lambda: ''\n"
            f"local_compile.LocalCompile.command = lambda self, out: ['sh', '-c', {script!r}, 'sh', str(out)]\n"
            f"from pathlib import Path\nPath('archive/yolov5n.pt').write_bytes(b'weights')\n"
        )
        started.append(Launched(folder, "--compiled", str(tmp_path / "yolov5n"), patch=patch))
        return started[-1]

    yield begin
    for one in started:
        one.__exit__()


def test_the_server_is_ready_first_and_the_next_start_says_nothing(
    serve: Callable[[str], Launched], tmp_path: Path
) -> None:
    one = serve(MADE)
    one.line("compiled the network for this machine; the next start takes it")
    said = [line["message"] for line in one.lines()]
    assert said.index("ready") < said.index(
        "compiling the network for this machine in the background; the next start counts faster"
    )
    assert one.end(signal.SIGINT) == 0
    assert (tmp_path / "yolov5n" / "key").exists()
    one = serve("exit 1")
    one.post(b"picture")
    assert one.end(signal.SIGTERM) == 0
    assert not [line for line in one.lines() if "compil" in line["message"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(serve: Callable[[str], Launched], tmp_path: Path, number: signal.Signals) -> None:
    """SIGKILL ends the launcher and the compiler; its children have work for seconds only."""
    wait = "exec sleep 1000" if number == signal.SIGKILL else "sleep 1000 & wait"
    one = serve(f'echo $$ > "{tmp_path}/new" && mv "{tmp_path}/new" "{tmp_path}/pid"; {wait}')
    while not (tmp_path / "pid").exists():
        assert one.process.poll() is None
    compiler = int((tmp_path / "pid").read_text())
    assert os.getpgid(compiler) == compiler, "Ctrl-C at a terminal reaches the launcher alone"
    assert one.post(b"picture").status_code == 200
    one.end(number)
    while alive(compiler) or not one.leaves_no_process():
        pass
    assert (number == signal.SIGKILL) == (tmp_path / "yolov5n.scratch").exists()


# The verb


def test_make_serve_takes_what_was_compiled_since(tmp_path: Path) -> None:
    for name in ("weights/yolov5n.path", "archive/yolov5n/.made", "compiled/yolov5n/key"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    now = (tmp_path / "archive/yolov5n/.made").stat().st_mtime + 1

    def archive_is_made() -> bool:
        command = ["make", "-n", "serve", f"HOME_FOLDER={tmp_path}", "-o", ".venv/.serve"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert f"--compiled {tmp_path}/compiled/yolov5n" in done.stdout, "the launcher is told where to compile"
        return "serving.archive" in done.stdout

    os.utime(tmp_path / "archive/yolov5n/.made", (now, now))
    assert not archive_is_made()
    os.utime(tmp_path / "compiled/yolov5n/key", (now + 1, now + 1))
    assert archive_is_made()


@pytest.mark.slow
@pytest.mark.needs("compiler")
@pytest.mark.timeout(900)
def test_the_real_compiler_makes_what_the_detector_takes_and_writes_nowhere_else(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled network counts as the eager one does."""
    home, temporary, out = tmp_path / "home", tmp_path / "tmp", tmp_path / "compiled" / "people"
    for folder in (home, temporary):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    local = LocalCompile(checkpoint, out, "person")
    # One library, for which headers are not worth compiling first. The image has those of common shapes, too.
    less = (
        "import torch._inductor.config as config; config.aot_inductor.precompile_headers = False; "
        "config.cpp.vec_isa_ok = True; import serving.compile as c; c.COMMON_SHAPES = (); c.main()"
    )
    whole = LocalCompile.command
    monkeypatch.setattr(LocalCompile, "command", lambda self, to: [sys.executable, "-c", less, *whole(self, to)[3:]])
    asyncio.run(local.run(humble=False))  # on a busy machine the lowest priority gets nothing
    assert local.done()
    assert [file.name for file in out.parent.iterdir()] == ["people"]
    assert not [*home.iterdir(), *temporary.iterdir()]

    eager, compiled = Detector(checkpoint), Detector(checkpoint, compiled=out)
    assert (eager.compiled, compiled.compiled) == (False, True)
    for picture, people in (("bus", 4), ("zidane", 2)):
        box = eager.prepare((data / "people" / f"{picture}.jpg").read_bytes(), Limits())
        counts = [len(one.count([box], [Parameters()])[0].people) for one in (eager, compiled)]
        assert counts == [people, people]
    facts = out / f"{dtype_name(eager.precision)}.json"
    facts.write_text(facts.read_text().replace('"cpu_flags": [', '"cpu_flags": ["a-flag-of-2040",'))
    assert not Detector(checkpoint, compiled=out).compiled, "made for another processor"
