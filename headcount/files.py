"""The pictures that a user names, and the names of their annotated copies."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
)  # of the files that are found in folders; a named file may have any suffix
ANNOTATED = ".counted"  # part of the name of a copy, so that no copy replaces an original


@dataclass(frozen=True)
class Input:
    """A picture to count, or a name without a picture, and the reason."""

    name: str
    error: str = ""


def find_inputs(arguments: Iterable[str], annotated: Path | None = None) -> list[Input]:
    """Returns the pictures of files, folders (with all below them) and glob patterns, each once, in order.

    annotated: the folder of annotated copies; a search does not find those of an earlier run again.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        for item in _expand(argument, annotated):
            found.setdefault(os.path.abspath(item.name), item)  # noqa: PTH100  # Path.resolve would follow links
    return list(found.values())


def _expand(argument: str, annotated: Path | None) -> list[Input]:
    if os.path.isdir(argument):  # noqa: PTH112  # Path would drop a leading "./"
        return _in_folder(argument, annotated) or [Input(argument, f"holds no picture ({', '.join(SUFFIXES)})")]
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [Input(argument)]  # the error comes when it is read
    matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  # keeps the pattern's own spelling
    if not matches:
        return [Input(argument, "matches nothing")]
    return [item for match in matches for item in _expand(match, annotated)]


def _in_folder(folder: str, annotated: Path | None) -> list[Input]:
    found: list[Input] = []

    def unreadable(error: OSError) -> None:
        found.append(Input(str(error.filename), f"cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        copies = annotated is not None and annotated.is_dir() and annotated.samefile(parent)
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            if not (copies and re.search(rf"{re.escape(ANNOTATED)}(-\d+)?\.jpg$", name)):
                found.append(Input(os.path.join(parent, name)))  # noqa: PTH118
    return found


def annotated_paths(names: Sequence[str], folder: Path) -> list[Path]:
    """Returns a path in the folder for the annotated copy of each picture: no path twice, and no original's path.

    Names that differ in case only count as the same: on some file systems they are.
    """
    place = folder.resolve()
    taken = {_key(Path(name).parent.resolve() / Path(name).name) for name in names}
    used: dict[str, int] = {}
    paths = []
    for name in names:
        stem = Path(name).stem + ANNOTATED
        number = used.get(_key(stem), 0)
        while True:
            number += 1
            file_name = f"{stem}.jpg" if number == 1 else f"{stem}-{number}.jpg"
            if _key(place / file_name) not in taken:
                break
        used[_key(stem)] = number
        paths.append(folder / file_name)
    return paths


def _key(path: str | Path) -> str:
    return str(path).casefold()
