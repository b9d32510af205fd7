"""The stacks of `make deploy`: each trains a workload as a job in the sandbox, and serves the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from headcount import stacks
from headcount.stacks import LOCAL, StackError
from laptop import sandbox

STACKS: Final = {stack.removeprefix(f"{LOCAL}-"): stack for stack in stacks.TRAINED}  # by workload


def write_stack(workload: str, options: Sequence[str]) -> str:
    """Writes the file of a workload's stack, and returns the stack's name.

    The file is that of stack `local` with a job and a release of its model. Releases of an earlier run stay.
    """
    stack = STACKS[workload]
    file, local = (_folder() / f"Pulumi.{name}.yaml" for name in (stack, LOCAL))
    yaml = YAML()
    yaml.width = 200
    document: dict[str, Any] = yaml.load(file if file.exists() else local)
    config = document["config"]
    if not file.exists():
        config.pop("headcount:releases", None)
        config.insert(
            0, "headcount:releases", {"main": {"image": "build", "model": f"training/{workload}", "traffic": 100}}
        )
        config.insert(0, "headcount:training", {})
    config["headcount:training"] = {workload: {"workload": workload, "args": list(options)}}
    yaml.dump(document, file)
    return stack


def predict(stack: str, workload: str) -> str:
    """Returns a command that asks the endpoint for predictions, and what it prints. Raises StackError.

    The instances are the examples of the trained model's contract.
    """
    uri = str(stacks.outputs(stack)["trained"][workload])
    bucket, _, folder = uri.removeprefix("gs://").partition("/")
    name = urllib.parse.quote(f"{folder}/contract.json", safe="")
    address = f"http://127.0.0.1:{sandbox.port()}/storage/v1/b/{bucket}/o/{name}?alt=media"
    with urllib.request.urlopen(address, timeout=30) as answer:
        examples = json.load(answer)["examples"]
    file = _instances() / f"{workload}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(example['instance'])}\n" for example in examples))
    words = ["predict", "--stack", stack, "--json-instances", str(file.relative_to(_folder()))]
    done = subprocess.run(
        [sys.executable, "-m", "headcount.cli", *words], cwd=_folder(), capture_output=True, text=True
    )
    if done.returncode:
        raise StackError(done.stderr.strip())
    return f"\nheadcount {' '.join(words)}\n{done.stdout.rstrip()}"


def remove_files() -> None:
    """Removes the files that this module wrote."""
    shutil.rmtree(_instances(), ignore_errors=True)
    for stack in STACKS.values():
        (_folder() / f"Pulumi.{stack}.yaml").unlink(missing_ok=True)


def _folder() -> Path:
    return stacks.project_folder()


def _instances() -> Path:
    return stacks.home() / "instances"
