"""Pulumi's engine still says of each recorded change what the record has, and `headcount review` runs on it.

`RECORD_REVIEWS=1 pytest tests/test_engine_review.py` records the changes again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import review_scenarios
from engine_project import EngineProject
from review_scenarios import RECORDS, Recorder

from review import events, prices
from review.summary import CHANGE, NO_CHANGE, Review, review

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "docker", "registry", "build"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    project = EngineProject(tmp_path_factory.mktemp("review"))
    try:
        project.start()
        yield Recorder(project)
    finally:
        project.close()


def shape(found: Review) -> dict[str, Any]:
    """What does not differ between two runs, as digests do."""
    return {
        "headline": found.headline,
        "exit code": found.exit_code,
        "steps": found.traffic.steps,
        "findings": [(finding.rule.name, finding.resource) for finding in found.findings],
        "resources": [(c.operation, c.kind, c.name, [d.path for d in c.differences]) for c in found.resources],
        "errors": len(found.errors),
    }


def test_the_engine_says_what_the_records_have(recorder: Recorder) -> None:
    differs = {}
    for name, log in recorder.scenarios():
        lines = [json.dumps(event) for event in recorder.tidy(log)]
        if os.environ.get("RECORD_REVIEWS"):
            review_scenarios.write(name, lines)
        stack = "prod" if name.startswith("prod-") else "dev"
        recorded = (RECORDS / f"{name}.jsonl").read_text().splitlines()
        now, then = (shape(review(events.read(stack, text), prices.load())) for text in (lines, recorded))
        if now != then:
            differs[name] = (now, then)
    if os.environ.get("RECORD_REVIEWS"):
        (RECORDS / "dev.json").write_text(json.dumps(recorder.past, indent=1) + "\n")
    assert differs == {}


def command(recorder: Recorder, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "headcount.cli", "review", *arguments],
        cwd=recorder.folder,
        env=recorder.project.environment,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_command_reviews_the_rollback_that_is_due(recorder: Recorder, tmp_path: Path) -> None:
    """The scenarios have left dev with `promote main` in its file; main served before."""
    plan = tmp_path / "plan.json"
    done = command(recorder, "dev", "--json", "--save-plan", str(plan))
    assert done.returncode == CHANGE, done.stderr
    found = json.loads(done.stdout)
    assert "moves back to main" in found["headline"]
    assert "unproven-traffic-elsewhere" not in [finding["rule"]["name"] for finding in found["findings"]]
    assert plan.exists()
    recorder.up("dev")
    done = command(recorder, "dev")
    assert (done.returncode, done.stdout.count("\n")) == (NO_CHANGE, 1), done.stdout


def test_a_stack_that_does_not_exist_is_an_error(recorder: Recorder) -> None:
    done = command(recorder, "nowhere")
    assert done.returncode == 1
    assert "There is no stack nowhere" in done.stderr
    assert done.stdout == ""
