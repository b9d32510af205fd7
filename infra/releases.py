"""Changes what runs where, by writing the stack's file: canary, promotion, rollback, pause.

    python -m infra.releases -s dev canary next 10    new sources beside what runs, 10 % of the traffic
    python -m infra.releases -s dev promote next      all traffic to it; the old one stays deployed, idle
    python -m infra.releases -s dev promote main      a rollback is the same the other way round
    python -m infra.releases -s dev remove main       undeployed and deleted
    python -m infra.releases -s prod add main --from dev
    python -m infra.releases -s dev pause | resume

Nothing is deployed: the diff is printed, and `pulumi up` does it.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from infra import BUILD
from infra.stacks import ROOT, StackError, outputs

Releases = dict[str, dict[str, Any]]
_YAML: Final = YAML()
_YAML.width = 200
_DEFAULT: Final[Releases] = {"main": {"image": BUILD, "traffic": 100}}


# ----------------------------------------------------------------------------------------- what changes


def canary(releases: Releases, name: str, image: str, percent: int, running: dict[str, str]) -> Releases:
    """`name` gets `percent` of the traffic, the others share the rest as they did.

    A release that is built from the sources is pinned to the digest that runs (`running`, by release): the sources
    are the canary's now. Raises StackError.
    """
    if not 0 <= percent <= 100:
        raise StackError(f"A canary's share is 0 to 100 percent, not {percent}.")
    others = {n: dict(r) for n, r in releases.items() if n != name}
    for other, release in others.items():
        if image == BUILD and release["image"] == BUILD:
            if other not in running:
                raise StackError(f"Nothing runs yet as {other}, so there is nothing to keep: pulumi up first.")
            release["image"] = running[other].partition("@")[2]
    _share(others, 100 - percent)
    return others | {name: {"image": image, "traffic": percent if others else 100}}


def promote(releases: Releases, name: str) -> Releases:
    """All traffic to `name`; the others stay, without any. Raises StackError."""
    _known(releases, name)
    return {n: {**r, "traffic": 100 if n == name else 0} for n, r in releases.items()}


def remove(releases: Releases, name: str) -> Releases:
    """Without `name`. Raises StackError while it has traffic and is not the last."""
    _known(releases, name)
    if releases[name]["traffic"] and len(releases) > 1:
        raise StackError(f"{name} has {releases[name]['traffic']} % of the traffic. Promote another first.")
    return {n: r for n, r in releases.items() if n != name}


def _known(releases: Releases, name: str) -> None:
    if name not in releases:
        raise StackError(f"There is no release {name}; there are: {', '.join(releases) or 'none'}.")


def _share(releases: Releases, total: int) -> None:
    """Scales the traffic to `total`, whole numbers, the largest taking what rounding leaves."""
    before = sum(r["traffic"] for r in releases.values())
    if not releases:
        return
    for release in releases.values():
        release["traffic"] = release["traffic"] * total // before if before else 0
    largest = max(releases.values(), key=lambda r: r["traffic"])
    largest["traffic"] += total - sum(r["traffic"] for r in releases.values())


# ------------------------------------------------------------------------------------- the stack's file


def change(stack: str, edit: Callable[[Releases], Releases | bool]) -> str:
    """Edits `Pulumi.<stack>.yaml`, comments kept; returns the diff. `edit` gives releases, or whether to pause.

    Raises StackError when there is no such file.
    """
    path, before, document = _file(stack)
    config = document.setdefault("config", {})
    after = edit(_releases(document))
    if isinstance(after, bool):
        config.pop("headcount:paused", None)
        if after:
            config["headcount:paused"] = True
    else:
        config["headcount:releases"] = after
    text = StringIO()
    _YAML.dump(document, text)
    path.write_text(text.getvalue())
    lines = difflib.unified_diff(before.splitlines(True), text.getvalue().splitlines(True), path.name, path.name, n=2)
    return "".join(lines) or "nothing to change\n"


def _file(stack: str) -> tuple[Path, str, Any]:
    path = ROOT / f"Pulumi.{stack}.yaml"
    if not path.exists():
        raise StackError(f"There is no {path.name}: `pulumi stack init {stack}` makes a stack.")
    text = path.read_text()
    return path, text, _YAML.load(text) or {}


def _releases(document: Any) -> Releases:
    found = document.get("config", {}).get("headcount:releases")
    return {name: dict(release) for name, release in (_DEFAULT if found is None else found).items()}


def _proved(stack: str) -> str:
    """The digest that gets most of the traffic on `stack`. Raises StackError."""
    releases, running = _releases(_file(stack)[2]), _running(stack)
    deployed = [name for name in releases if name in running]
    if not deployed:
        raise StackError(f"Stack {stack} runs nothing.")
    best = max(deployed, key=lambda name: int(releases[name]["traffic"]))
    return running[best].partition("@")[2]


def _running(stack: str) -> dict[str, str]:
    images: dict[str, str] = outputs(stack).get("images", {})
    return images


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headcount release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-s", "--stack", required=True)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("canary", help="give a new release a share of the traffic")
    one.add_argument("name")
    one.add_argument("percent", type=int)
    one.add_argument("--image", default=BUILD, help="build, or sha256:… (build)")
    one = verbs.add_parser("add", help="a release with another stack's proven digest")
    one.add_argument("name")
    one.add_argument("--from", dest="source", required=True, metavar="STACK")
    one.add_argument("--percent", type=int, default=100)
    for verb, what in (("promote", "all traffic to a release"), ("remove", "take a release away")):
        verbs.add_parser(verb, help=what).add_argument("name")
    verbs.add_parser("pause", help="undeploy everything, keep the model versions")
    verbs.add_parser("resume", help="the opposite")
    args = parser.parse_args(arguments)
    try:
        print(change(args.stack, lambda releases: _edit(args, releases)), end="")
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Deploy it: pulumi up -s {args.stack}", file=sys.stderr)
    return 0


def _edit(args: argparse.Namespace, releases: Releases) -> Releases | bool:
    match args.verb:
        case "canary":
            built = any(r["image"] == BUILD for n, r in releases.items() if n != args.name)
            running = _running(args.stack) if built and args.image == BUILD else {}
            return canary(releases, args.name, args.image, args.percent, running)
        case "add":
            return canary(releases, args.name, _proved(args.source), args.percent, {})
        case "promote":
            return promote(releases, args.name)
        case "remove":
            return remove(releases, args.name)
        case verb:
            return bool(verb == "pause")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
