"""A project of Pulumi in a folder of its own, with a program for a model that is not ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
from helpers import ROOT
from vertex_plugin import LOCATION, PARENT, PROJECT

ENDPOINT = f"{PARENT}/endpoints/digits"
# A program for a model that is not Headcount's. The parts that change between runs are in wanted.json.
PROGRAM = """
import json
import pulumi
import pulumi_vertex as vertex

wanted = json.load(open("wanted.json"))
cloud = vertex.Provider("cloud", endpoint=wanted["url"])
here = pulumi.ResourceOptions(provider=cloud)
versions = {
    name: vertex.ModelVersion(name, here, model_id="digits", **inputs)
    for name, inputs in wanted["versions"].items()
}
if wanted.get("secret"):
    vertex.ModelVersion(
        "secret", here, model_id="secret", image=wanted["secret"], env={"KEY":
        pulumi.Output.secret("hunter2")}
    )
if "releases" in wanted:
    options = {"ignore_changes": wanted.get("ignore"), "custom_timeouts": wanted.get("timeouts")}
    rollout = vertex.Rollout(
        "digits",
        pulumi.ResourceOptions(provider=cloud, **options),
        endpoint=wanted["endpoint"],
        models={
            name: vertex.Deployed(
                model=versions[release.pop("version")].id,
                **{"machine_type": "n1-standard-2", "traffic": 100, **release},
            )
            for name, release in wanted["releases"].items()
        },
        drain_seconds=1,
    )
    pulumi.export("deployed", rollout.deployed_models)
    if wanted.get("last"):  # made after everything else
        last = pulumi.ResourceOptions(provider=cloud, depends_on=[rollout])
        vertex.ModelVersion("last", last, model_id="last", image=wanted["last"])
for name, version in versions.items():
    pulumi.export(name, version.name)
"""


class Project:
    """A Pulumi project in a folder of its own, with a state of its own."""

    def __init__(self, folder: Path, url: str, *, plugin_on_path: bool = False) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        plugins = "plugins:\n  providers:\n    - name: vertex\n      path: pulumi_vertex/plugin\n"
        if plugin_on_path:
            plugins = ""
            (folder / "bin/pulumi-resource-vertex").symlink_to(Path(sys.executable).parent / "pulumi-resource-vertex")
        shutil.copytree(ROOT / "pulumi_vertex/plugin", folder / "pulumi_vertex/plugin")
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "state").mkdir()
        (folder / "__main__.py").write_text(PROGRAM)
        (folder / "Pulumi.yaml").write_text(
            f"name: digits\nruntime:\n  name: python\n  options:\n    virtualenv: .venv\n{plugins}"
        )
        self.url = url
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PULUMI_HOME": str(folder / "home"),
            "PULUMI_BACKEND_URL": f"file://{folder / 'state'}",
            "PULUMI_CONFIG_PASSPHRASE": "a passphrase",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
        }
        self.pulumi("stack", "init", "dev")
        self.pulumi("config", "set", "gcp:project", PROJECT)
        self.pulumi("config", "set", "gcp:region", LOCATION)
        self.pulumi("config", "set", "--secret", "gcp:accessToken", "the-token")

    def want(self, versions: dict[str, Any], **more: Any) -> None:
        wanted = {"url": self.url, "endpoint": ENDPOINT, "versions": versions, **more}
        (self.folder / "wanted.json").write_text(json.dumps(wanted))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(machine.engine()), *arguments, "--non-interactive"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def pulumi(self, *arguments: str, fails: bool = False) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        assert bool(process.returncode) == fails, output
        return output

    def up(self, *more: str, fails: bool = False) -> str:
        return self.pulumi("up", "--yes", "--skip-preview", *more, fails=fails)

    def destroy(self, *more: str, fails: bool = False) -> str:
        return self.pulumi("destroy", "--yes", "--skip-preview", *more, fails=fails)

    def states(self, urn: str) -> list[dict[str, Any]]:
        """Pulumi's states of a resource: the current one, and those that wait for deletion."""
        resources = json.loads(self.pulumi("stack", "export"))["deployment"].get("resources", [])
        return [resource for resource in resources if resource["urn"] == urn]

    def counts(self, output: str) -> dict[str, int]:
        """The summary that a run ends with: created, updated, replaced, deleted, unchanged."""
        summary = output.rsplit("Resources:", 1)[-1].split("\n\n")[0]
        return {what: int(number) for number, what in re.findall(r"(\d+) (?:to )?(\w+)", summary)}

    def outputs(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.pulumi("stack", "output", "--json"))
        return value
