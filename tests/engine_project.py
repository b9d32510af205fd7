"""A copy of the checkout, with tiny images and a state of its own, that Pulumi's engine deploys to a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from helpers import ROOT, free_port
from images import SERVER, forget_images, write_tiny_sources
from machine import engine

from sandbox.testing import RunningSandbox


class EngineProject:
    """A copy of the checkout with a tiny image, a state of its own, and a sandbox."""

    def __init__(self, folder: Path, runner: str = "docker") -> None:
        self.folder = folder / "project"
        self.registry_port = free_port()
        delays = ("--api-delay", "2", "--account-delay", "6")
        self.sandbox = RunningSandbox("--registry-port", str(self.registry_port), *delays, runner=runner)
        for name in ("infra", "pulumi_vertex"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Pulumi.yaml", "Pulumi.local.yaml", "Pulumi.dev.yaml", "Pulumi.prod.yaml"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / ".venv").symlink_to(sys.prefix)
        write_tiny_sources(self.folder)
        state = self.folder / ".headcount/pulumi/state"  # where headcount/stacks.py has it
        state.mkdir(parents=True)
        (self.folder / ".headcount/torch-source").write_text("index")  # without asking PyTorch's index
        self.environment = os.environ | {
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), str(Path(engine() or "").parent), os.environ["PATH"]]
            ),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
            "PULUMI_HOME": str(folder / "home"),
            "PULUMI_BACKEND_URL": f"file://{state}",
            "PULUMI_CONFIG_PASSPHRASE": "headcount",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_GCP_SKIP_REGION_VALIDATION": "true",
        }

    def start(self) -> None:
        self.sandbox.start()
        stack = self.folder / "Pulumi.local.yaml"
        self.stack_file = stack.read_text().replace(":8790", f":{self.sandbox.port}")
        stack.write_text(self.stack_file)
        self.pulumi("stack", "init", "local")

    def shell(self, line: str) -> str:
        """What a line of the documents prints, typed as it stands there, with every question answered with yes."""
        environment = self.environment | {"PULUMI_SKIP_CONFIRMATIONS": "true", "NO_COLOR": "1"}
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def pulumi(self, *arguments: str, fails: bool = False) -> str:
        command = ["pulumi", *arguments, "--non-interactive"]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def up(self) -> str:
        return self.pulumi("up", "-s", "local", "--yes", "--skip-preview")

    def python(self, module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def release(self, *arguments: str) -> str:
        return self.python("headcount.cli", "release", "-s", "local", *arguments)

    def outputs(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.pulumi("stack", "output", "-s", "local", "--json"))
        return found

    def handler(self, count: int) -> None:
        """The sources change: the container counts differently."""
        (self.folder / "serving/server.py").write_text(SERVER.replace("COUNT = 4", f"COUNT = {count}"))

    def count(self, url: str) -> int:
        request = urllib.request.Request(f"{url}:rawPredict", data=b"\xff\xd8picture")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(json.load(answer)["count"])

    def containers(self) -> list[str]:
        """The images, as they were named at the start, of the containers of this sandbox."""
        ours = ["--filter", f"label=headcount.sandbox.state={self.state_id()}"]
        ids = subprocess.run(["docker", "ps", "-a", "-q", *ours], capture_output=True, text=True).stdout.split()
        if not ids:
            return []
        inspect = ["docker", "inspect", "--format", "{{.Config.Image}}", *ids]
        return subprocess.run(inspect, capture_output=True, text=True).stdout.split()

    def plugins(self) -> list[str]:
        """Pulumi's plugins that run for this project, where there is /proc."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if process.joinpath("cwd").readlink() == self.folder / "infra":
                    found.append(process.joinpath("comm").read_text().strip())
        return found

    def state_id(self) -> str:
        with sqlite3.connect(f"file:{self.sandbox.state}/state.sqlite?mode=ro", uri=True) as state:
            (body,) = state.execute("SELECT body FROM documents WHERE kind = 'meta' AND name = 'id'").fetchone()
        return str(json.loads(body)["id"])

    def close(self) -> None:
        self.sandbox.close()
        forget_images(f"127.0.0.1:{self.registry_port}")
