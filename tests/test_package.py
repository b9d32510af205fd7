"""The package as it is built and installed elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from helpers import ROOT

from infra.image import SERVING, TRAINING, Target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "sources" / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "sources"),
    ]
    subprocess.run(build, check=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    (made,) = folder.glob("headcount-*.whl")
    return made


def test_the_wheel_has_the_packages_their_data_and_their_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if not name.partition("/")[0].endswith(".dist-info")} == {
        "headcount", "infra", "laptop", "pulumi_vertex", "review", "sandbox", "serving", "training",
    }  # fmt: skip
    for needed in ("headcount/py.typed", "pulumi_vertex/py.typed", "pulumi_vertex/plugin/PulumiPlugin.yaml",
                   "serving/config/log4j2.xml", "serving/page.html", "training/digits_tuning.yaml",
                   "review/prices.csv"):  # fmt: skip
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_image_s_context_has_every_module_of_serving_and_none_of_others() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    context = {name for name in exclude_paths(str(ROOT), patterns) if (ROOT / name).is_file()}
    modules = {name for name in context if name.endswith(".py")}
    assert modules == {"headcount/data.py"} | {
        name for name in listed if name.startswith(("serving/", "training/")) and name.endswith(".py")
    }


@pytest.mark.parametrize("target", [SERVING, TRAINING], ids=["serving", "training"])
def test_infra_gives_each_image_the_files_that_its_stages_copy(target: Target) -> None:
    """An image has a context and a hash of its own files, so that it stays when those of the other one change."""
    stages = re.findall(
        r"^FROM \S+(?: AS (\S+))?\n(.*?)(?=^FROM |\Z)", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL
    )
    own = {TRAINING: ("training-packages", "training"), SERVING: ("packages", "model", "")}
    others = {name for one, names in own.items() if one != target for name in names}
    copied = {
        name.partition("*")[0] if "*" in name or (ROOT / name).is_file() else f"{name}/"
        for stage, lines in stages
        if stage not in others
        for sources in re.findall(r"^COPY (?!--)((?:[^\\\n]|\\\n)+) \S+$", lines, re.MULTILINE)
        for name in sources.replace("\\\n", " ").split()
    }
    assert len(copied) > 4
    assert not [name for name in copied if not name.startswith((*target.files, ".headcount/weights/"))]
    assert not [one for one in target.files if not one.startswith((*copied, "Dockerfile", ".dockerignore"))]


def test_the_stage_that_compiles_the_network_has_the_modules_that_it_imports(tmp_path: Path) -> None:
    """It has no others, so that a change of those leaves the compiled network in the builder's cache."""
    copied = re.search(r"^COPY (serving/__init__\.py(?:[^\n]|\\\n)*?) /opt/headcount/serving/$",
                       (ROOT / "Dockerfile").read_text(), re.MULTILINE)  # fmt: skip
    assert copied
    (tmp_path / "serving").mkdir()
    for name in copied[1].replace("\\\n", " ").split():
        shutil.copy(ROOT / name, tmp_path / "serving")
    program = (
        "import sys, serving.compile\n"
        "for name, module in sys.modules.items():\n"
        "    if name.startswith('serving'): print(module.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
    # The checkout, which is installed here, has the others.
    assert {Path(file).parent for file in imported.stdout.split()} == {tmp_path / "serving"}


@pytest.mark.slow
def test_the_training_image_has_the_modules_that_it_imports(tmp_path: Path) -> None:
    stage = (ROOT / "Dockerfile").read_text().partition(" AS training\n")[2].partition("\nFROM ")[0]
    for sources, target in re.findall(r"^COPY (?!--)(.+) /opt/headcount/(\S+)$", stage, re.MULTILINE):
        (tmp_path / target).mkdir(parents=True, exist_ok=True)
        for source in sources.split():
            for file in ROOT.glob(f"{source}/*.py" if "." not in source else source):
                shutil.copy(file, tmp_path / target)
    program = (
        "import sys, training.census, training.digits, training.search, training.tune, training.experiments\n"
        "import training.gan, training.gan_evaluation\n"
        "for name, module in sys.modules.items():\n"
        "    if name.partition('.')[0] in ('headcount', 'serving', 'training'): print(module.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
    assert len(imported.stdout.split()) > 8
    assert all(Path(file).is_relative_to(tmp_path) for file in imported.stdout.split()), imported.stdout
    assert (tmp_path / "headcount" / "data.py").exists()


def test_the_installed_command_answers(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(installed),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    program = "import headcount; print(headcount.__file__); from headcount.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.splitlines() == [str(installed / "headcount" / "__init__.py"), f"headcount {version}"]
