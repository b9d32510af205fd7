"""Starts the sandbox as a process of its own, for tests."""

import copy
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

LOCATION = "projects/a-project/locations/europe-west4"


class RunningSandbox:
    """`with RunningSandbox() as sandbox:` runs `python -m sandbox` on a free port until the block ends.

    By default with the stub runner, the admin routes and validation, in a state folder that vanishes;
    further options as on the command line: `RunningSandbox("--hold-after-undeploy", "2")`.
    """

    def __init__(self, *options: str, runner: str = "stub", state: Path | None = None) -> None:
        # Also for the temporary files of a process that is killed, which cannot remove them itself.
        self._temporary = tempfile.TemporaryDirectory(prefix="sandbox-")
        self.state = state or Path(self._temporary.name) / "state"
        self.options = ["--runner", runner, "--admin", "--validate", *options]
        self.port = 0
        self.location = LOCATION
        self.process: subprocess.Popen[str] | None = None
        self._http = httpx.Client(trust_env=False, timeout=120)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, the same after a restart."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when requests can be sent. Raises RuntimeError when the process ends instead."""
        command = [sys.executable, "-m", "sandbox", "--port", str(self.port), "--state", str(self.state)]
        environment = {**os.environ, "TMPDIR": self._temporary.name}
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.stdout.close()
            raise RuntimeError(f"the sandbox ended with status {self.process.wait()}")
        self.port = int(line.split("127.0.0.1:")[1].split(",")[0])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the process: SIGTERM stops its containers too, SIGKILL leaves them to the next start."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(90)
        if self.process and self.process.stdout:
            self.process.stdout.close()

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, and removes what this object has made."""
        self.stop()
        self._http.close()
        self._temporary.cleanup()

    # ------------------------------------------------------------------------------------ Google's REST

    def project(self, name: str) -> Self:
        """The same sandbox, asked about another project.

        A test with a project of its own meets no other test's resources, faults or journal.
        """
        other = copy.copy(self)
        other.location = f"projects/{name}/locations/europe-west4"
        return other

    def ask(self, http: str, path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        """(status, JSON body) of a request; a path that does not begin with `v1` is one in `location`."""
        where = path if path.startswith("v1") else f"v1/{self.location}/{path}"
        response = self._http.request(http, f"{self.url}/{where}", json=body, params=query)
        return response.status_code, response.json()

    def ask_api(self, api: str, http: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The same of another API than Vertex AI, such as `logging`, with the path that it has on its own host."""
        response = self._http.request(http, f"{self.url}/{api}/{path}", json=body)
        return response.status_code, response.json()

    def do(self, http: str, path: str, body: Any = None, **query: Any) -> Any:
        """The answer of a request that goes well; of one that starts an operation, that once it is done."""
        status, answer = self.ask(http, path, body, **query)
        assert status == 200, answer
        return self.done(answer) if "/operations/" in answer.get("name", "") else answer

    def done(self, operation: Any) -> Any:
        """The operation when it is done."""
        while not operation.get("done"):
            status, operation = self.ask("POST", f"v1/{operation['name']}:wait", timeout="30s")
            assert status == 200, operation
        return operation

    # ------------------------------------------------------------------------------------ admin routes

    def admin(self, http: str, what: str, order: dict[str, Any] | None = None) -> Any:
        response = self._http.request(http, f"{self.url}/_sandbox/{what}", json=order)
        response.raise_for_status()
        return response.json()

    def fault(self, method: str, kind: str, **details: Any) -> None:
        """Orders a fault; `method` as `endpoints.deployModel`, or * for all. See sandbox/admin.py."""
        full = method if method == "*" else f"aiplatform.projects.locations.{method}"
        if self.location != LOCATION:
            details.setdefault("match", self.location)
        self.admin("POST", "faults", {"method": full, "kind": kind, **details})

    def clear_faults(self) -> None:
        self.admin("DELETE", "faults")

    def advance(self, seconds: float) -> None:
        """Puts the sandbox's clock forward, so that its delays and tokens end."""
        self.admin("POST", "clock", {"seconds": seconds})

    def unused_faults(self) -> list[dict[str, Any]]:
        """The ordered faults that no call has met."""
        return list(self.admin("GET", "faults")["faults"])

    def release(self) -> None:
        """Lets the operations that a `hold` fault keeps running go on."""
        self.admin("POST", "release")

    def requests(self) -> list[dict[str, Any]]:
        mine = "" if self.location == LOCATION else self.location
        return [r for r in self.admin("GET", "requests")["requests"] if r["name"].startswith(mine)]

    def history(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "history")["history"])

    def violations(self) -> list[dict[str, Any]]:
        return list(self.admin("GET", "violations")["violations"])
