"""A deployment in two steps: a plan that people approve, and its application if nothing has changed since.

Pulumi checks its plan step by step while it updates, and the plan holds no value that a preview cannot know. So the
whole change is previewed again before the first step, and compared with what was approved.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from headcount import stacks
from headcount.stacks import StackError

REVIEW: Final = "review.md"  # what people read
PLAN: Final = "plan.json"  # Pulumi's plan of the same preview
POLICIES: Final = Path("infra/policy")
POLICIES_MADE: Final = Path(".tools/policy/.made")
NO_CHANGE: Final = 0  # exit status of `headcount review`
ERROR: Final = 1
CIPHERTEXT: Final = "ciphertext"


def policies() -> Path:
    """The folder of the policies. Raises StackError where their environment is missing."""
    root = stacks.project_folder()
    if not (root / POLICIES_MADE).is_file():
        raise StackError("The policies have no environment yet. Make it and repeat: make policy")
    return root / POLICIES


def make(stack: str, folder: Path) -> int:
    """Previews a stack once, and writes the review and Pulumi's plan into a folder.

    Returns the exit status of `headcount review`: 0 nothing changes, 2 something, 3 something dangerous. Raises
    StackError where there is no preview.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--save-plan={folder / PLAN}", f"--policy-pack={policies()}"]
    done = subprocess.run(
        [sys.executable, "-m", "headcount.cli", "review", stack, *options], capture_output=True, text=True
    )
    if done.returncode == ERROR:
        raise StackError(done.stderr.strip() or done.stdout.strip())
    (folder / REVIEW).write_text(done.stdout)
    return done.returncode


def deploy(stack: str, approved: Path | None) -> int:
    """Deploys a stack, with its policies, and returns Pulumi's exit status.

    approved: the folder of an approved plan, without which the present change is deployed. Raises StackError where the
    change is another one now.
    """
    how = ["up", "--yes", f"--policy-pack={policies()}"]
    if approved is None:
        return stacks.run(stack, *how)
    if not (approved / PLAN).is_file():
        raise StackError(
            f"There is no {approved / PLAN}, so nothing was approved: `headcount plan {stack} {approved}` writes it, "
            "unless a mandatory policy is violated."
        )
    with tempfile.TemporaryDirectory() as folder:
        status = make(stack, Path(folder))
        if found := list(differences(approved, Path(folder))):
            raise StackError(
                "\n".join(
                    [
                        f"Stack {stack} was not touched: its change is another one than the approved one, because the "
                        "stack, its file or the cloud has changed since. Plan it again, and have that approved:",
                        f"    headcount plan {stack} {approved}",
                        *found,
                    ]
                )
            )
    if status == NO_CHANGE:
        print(f"Nothing changes in stack {stack}.")
        return 0
    return stacks.run(stack, *how, "--skip-preview", f"--plan={(approved / PLAN).resolve()}")


def differences(approved: Path, now: Path) -> Iterator[str]:
    """The lines in which two folders of a plan differ: their reviews, then the resources of Pulumi's plans."""
    before, after = ((folder / REVIEW).read_text().splitlines() for folder in (approved, now))
    yield from difflib.unified_diff(before, after, "approved", "now", n=1, lineterm="")
    plans = [json.loads(file.read_text()) if (file := folder / PLAN).is_file() else {} for folder in (approved, now)]
    old, new = map(comparable, plans)
    for name in sorted(set(old) | set(new)):
        if old.get(name) != new.get(name):
            yield f"{name.rpartition('$')[2]}: approved to {_steps(old, name)}, now to {_steps(new, name)}"


def _steps(plan: dict[str, Any], name: str) -> str:
    return " and ".join(plan[name]["steps"]) if name in plan else "be left alone"


def comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """The parts of Pulumi's plan that are the same for the same change, by resource.

    Left out are the time, random seeds, and outputs, which Pulumi calls advisory. An encrypted value differs each time
    that it is encrypted, and lists of dependencies have no order.
    """
    config = {"config": {"steps": ["read"], "goal": _without_secrets(plan.get("config", {}))}}
    resources = {
        urn: {"steps": resource.get("steps", []), "goal": _without_secrets(resource.get("goal", {}))}
        for urn, resource in plan.get("resourcePlans", {}).items()
    }
    return config | resources


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            name: "[secret]" if name in (CIPHERTEXT, "secure") else _without_secrets(item, name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        items = [_without_secrets(item) for item in value]
        return sorted(items) if all(isinstance(item, str) and item.startswith("urn:") for item in items) else items
    return value
