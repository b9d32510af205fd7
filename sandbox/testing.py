"""Starts the sandbox as a process of its own, for tests."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx


class RunningSandbox:
    """`with RunningSandbox() as sandbox:` runs `python -m sandbox` on a free port until the block ends.

    By default with the stub runner, the admin routes and validation, in a state folder that vanishes;
    further options as on the command line: `RunningSandbox("--hold-after-undeploy", "2")`.
    """

    def __init__(self, *options: str, runner: str = "stub", state: Path | None = None) -> None:
        self._temporary = None if state else tempfile.TemporaryDirectory(prefix="sandbox-")
        self.state = state or Path(str(self._temporary and self._temporary.name))
        self.options = ["--runner", runner, "--admin", "--validate", *options]
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, the same after a restart."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when requests can be sent. Raises RuntimeError when the process ends instead."""
        command = [sys.executable, "-m", "sandbox", "--port", str(self.port), "--state", str(self.state)]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the sandbox ended with status {self.process.wait()}")
        self.port = int(line.split("127.0.0.1:")[1].split(",")[0])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the process: SIGTERM stops its containers too, SIGKILL leaves them to the next start."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(90)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    # ------------------------------------------------------------------------------------ admin routes

    def admin(self, http: str, what: str, order: dict[str, Any] | None = None) -> Any:
        response = httpx.request(http, f"{self.url}/_sandbox/{what}", json=order, timeout=30)
        response.raise_for_status()
        return response.json()

    def fault(self, method: str, kind: str, **details: Any) -> None:
        """Orders a fault; `method` as `endpoints.deployModel`, or * for all. See sandbox/admin.py."""
        full = method if method == "*" else f"aiplatform.projects.locations.{method}"
        self.admin("POST", "faults", {"method": full, "kind": kind, **details})

    def clear_faults(self) -> None:
        self.admin("DELETE", "faults")

    def requests(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "requests")["requests"])

    def history(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "history")["history"])

    def violations(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "violations")["violations"])
