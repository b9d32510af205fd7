"""The workflows: valid, pinned, with few permissions, and made of verbs that run on a laptop."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.auth import identity_pool
from helpers import ROOT
from typer.main import get_command

from headcount.cli import app

FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
ACTIONS = sorted((FOLDER / "actions").glob("*/action.yml"))
LOADED: dict[str, Any] = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
JOBS = [(name, job, body) for name, loaded in LOADED.items() for job, body in loaded["jobs"].items()]
# Permissions to write, by workflow: the token of a job may do nothing else.
WRITES = {
    "ci": set(),
    "preview": {"id-token", "pull-requests"},
    "deploy": {"id-token"},
    "drift": {"id-token", "issues"},
    "scan": set(),
}
GITLAB = ROOT / ".gitlab-ci.yml"
SCHEMAS = {"vendor.github-workflows": WORKFLOWS, "vendor.github-actions": ACTIONS, "vendor.gitlab-ci": [GITLAB]}


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, _, job in JOBS:
        yield from ((name, step) for step in job["steps"])
    for path in ACTIONS:
        yield from ((path.parent.name, step) for step in yaml.safe_load(path.read_text())["runs"]["steps"])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_are_valid_by_the_platform_s_schema(schema: str) -> None:
    checker = Path(sys.executable).parent / "check-jsonschema"
    command = [str(checker), "--builtin-schema", schema, *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("actionlint")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint", "-no-color", *WORKFLOWS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_actions_are_pinned_by_commit_and_named_by_version(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used or path.name == "action.yml"
    for action in used:
        assert action.startswith("./") or re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_each_action_has_one_version() -> None:
    used = {action for path in (*WORKFLOWS, *ACTIONS) for action in re.findall(r"uses: (.*)", path.read_text())}
    assert len(used) == len({action.partition("@")[0] for action in used})


def test_tokens_may_write_only_what_their_workflow_is_for() -> None:
    assert set(WRITES) == set(LOADED)
    for name, job, body in JOBS:
        permissions = LOADED[name]["permissions"] | body.get("permissions", {})
        assert {what for what, how in permissions.items() if how == "write"} == WRITES[name], job
        assert permissions.get("contents") == "read"
        checkouts = [step for step in body["steps"] if step.get("uses", "").startswith("actions/checkout")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_a_fork_gets_no_credentials() -> None:
    for name, job, body in JOBS:
        if "pull_request" in LOADED[name][True] and "id-token" in WRITES[name]:  # YAML reads the key `on` as true
            assert body["if"] == "github.event.pull_request.head.repo.full_name == github.repository", job
        assert "pull_request_target" not in LOADED[name][True]


def test_jobs_of_one_stack_do_not_run_at_once() -> None:
    for name, job, body in JOBS:
        if "environment" in body and job != "plan":  # which takes no lock and changes nothing
            group = body["concurrency"]["group"]
            assert body.get("strategy", {}).get("matrix", {}).get("stack") or group == f"stack-{body['environment']}"
            assert ("cancel-in-progress" in body["concurrency"]) == (name == "preview"), "an update is not cut off"


def test_prod_waits_for_the_approval_of_the_plan_that_it_applies() -> None:
    jobs = LOADED["deploy"]["jobs"]
    assert (jobs["plan"]["needs"], jobs["prod"]["needs"]) == ("dev", "plan")
    assert (jobs["plan"]["environment"], jobs["prod"]["environment"]) == ("preview-prod", "prod")
    *_, last = jobs["prod"]["steps"]
    assert last["run"] == "headcount deploy prod --plan reviewed"


# What workflows run besides: a server that one step asks, and the files with which steps tell each other something.
SHELL = r"(\[ \$(\?|status) -ne 1 \]|status=|cat reviewed|echo |for _ in|curl |docker buildx create)"


def test_every_step_is_a_verb_that_runs_on_a_laptop() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = 0
    for name, step in steps():
        script = step.get("run", "")
        assert "${{" not in script, f"{name}: an expression in a script runs what its value says"
        for line in script.splitlines():
            words = line.split()
            if words[0] == "headcount":
                assert words[1] in verbs
                run += 1
            elif words[0] == "make":
                assert words[1] in targets
                run += 1
            else:
                assert re.match(SHELL, line), line
    assert run > 8


def test_gitlab_runs_the_same_verbs_in_jobs_of_the_same_environments() -> None:
    jobs = {name: job for name, job in yaml.safe_load(GITLAB.read_text()).items() if "script" in job}
    said = " ".join(line for job in jobs.values() for line in job["script"])
    for verb in ("review", "drift", "deploy dev", "plan prod reviewed", "deploy prod --plan reviewed"):
        assert f"headcount {verb}" in said
    assert jobs["prod"]["rules"][0]["when"] == "manual"
    assert {name: job.get("resource_group") for name, job in jobs.items() if job["environment"] == name} == {
        "dev": "stack-dev",
        "prod": "stack-prod",
    }


def test_gitlab_s_credentials_name_the_job_s_token_and_account(tmp_path: Path) -> None:
    given = {
        "GITLAB_TOKEN_FOR_GOOGLE": "a.b.c",
        "GCP_WORKLOAD_IDENTITY_PROVIDER": "projects/42/locations/global/workloadIdentityPools/p/providers/gitlab",
        "GCP_SERVICE_ACCOUNT": "headcount-previewer@my-project.iam.gserviceaccount.com",
        "TMPDIR": str(tmp_path),
    }
    command = [ROOT / ".gitlab" / "credentials"]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=True)
    credentials = identity_pool.Credentials.from_file(done.stdout.strip())  # type: ignore[no-untyped-call]
    assert credentials.service_account_email == given["GCP_SERVICE_ACCOUNT"]
    assert credentials.retrieve_subject_token(None) == "a.b.c"


def test_workflows_install_the_pulumi_that_the_program_is_written_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pinned,) = {p for p in project["project"]["optional-dependencies"]["provider"] if p.startswith("pulumi==")}
    (installed,) = {s["with"]["pulumi-version"] for _, s in steps() if s.get("uses", "").startswith("pulumi/actions")}
    assert pinned == f"pulumi=={installed}"
    assert f"--version {installed}\n" in GITLAB.read_text()


GH = """#!/bin/bash
echo "$*" | head -n 1 >> "$LOG"
if [ "$2" = list ]; then echo "$OPEN"; fi
"""


@pytest.mark.parametrize(
    ("status", "open_issue", "calls"),
    [
        (0, "", []),
        (0, "7", ["issue close 7 --comment Stack dev is what was merged again."]),
        (2, "", ["issue create --title Drift of stack dev --body-file"]),
        (2, "7", ["issue edit 7 --body-file"]),
        (1, "7", []),
    ],
)
def test_drift_is_one_issue(tmp_path: Path, status: int, open_issue: str, calls: list[str]) -> None:
    for name, text in (("gh", GH), ("headcount", f"#!/bin/bash\necho drifted: $2\nexit {status}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "OPEN": open_issue,
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run([FOLDER / "drift-issue", "dev"], env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if status == 1 else 0), done.stderr
    assert done.stdout == "drifted: dev\n"
    listed, *rest = (tmp_path / "log").read_text().splitlines()
    assert listed.startswith("issue list --state open")
    assert [line.partition(" /")[0] for line in rest] == calls
