"""The releases of a stack: canary, promotion, rollback, pause. Edits a stack's file; `pulumi up` deploys it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final, NamedTuple

from headcount.stacks import StackError, outputs, project_folder

Releases = dict[str, dict[str, Any]]
BUILD: Final = "build"  # the `image` of a release that is built from the sources
_DEFAULT: Final[Releases] = {"main": {"image": BUILD, "traffic": 100}}


# ------------------------------------------------------------------------------------ changes of releases


def canary(
    releases: Releases, name: str, image: str, percent: int, running: dict[str, str], model: str = ""
) -> Releases:
    """Gives `name` `percent` of the traffic; the others share the rest in the same proportions.

    model: the gs:// folder that it serves, instead of the model of its image.

    Pins another release that is built from the sources to its running digest (`running`, by release), because the
    sources are the canary's from now on. Raises StackError.
    """
    if not 0 <= percent <= 100:
        raise StackError(f"A canary's share is 0 to 100 percent, not {percent}.")
    others = {n: dict(r) for n, r in releases.items() if n != name}
    for other, release in others.items():
        if image == BUILD and release["image"] == BUILD:
            if other not in running:
                raise StackError(f"Release {other} was never deployed and has no image to keep: run `pulumi up` first.")
            release["image"] = running[other].partition("@")[2]
    _share(others, 100 - percent)
    source = {"image": image, "model": model} if model else {"image": image}
    return others | {name: {**source, "traffic": percent if others else 100}}


def promote(releases: Releases, name: str) -> Releases:
    """Gives all traffic to `name`; the others stay, without traffic. Raises StackError."""
    _known(releases, name)
    return {n: {**r, "traffic": 100 if n == name else 0} for n, r in releases.items()}


def remove(releases: Releases, name: str) -> Releases:
    """Returns the releases without `name`. Raises StackError while it has traffic and is not the last."""
    _known(releases, name)
    if releases[name]["traffic"] and len(releases) > 1:
        raise StackError(f"{name} has {releases[name]['traffic']} % of the traffic. Promote another first.")
    return {n: r for n, r in releases.items() if n != name}


def _known(releases: Releases, name: str) -> None:
    if name not in releases:
        raise StackError(f"There is no release {name}; there are: {', '.join(releases) or 'none'}.")


def _share(releases: Releases, total: int) -> None:
    """Scales the traffic to `total` in whole numbers; the largest share takes the rounding error."""
    before = sum(r["traffic"] for r in releases.values())
    if not releases:
        return
    for release in releases.values():
        release["traffic"] = release["traffic"] * total // before if before else 0
    largest = max(releases.values(), key=lambda r: r["traffic"])
    largest["traffic"] += total - sum(r["traffic"] for r in releases.values())


def change(stack: str, edit: Callable[[Releases], Releases]) -> str:
    """Changes the releases in `Pulumi.<stack>.yaml` and keeps its comments; returns the diff. Raises StackError."""

    def changed(config: dict[str, Any]) -> None:
        config["headcount:releases"] = edit(read(stack))

    return _rewrite(stack, changed)


def pause(stack: str, paused: bool) -> str:
    """Writes to the stack's file whether everything is undeployed; returns the diff. Raises StackError."""

    def changed(config: dict[str, Any]) -> None:
        config.pop("headcount:paused", None)
        if paused:
            config["headcount:paused"] = True

    return _rewrite(stack, changed)


def read(stack: str) -> Releases:
    """The releases in the stack's file. Raises StackError."""
    found = _loaded(stack).document.get("config", {}).get("headcount:releases")
    return {name: dict(release) for name, release in (_DEFAULT if found is None else found).items()}


def _rewrite(stack: str, edit: Callable[[dict[str, Any]], None]) -> str:
    file = _loaded(stack)
    edit(file.document.setdefault("config", {}))
    after = StringIO()
    _yaml().dump(file.document, after)
    file.path.write_text(after.getvalue())
    name = file.path.name
    lines = difflib.unified_diff(file.text.splitlines(True), after.getvalue().splitlines(True), name, name, n=2)
    return "".join(lines) or "nothing to change\n"


class _StackFile(NamedTuple):
    """A stack's file: its text, and the YAML document that keeps the text's comments."""

    path: Path
    text: str
    document: Any


def stack_file(stack: str) -> Path:
    """The path of the stack's file. Raises StackError."""
    path = project_folder() / f"Pulumi.{stack}.yaml"
    if not path.exists():
        raise StackError(f"There is no {path.name}: `pulumi stack init {stack}` makes a stack.")
    return path


def _loaded(stack: str) -> _StackFile:
    path = stack_file(stack)
    text = path.read_text()
    return _StackFile(path, text, _yaml().load(text) or {})


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 200
    yaml.preserve_quotes = True
    return yaml


def proved(stack: str) -> str:
    """Returns the digest that has most of the traffic of a stack's endpoint. Raises StackError."""
    found = outputs(stack)
    best = max(serving(found), key=lambda one: one.traffic, default=None)
    if not best or not best.traffic:
        raise StackError(f"Stack {stack} serves nothing: `pulumi up -s {stack}` first.")
    return str(found["images"][best.release]).partition("@")[2]


@dataclass(frozen=True)
class Serving:
    """A release on the endpoint. id: of its deployed model. version: ID@NUMBER. traffic: percent."""

    id: str
    release: str
    version: str
    traffic: int


def serving(found: dict[str, Any]) -> list[Serving]:
    """The releases on the endpoint of a stack with these outputs, as Vertex AI describes it. Raises StackError."""
    from headcount.counters import CountError
    from headcount.endpoint import describe

    try:
        endpoint = describe(endpoint_url(found))
    except CountError as error:
        raise StackError(str(error)) from None
    shares = endpoint.get("trafficSplit", {})
    releases = {str(model).partition("/models/")[2]: name for name, model in found["models"].items()}
    deployed = ((one["id"], _version(one)) for one in endpoint.get("deployedModels", []))
    return [
        Serving(id_, releases[version], version, int(shares.get(id_, 0)))
        for id_, version in deployed
        if version in releases
    ]


def _version(deployed: dict[str, Any]) -> str:
    """The model version of a deployed model, as ID@VERSION: Google's answers have the version in either place."""
    model, _, version = str(deployed["model"]).partition("/models/")[2].partition("@")
    return f"{model}@{deployed.get('modelVersionId') or version}"


def endpoint_url(found: dict[str, Any]) -> str:
    """The URL of a stack's endpoint as a resource, which a dedicated endpoint's own host does not have."""
    name, url = str(found["endpoint"]), str(found["url"])
    if url.startswith("http://"):  # the sandbox
        return f"{url.partition('/v1/')[0]}/v1/{name}"
    return f"https://{name.split('/')[3]}-aiplatform.googleapis.com/v1/{name}"
