"""Compiles the census pipeline, and runs it, or another compiled pipeline, on this machine.

python -m training.pipelines compile --training-image URI --serving-image URI --output FILE
python -m training.pipelines run --param train_steps=500
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.files import UsageError
from training.pipelines import template
from training.pipelines.components import DEFAULT_SERVING_IMAGE, DEFAULT_TRAINING_IMAGE

ROOT = "runs/pipelines"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipelines", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    compile_ = verbs.add_parser("compile", help="write the census pipeline as a template that Vertex AI takes")
    run = verbs.add_parser("run", help="run a pipeline on this machine")
    for verb in (compile_, run):
        verb.add_argument(
            "--training-image", metavar="URI", default=DEFAULT_TRAINING_IMAGE, help="runs the steps (%(default)s)"
        )
        verb.add_argument(
            "--serving-image", metavar="URI", default=DEFAULT_SERVING_IMAGE,
            help="serves the registered model (%(default)s)",
        )  # fmt: skip
    compile_.add_argument(
        "--output", metavar="FILE", type=Path, default=Path(ROOT, "census.yaml"), help="(%(default)s)"
    )
    run.add_argument(
        "--param", metavar="NAME=VALUE", action="append", default=[], help="a parameter of the pipeline; repeatable"
    )
    run.add_argument("--template", metavar="FILE", type=Path, help="a compiled pipeline (the census pipeline)")
    run.add_argument("--root", metavar="DIR", type=Path, default=Path(ROOT), help="for all outputs (%(default)s)")
    run.add_argument("--docker", action="store_true", help="run each step in a container of its image")
    run.add_argument("--fresh", action="store_true", help="repeat steps whose inputs have not changed, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.verb == "compile":
        template.compile_census(arguments.training_image, arguments.serving_image, arguments.output)
        print(arguments.output)
        return 0
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Runs a pipeline. Returns the exit code: 0, or 1 after a failed step. Raises UsageError."""
    from training.pipelines import execution, runner
    from training.pipelines.report import Report

    root = arguments.root.resolve()
    file = arguments.template
    if file is None:
        file = root / "census.yaml"
        template.compile_census(arguments.training_image, arguments.serving_image, file)
    spec = template.load(file)
    values = template.arguments(spec, arguments.param)
    if arguments.template is None:
        values = local_values(values, root)
    how: Any = execution.Processes()
    if arguments.docker:
        folders = [root, *(Path(one) for one in values.values() if isinstance(one, str) and Path(one).is_absolute())]
        how = containers([one for one in folders if one.is_dir()])
    tasks = list(template.tasks(spec))
    report = Report(sys.stdout, max(map(len, tasks)))
    return 0 if runner.run(spec, values, root, how, report, fresh=arguments.fresh) else 1


def local_values(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns the parameters of the census pipeline as a run on this machine needs them.

    Data is read from a copy whose folder is named by its content, because a step's parameters alone decide whether it
    runs again; on Google Cloud, infra/ uploads data so. The registry is a folder unless another one is named.
    """
    from training.pipelines.cache import digest

    changed = dict(values)
    data = values.get("data", "")
    if data and not data.startswith("gs://"):
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise UsageError(f"data={data} is not a folder; give one with adult.data and adult.test")
        copy = root / "data" / digest(folder)[:16]
        if not copy.is_dir():
            partial = copy.with_suffix(f".{os.getpid()}")
            shutil.copytree(folder, partial)
            try:
                partial.rename(copy)
            except OSError:  # another run was faster
                shutil.rmtree(partial)
        changed["data"] = str(copy)
    registry = values.get("registry") or str(root / "registry")
    if not registry.startswith(("projects/", "gs://")):
        folder = Path(registry).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        registry = str(folder)
    return changed | {"registry": registry}


def containers(folders: Sequence[Path]) -> Any:
    """Returns the execution in containers, which see the folders and the mirror of the published data."""
    from training.pipelines.execution import Containers

    mirror = os.environ.get("HEADCOUNT_MIRROR", "")
    read_only = [Path(mirror).resolve()] if mirror and Path(mirror).is_dir() else []
    return Containers(folders, read_only, {"HEADCOUNT_MIRROR": str(read_only[0]) if read_only else mirror})


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except UsageError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the step that ran", file=sys.stderr)
        code = 130
    raise SystemExit(code)
