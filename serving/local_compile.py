"""The network compiled for this machine: `python -m serving.local_compile --checkpoint FILE --out FOLDER`.

The image has a compiled network from its build stage, `make serve` has none. Its server starts at once without, a
process of the lowest priority compiles the network, and the next start takes it. This happens once for each checkpoint,
torch, processor and version of this code. Nothing is written but these:

    NAME/            the libraries, what they fit, and `key`; replaced as a whole
    NAME.failed      why compiling failed, and the key for which it is not tried again
    NAME.lock        locked by the process that compiles
    NAME.scratch/    the compiler's files
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from serving.logs import log

CPU_SECONDS = 1800  # for each process of the compiler; yolov5n takes 110 in all
LOG_TAIL = 2000  # characters of the compiler's output that are kept after a failure
SOURCES = ("compile.py", "detector.py", "network.py")  # they make the program that is compiled


class CompileError(Exception):
    """The network cannot be compiled; the message says why."""


class LocalCompile:
    """The compiled network of one checkpoint on this machine. out: the folder NAME."""

    def __init__(self, checkpoint: Path, out: Path, counted: str) -> None:
        self.checkpoint, self.out, self.counted = checkpoint.absolute(), out.absolute(), counted
        self.key = _key(checkpoint, counted)

    def beside(self, suffix: str) -> Path:
        return self.out.with_name(self.out.name + suffix)

    def done(self) -> bool:
        return _read(self.out / "key") == self.key

    def failed(self) -> bool:
        return self.key in _read(self.beside(".failed"))

    def command(self, out: Path) -> list[str]:
        """The command that compiles into a folder."""
        return [sys.executable, "-m", "serving.compile", "--here", "--checkpoint", str(self.checkpoint),
                "--out", str(out), "--counted", self.counted]  # fmt: skip

    @contextlib.contextmanager
    def lock(self, wait: bool) -> Iterator[None]:
        """Hold the lock. Raises BlockingIOError where another process holds it, unless wait is set."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.beside(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    async def run(self, humble: bool) -> None:
        """Compile, and replace the folder. Cancelling ends the compiler. Raises CompileError and OSError.

        humble: at the lowest priority, and as the first process that the kernel ends where memory is short.
        """
        scratch = self.beside(".scratch")
        made, output = scratch / "made", scratch / "log"
        shutil.rmtree(scratch, ignore_errors=True)  # of a compiler that was killed
        made.mkdir(parents=True)
        environment = os.environ | {
            "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "cache"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        try:
            with output.open("wb") as file:
                # In a process group of its own, so that it ends with its children, and Ctrl-C at a terminal is left to
                # the launcher. Not in a session of its own, because Linux may give each session an equal share of the
                # CPUs, whatever the priorities are within it: sched(7), autogroup.
                process = subprocess.Popen(
                    self.command(made), env=environment, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, process_group=0, preexec_fn=partial(_prepare, humble),
                )  # fmt: skip
            try:
                while process.poll() is None:
                    await asyncio.sleep(0.1)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.returncode or not any(made.glob("*.json")):
                said = _read(output)[-LOG_TAIL:]
                reason = said.rpartition("\n")[2] or f"the compiler ended with status {process.returncode}"
                self.beside(".failed").write_text(json.dumps({"key": self.key, "reason": reason, "log": said}))
                raise CompileError(reason)
            (made / "key").write_text(self.key)
            if self.out.exists():
                self.out.rename(scratch / "old")
            made.rename(self.out)
            self.beside(".failed").unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


async def compile_in_background(checkpoint: Path, out: Path, counted: str) -> None:
    """Compile unless that was done or has failed before. Says in a line that it begins, and in a line how it ended."""
    try:
        local = LocalCompile(checkpoint, out, counted)
        if local.done() or local.failed():
            return
        if reason := missing():
            log(f"counting without a compiled network, which is slower: {reason}")
            return
        with local.lock(wait=False):
            log("compiling the network for this machine in the background; the next start counts faster")
            began = time.monotonic()
            await local.run(humble=True)
            log(
                "compiled the network for this machine; the next start takes it",
                seconds=round(time.monotonic() - began),
            )
    except BlockingIOError:
        return  # another server of this checkout is compiling
    except (CompileError, OSError) as error:
        log("compiling the network for this machine failed; counting goes on without", logging.WARNING,
            reason=str(error), log=str(out.with_name(out.name + ".failed")))  # fmt: skip


def missing() -> str:
    """The reason why nothing can be compiled here, with a remedy, or ""."""
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler):
        return f"there is no C++ compiler `{compiler}`; install the package g++, and the next start compiles one"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing; install the package python3-dev, and the next start compiles one"
    return ""


def _key(checkpoint: Path, counted: str) -> str:
    """Names everything that the libraries depend on. It does not import torch, because the launcher does not either."""
    files = [checkpoint, *(Path(__file__).with_name(name) for name in SOURCES)]
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    facts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    facts += [counted, importlib.metadata.version("torch"), *processor]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _prepare(humble: bool) -> None:
    """In the child: end with the parent; if humble, take what others leave, and be the first to go without memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    if humble:
        os.nice(19)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counted", default=os.environ.get("HEADCOUNT_CLASS", "person"))
    parser.add_argument("--show", action="store_true", help="compile nothing; print FOLDER if what it contains fits")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the compiler, as Ctrl-C does
    local = LocalCompile(arguments.checkpoint, arguments.out, arguments.counted)
    if arguments.show:
        if local.done():
            print(arguments.out)
        return
    with local.lock(wait=True):
        if local.done():
            return
        if reason := missing():
            raise SystemExit(f"The network cannot be compiled: {reason}.")
        print("compiling the network for this machine", flush=True)
        try:
            asyncio.run(local.run(humble=False))
        except (CompileError, OSError) as error:
            raise SystemExit(
                f"The network cannot be compiled: {error} (the log is in {local.beside('.failed')})"
            ) from None


if __name__ == "__main__":
    main()
