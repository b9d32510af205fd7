"""Stacks through Pulumi's command line: the project's folder, the messages, and Ctrl-C."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from headcount import stacks
from headcount.stacks import StackError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Pulumi.yaml").write_text("name: headcount\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pulumi_that(project: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Puts a `pulumi` on the PATH that runs a Python program, for any command but `version`."""
    file = project / "bin" / "pulumi"
    file.parent.mkdir()
    file.write_text(
        f"#!{sys.executable}\nimport sys\nif sys.argv[1:] == ['version']:\n    sys.exit(print('v3.260.0'))\n{program}"
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def test_the_project_is_here_or_above_or_the_checkout(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "infra" / "below").mkdir(parents=True)
    monkeypatch.chdir(project / "infra" / "below")
    assert stacks.project_folder() == project
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert stacks.project_folder() == ROOT
    monkeypatch.setattr(stacks, "__file__", str(project / "a" / "b" / "site-packages" / "headcount" / "stacks.py"))
    with pytest.raises(StackError, match=r"no Pulumi\.yaml of the project headcount .*or name an endpoint"):
        stacks.project_folder()


def test_a_stack_that_was_never_deployed_says_how(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match=r"^Stack local is not deployed\. Deploy it: make up$"):
        stacks.outputs("local")
    pulumi_that(project, monkeypatch, "print('{}')")
    with pytest.raises(StackError, match=r"^Stack dev is not deployed\. Deploy it: pulumi up -s dev$"):
        stacks.outputs("dev")


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("sys.exit(\"error: no stack named 'dev' found\")", "^There is no stack dev: `pulumi stack ls` lists"),
        ("sys.exit('error: PULUMI_ACCESS_TOKEN must be set for login')", "run `pulumi login` first"),
        ("sys.exit('error: something else\\nand more')", "^error: something else\nand more$"),
    ],
)
def test_what_pulumi_says_is_passed_on(project: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    pulumi_that(project, monkeypatch, program)
    with pytest.raises(StackError, match=says):
        stacks.outputs("dev")


def test_the_errors_of_a_preview_are_those_that_it_prints_as_json(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the engine prints them: each error of a resource twice, and that the preview failed.
    lines = [
        {"message": "warning: using pulumi-resource-gcp from $PATH\n", "severity": "warning"},
        {"message": "error: Preview failed: refreshing bucket: Error 403\n\n", "severity": "error"},
        {"message": "error: Preview failed: refreshing bucket: Error 403\n\n", "severity": "error"},
        {"message": "error: preview failed\n", "severity": "error"},
    ]
    program = f"import json; print(json.dumps({{'steps': [], 'diagnostics': {lines!r}}})); sys.exit(1)"
    pulumi_that(project, monkeypatch, program)
    with pytest.raises(StackError, match=r"^Preview failed: refreshing bucket: Error 403$"):
        stacks.digest("dev", "refresh", "--preview-only")


def test_a_preview_that_fails_before_it_prints_says_why(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulumi_that(project, monkeypatch, "sys.exit('error: something else')")
    with pytest.raises(StackError, match=r"^error: something else$"):
        stacks.digest("dev", "preview")


def test_the_backend_and_the_steps_come_from_pulumi(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulumi_that(project, monkeypatch, "import json; print(json.dumps({'url': 'gs://b', 'a': sys.argv[1:]}))")
    assert stacks.backend("dev") == "gs://b"
    assert stacks.digest("dev", "preview")["a"] == ["--non-interactive", "preview", "--json", "--stack", "dev"]


def test_pulumi_gets_the_stack_and_local_its_own_state(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, json; print(json.dumps({'a': sys.argv[1:], 's': os.environ.get('PULUMI_BACKEND_URL')}))"
    pulumi_that(project, monkeypatch, program)
    arguments = ["--non-interactive", "stack", "output", "--json", "--stack"]
    assert stacks.outputs("dev") == {"a": [*arguments, "dev"], "s": None}
    stacks.state_folder().mkdir(parents=True)
    assert stacks.outputs("local") == {"a": [*arguments, "local"], "s": f"file://{project}/.headcount/pulumi/state"}


def test_without_pulumi_it_says_how_to_install_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(StackError, match="command line is not installed"):
        stacks.outputs("dev")
    with pytest.raises(StackError, match="command line is not installed"):
        stacks.run("dev", "up")
    assert not stacks.installed()


def test_after_make_serve_a_stack_needs_make_install(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pulumi", "pulumi.automation", "pulumi.automation.errors"):
        monkeypatch.setitem(sys.modules, module, None)  # `make serve` does not install it
    with pytest.raises(StackError, match="run `make install` and repeat"):
        stacks.outputs("dev")


@pytest.mark.parametrize(("ends", "raised"), [(1, True), (0, False)])
def test_ctrl_c_reaches_pulumi_and_is_known_when_it_stopped_something(
    ends: int, raised: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A terminal sends SIGINT to both processes: here Pulumi sends it to its parent, and then gets it too.
    pulumi_that(
        project,
        monkeypatch,
        f"import os, signal, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit({ends}))\n"
        "os.kill(os.getppid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n",
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) if raised else contextlib.nullcontext():
        assert stacks.run("local", "up") == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stack_is_on_the_sandbox_if_pulumi_lists_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """print('[{"name": "local"}, {"name": "local-census"}, {"name": "dev"}, {"name": "locally"}]')"""
    pulumi_that(project, monkeypatch, listed)
    assert stacks.local_stacks() == ["local", "local-census"]
    (project / "bin" / "pulumi").unlink()
    (project / "bin").rmdir()
    pulumi_that(project, monkeypatch, "sys.exit('error: no state yet')")
    assert stacks.local_stacks() == []
    (project / "bin" / "pulumi").unlink()
    monkeypatch.setenv("PATH", str(project / "bin"))
    with pytest.raises(StackError, match=r"^Pulumi's command line is not installed\."):
        stacks.local_stacks()
