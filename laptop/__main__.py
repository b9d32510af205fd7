"""`make up`, `make deploy` and `make down`: the whole program on this machine, from nothing and back to nothing.

    python -m laptop up [PICTURE]
    python -m laptop deploy census|digits [OPTION …]
    python -m laptop down

All first look at the existing resources, so they may be repeated, interrupted and killed.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headcount import stacks
from headcount.counters import CountError
from headcount.endpoint import Endpoint, of_stack
from headcount.recovery import recover
from headcount.stacks import LOCAL, BusyError, StackError
from laptop import docker, sandbox, workloads
from serving.contract import Parameters


def up(picture: Path | None) -> None:
    """Deploys stack `local`, and counts the people in a picture. Raises StackError."""
    _deploy(LOCAL)
    if picture:
        print(f"\n{_count(picture)}")


def deploy(workload: str, options: Sequence[str]) -> None:
    """Trains a workload as a job, serves the model, and predicts with it, on a stack of its own. Raises StackError."""
    stack = workloads.write_stack(workload, options)
    _deploy(stack)
    print(workloads.predict(stack, workload))


def _deploy(stack: str) -> None:
    docker.check()
    _install_pulumi()
    docker.prepare_builder()
    sandbox.start()
    if stack not in stacks.local_stacks():
        stacks.state_folder().mkdir(parents=True, exist_ok=True)
        stacks.pulumi(stack, "stack", "init")
    _recover(stack)
    if stacks.run(stack, "up", "--yes", "--skip-preview"):
        raise StackError("`pulumi up` failed; its output is above. Repair the cause and repeat the command.")


def down() -> None:
    """Destroys the stacks on the sandbox, stops it, and removes their files. Raises StackError."""
    if stacks.installed() and stacks.state_folder().is_dir() and (there := stacks.local_stacks()):
        sandbox.start()
        force = []
        if any(_recover(stack) or stacks.run(stack, "destroy", "--yes", "--skip-preview") for stack in there):
            # A killed `up` may have deployed resources that the state does not know. All of them are in the sandbox.
            print("The sandbox is emptied, with everything that a killed or failed run left in it.", flush=True)
            sandbox.stop()
            sandbox.start("--fresh")
            docker.forget_images(sandbox.registry_port())
            force = ["--force"]
        for stack in there:
            stacks.pulumi(stack, "stack", "rm", "--yes", "--preserve-config", *force)
    sandbox.stop()
    docker.remove_builder()
    for path in (sandbox.state_folder(), stacks.state_folder(), stacks.home() / "context"):
        shutil.rmtree(path, ignore_errors=True)
    workloads.remove_files()
    if left := [*sandbox.left(), *docker.left(sandbox.registry_port())]:
        raise StackError("\n  ".join(["Something is left. To remove it:", *left]))
    print("Nothing of stack local is left: no container, volume, process or port.")


def _recover(stack: str) -> bool:
    """Repairs the stack after a killed run, and returns whether that was needed. Waits for a Pulumi that still runs."""
    told = False
    while True:
        try:
            lines = recover(stack)
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
            return bool(lines)
        except BusyError as error:
            if not told:
                print(error, flush=True)
            told = True
            time.sleep(1)


def _install_pulumi() -> None:
    if stacks.installed():
        return
    from pulumi.automation import PulumiCommand

    print("Installing Pulumi's command line", flush=True)
    try:
        PulumiCommand.install(root=str(stacks.cli_folder()))
    except Exception:  # Pulumi's installer raises exceptions of many kinds, and the remedy is the same for all
        raise StackError(f"{stacks.INSTALL} (Its installer could not be fetched.)") from None


def _count(picture: Path) -> str:
    try:
        endpoint = Endpoint(of_stack(LOCAL))
        answer = endpoint.count(picture.read_bytes(), Parameters())
        endpoint.close()
    except CountError as error:
        raise StackError(f"{picture.name} was not counted: {error}") from None
    return f"{'1 person' if answer.count == 1 else f'{answer.count} people'} in {picture.name}"


@contextmanager
def _alone() -> Iterator[None]:
    """Lets one of these commands run at a time in this checkout."""
    stacks.home().mkdir(exist_ok=True)
    with (stacks.home() / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(
                "Another `make up`, `make deploy` or `make down` is running in this checkout. Wait for it."
            ) from None
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m laptop", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="deploy").add_argument("picture", nargs="?", type=Path, help="counted at the end")
    train = verbs.add_parser("deploy", help="train a model as a job, and deploy it")
    train.add_argument("workload", choices=workloads.STACKS)
    train.add_argument("options", nargs=argparse.REMAINDER, help="options of the workload, such as --train-steps 1000")
    verbs.add_parser("down", help="destroy")
    args = parser.parse_args(arguments)
    try:
        with _alone():
            if args.verb == "up":
                up(args.picture)
            elif args.verb == "deploy":
                deploy(args.workload, args.options)
            else:
                down()
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Repeat the command, and it continues from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
