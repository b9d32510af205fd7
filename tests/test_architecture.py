"""docs/architecture.md agrees with the imports, and files stay short."""

from __future__ import annotations

import graphlib
import re
import subprocess
from collections import defaultdict

import grimp
import pytest
from helpers import ROOT

from headcount import compare, stacks
from headcount.data import FILES
from infra import names, prediction
from infra.settings import Settings
from serving import contract, logs
from serving.front import FrontSettings

PAGE = (ROOT / "docs" / "architecture.md").read_text()
# The third-party packages that a package must not import, with the reason in the page.
FORBIDDEN = {
    "serving": {"pulumi", "pulumi_gcp", "google", "googleapiclient"},
    "pulumi_vertex": {"torch", "pulumi_gcp"},
    "sandbox": {"torch", "pulumi"},
}
LONGEST = 450  # lines
# Python files that may be longer, each with its reason.
LONG_FILES: dict[str, str] = {}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return grimp.build_graph(*drawn(), include_external_packages=True, cache_dir=None)


def drawn() -> dict[str, set[str]]:
    """The packages of the page's table, each with the packages that it imports there."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    return {package: set(re.findall(r"`(\w+)`", imported)) for package, imported in rows}


def tracked(pattern: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return listed.split()


def test_the_table_names_every_package() -> None:
    assert set(drawn()) == {name.split("/")[0] for name in tracked("*.py")} - {"tests", "docs"}


def test_the_table_says_who_imports_whom(graph: grimp.ImportGraph) -> None:
    imported: dict[str, set[str]] = {package: set() for package in drawn()}
    for module in graph.modules - {name for name in graph.modules if graph.is_module_squashed(name)}:
        package = module.partition(".")[0]
        others = {name.partition(".")[0] for name in graph.find_modules_directly_imported_by(module)}
        imported[package] |= others & set(imported) - {package}
    assert imported == drawn()


def test_modules_import_each_other_in_one_direction(graph: grimp.ImportGraph) -> None:
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the modules of a circle


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_no_library_that_they_must_do_without(graph: grimp.ImportGraph, package: str) -> None:
    found = defaultdict(set)
    for module in {package} | graph.find_descendants(package):
        for name in graph.find_modules_directly_imported_by(module) & FORBIDDEN[package]:
            found[name].add(module)
    assert not found


def test_files_are_short() -> None:
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked("*.py")}
    long = {name for name, lines in lengths.items() if lines > LONGEST}
    assert long == set(LONG_FILES), "split the file where a reader would look for its parts, or say why it is long"


def test_the_page_names_files_that_exist() -> None:
    names = set(
        re.findall(r"\b((?:headcount|infra|laptop|pulumi_vertex|review|sandbox|serving|training)/[\w/]+\.py)\b", PAGE)
    )
    assert len(names) > 15
    assert not [name for name in names if not (ROOT / name).is_file()]


def test_facts_that_two_packages_state_are_the_same() -> None:
    assert contract.PREDICT_ROUTE == prediction.PREDICT_ROUTE
    assert FrontSettings.health_route == prediction.HEALTH_ROUTE
    assert FILES["bus.jpg"].home == logs.SAMPLE_URL
    assert stacks.PROJECT == names.PROJECT
    assert Settings.model_fields["machine_type"].default == compare.MACHINE
