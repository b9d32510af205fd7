"""The programs of this repository under Pulumi's engine, in a copy with a state of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from machine import engine

from sandbox.testing import RunningSandbox


class EngineProgram:
    """A copy of `infra` and `pulumi_vertex` whose stacks are on a sandbox, which starts no containers."""

    def __init__(self, folder: Path, sandbox: RunningSandbox) -> None:
        self.folder, self.sandbox = folder / "project", sandbox
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("infra", "pulumi_vertex"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        shutil.copy(ROOT / "Pulumi.yaml", self.folder)
        (self.folder / ".venv").symlink_to(sys.prefix)
        (self.folder / ".tools").symlink_to(ROOT / ".tools")
        self.state = folder / "state"
        self.state.mkdir()
        folders = [Path(sys.executable).parent, Path(engine() or "").parent, os.environ["PATH"]]
        self.environment = os.environ | {
            "PATH": os.pathsep.join(map(str, folders)),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
            "PULUMI_HOME": str(folder / "home"),
            "PULUMI_BACKEND_URL": f"file://{self.state}",
            "PULUMI_CONFIG_PASSPHRASE": "headcount",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_GCP_SKIP_REGION_VALIDATION": "true",
        }

    def pulumi(self, *arguments: str, fails: bool = False, within: str = "") -> str:
        """Returns the output of Pulumi in the project, or in a folder within it."""
        command = ["pulumi", *arguments, "--non-interactive"]
        folder = self.folder / within
        done = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stack_file(self, stack: str, settings: str, within: str = "") -> None:
        """Writes a stack's file, in the project or a folder within it: the sandbox's addresses, and more settings."""
        local = (ROOT / "Pulumi.local.yaml").read_text().replace(":8790", f":{self.sandbox.port}")
        kept = [line for line in local.splitlines() if line.startswith(("config:", "  gcp:", "  vertex:"))]
        (self.folder / within / f"Pulumi.{stack}.yaml").write_text("\n".join([*kept, settings, ""]))
