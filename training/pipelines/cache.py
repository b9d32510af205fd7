"""The cache of a pipeline's steps on this machine: KFP's own, with keys that see what KFP's do not.

KFP's key has a step's component, its command, which contains the source of a Python component, its image by name, and
its arguments, in which an artifact counts by its path. Here an artifact counts by its content, and an image by its
identity: a rebuilt image, or changed code of this repository, is another one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.local.cache import LocalCache

# What the training image copies of this repository (Dockerfile).
SOURCES = ("training", "serving/exported", "serving/__init__.py", "serving/contract.py", "headcount/data.py")
RUN, CONTENTS = "__run__", "__contents__"  # in an entry, beside the outputs: which run wrote it, and their SHA-256


class ContentCache(LocalCache):  # type: ignore[misc] # kfp has no types
    """KFP's cache of the outputs of steps. An entry counts only while its artifacts are what the step has written."""

    def __init__(
        self, folder: Path, run: str, identity: Callable[[str], str], unchanged: Callable[[str], None], fresh: bool
    ) -> None:
        """run: written into new entries. identity: of an image by its name. unchanged: called with the run of an entry
        that was found. fresh: finds nothing, and writes entries."""
        super().__init__(str(folder))
        self._run, self._identity, self._unchanged, self._fresh = run, identity, unchanged, fresh

    def compute_key(
        self, component_name: str, image: str, full_command: list[str], arguments: dict[str, Any], *rest: Any,
        **more: Any,
    ) -> str:  # fmt: skip
        by_content = {name: _by_content(value) for name, value in arguments.items()}
        key: str = super().compute_key(component_name, self._identity(image), full_command, by_content, *rest, **more)
        return key

    def get(self, key: str) -> dict[str, Any] | None:
        outputs: dict[str, Any] | None = None if self._fresh else super().get(key)
        if outputs is None:
            return None
        run, contents = outputs.pop(RUN, ""), outputs.pop(CONTENTS, None)
        if contents != _contents(outputs):
            return None
        self._unchanged(run)
        return outputs

    def put(self, key: str, outputs: dict[str, Any]) -> None:
        super().put(key, outputs | {RUN: self._run, CONTENTS: _contents(outputs)})


def _contents(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: _by_content(value) for name, value in outputs.items() if _artifacts(value)}


def _artifacts(value: Any) -> bool:
    return isinstance(value, dsl.Artifact) or (isinstance(value, list) and any(map(_artifacts, value)))


def _by_content(value: Any) -> Any:
    """Returns an argument as JSON, with the SHA-256 of each artifact in place of its path."""
    if isinstance(value, list):
        return [_by_content(one) for one in value]
    if not isinstance(value, dsl.Artifact):
        return value
    path = Path(value.path)
    content = digest(path) if path.exists() else value.uri  # a remote artifact is known by its name alone
    return {"type": type(value).schema_title, "metadata": value.metadata, "content": content}


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, or of the names and contents of all files below a folder."""
    if path.is_file():
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    found = hashlib.sha256()
    for file in sorted(_files(path)):
        found.update(f"{file.relative_to(path)}\0{digest(file)}\n".encode())
    return found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def code_identity() -> str:
    """Returns a SHA-256 over this repository's code and the installed packages, which stand for the training image."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for source in SOURCES:
        for file in sorted((root / source).rglob("*.py")) if (root / source).is_dir() else [root / source]:
            found.update(f"{file.relative_to(root)} {digest(file)}\n".encode())
    packages = {f"{one.name} {one.version}" for one in importlib.metadata.distributions()}
    found.update("\n".join(sorted(packages)).encode())
    return found.hexdigest()
