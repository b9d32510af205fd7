"""The buckets of a project as a folder, which a job's containers have as /gcs.

On Vertex AI, Cloud Storage FUSE mounts them:
https://docs.cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system
FUSE needs privileges that a user of Docker lacks, so here the folder is an ordinary one of this machine, and the
sandbox carries changes between it and the objects. A file becomes a generation of its object when it has not changed
for a second, and at the end of each job at the latest; an object becomes a file within about a second. Other
differences: a file that is written with pauses may be stored before it is closed; an empty folder is no object; where
both were changed, the content that the container wrote wins; objects whose names can be no path are missing.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import stat
import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.projects import project_number
from sandbox.storage.contents import content_file, find_bucket, live_object, retire, save
from sandbox.store import JSON, Store

log = logging.getLogger("sandbox")

PERIOD = 1.0  # seconds between two looks at a folder that is in use


@dataclass(frozen=True)
class File:
    """A file as one look saw it."""

    size: int
    modified: int  # ns


@dataclass
class SyncPlan:
    """What makes the files and the objects agree; each name is `BUCKET/NAME`."""

    store: list[str] = field(default_factory=list)  # files whose content becomes a generation
    write: list[str] = field(default_factory=list)  # objects whose content becomes a file
    delete_objects: list[str] = field(default_factory=list)
    delete_files: list[str] = field(default_factory=list)


def plan(
    files: dict[str, File],
    before: dict[str, File],
    objects: dict[str, str],
    known: dict[str, tuple[str, File]],
    *,
    final: bool,
) -> SyncPlan:
    """Compares the files with the live generations of the objects.

    `before` are the files of the last look, `known` the generation and the file that last agreed. A file that differs
    from `before` may still be written, so it waits, unless this look is the final one.
    """
    result = SyncPlan()
    for name in sorted(files.keys() | objects.keys() | known.keys()):
        file, generation = files.get(name), objects.get(name)
        agreed_generation, agreed_file = known.get(name, (None, None))
        if file and file != agreed_file:
            if final or before.get(name) == file:
                result.store.append(name)
        elif generation and generation != agreed_generation:
            result.write.append(name)
        elif not file and agreed_file:
            if generation:
                result.delete_objects.append(name)
        elif file and not generation:
            result.delete_files.append(name)
    return result


def is_file_name(name: str) -> bool:
    """Whether an object can be a file: none of its parts is empty or leads elsewhere."""
    return all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))


def scan(root: Path) -> dict[str, File]:
    """The regular files below a folder. A link, which may lead out of it, is none."""
    found: dict[str, File] = {}
    todo = [""]
    while todo:
        below = todo.pop()
        with contextlib.suppress(OSError), os.scandir(root / below) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
                    continue
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and "/" in name and not entry.name.startswith(TEMPORARY):
                        found[name] = File(status.st_size, status.st_mtime_ns)
    return found


TEMPORARY = ".sandbox-"


class Mounts:
    """The folders of projects whose jobs run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._users: dict[str, int] = {}
        self._seen: dict[str, dict[str, File]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._lifetimes: dict[str, asyncio.Lock] = {}  # held while a folder is filled, and while it is removed

    def folder(self, project: str) -> Path:
        return (self._store.folder / "gcs" / project).resolve()

    async def open(self, project: str) -> Path:
        """The folder, filled with the project's objects. Each call is followed by one of `close`."""
        self._users[project] = self._users.get(project, 0) + 1  # at once, so that no `close` forgets the folder
        try:
            async with self._lifetimes.setdefault(project, asyncio.Lock()):
                await self.sync(project)
                if project not in self._tasks:
                    self._tasks[project] = asyncio.create_task(self._watch(project))
        except BaseException:
            self._users[project] -= 1
            raise
        return self.folder(project)

    async def close(self, project: str) -> None:
        """Stores what the containers wrote. The folder goes with its last user."""
        await self.sync(project, final=True)
        self._users[project] -= 1
        async with self._lifetimes.setdefault(project, asyncio.Lock()):
            if not self._users[project]:
                await self.stop(project)
                await self._forget(project)

    async def stop(self, project: str = "") -> None:
        """Ends the background tasks. The folders stay, and what is in them is stored at the next start."""
        for name in [project] if project else list(self._tasks):
            if task := self._tasks.pop(name, None):
                task.cancel()
                await asyncio.wait([task])

    async def tidy(self, projects: set[str]) -> None:
        """At start: removes the folders of projects without unfinished jobs."""
        root = self._store.folder / "gcs"
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.name not in projects:
                await self.sync(folder.name, final=True)
                await self._forget(folder.name)

    async def _forget(self, project: str) -> None:
        # First the memory of what agreed: with it, a missing folder would look like deleted files.
        with self._store.transaction():
            for name, _ in self._store.list("mounted", f"{project}\n"):
                self._store.delete("mounted", name)
        self._seen.pop(project, None)
        folder = self.folder(project)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        if folder.exists():
            log.warning("%s can not be removed: a container's user owns files in it", folder)

    async def _watch(self, project: str) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.sync(project)
            except Exception as error:
                log.warning("/gcs of %s: %r", project, error)

    # --------------------------------------------------------------------------------------------- one look

    async def sync(self, project: str, *, final: bool = False) -> None:
        async with self._locks.setdefault(project, asyncio.Lock()):
            await self._sync(project, final)

    async def _sync(self, project: str, final: bool) -> None:
        root, number = self.folder(project), project_number(project)
        buckets = [name for name, bucket in self._store.list("bucket") if bucket["projectNumber"] == number]
        # Where the folder of a bucket is missing, nobody has deleted its files one by one.
        if missing := [name for name in buckets if not (root / name).is_dir()]:
            for name in missing:
                self._unlearn(project, name)
                await asyncio.to_thread(_make_bucket, root, name)
        files = await asyncio.to_thread(scan, root)
        files = {name: file for name, file in files.items() if name.partition("/")[0] in buckets}
        objects: dict[str, JSON] = {}
        for bucket in buckets:
            for _, item in self._store.list("object", f"{bucket}/"):
                if "timeDeleted" not in item and is_file_name(item["name"]):
                    objects[f"{bucket}/{item['name']}"] = item
        known = {
            key.partition("\n")[2]: (str(seen["generation"]), File(seen["size"], seen["modified"]))
            for key, seen in self._store.list("mounted", f"{project}\n")
        }
        generations = {name: str(item["generation"]) for name, item in objects.items()}
        todo = plan(files, self._seen.get(project, {}), generations, known, final=final)
        self._seen[project] = files
        for name in todo.store:
            await self._store_file(project, name, files[name], objects.get(name))
        for name in todo.write:
            await self._write_file(project, name, objects[name])
        for name in todo.delete_objects:
            self._delete_object(project, name)
        for name in todo.delete_files:
            await asyncio.to_thread(_delete_file, root, name)
        gone = known.keys() - files.keys() - objects.keys()
        for name in {*gone, *todo.delete_files}:
            self._learn(project, name, "", None)

    def _learn(self, project: str, name: str, generation: str, file: File | None) -> None:
        key = f"{project}\n{name}"
        with self._store.transaction():
            if file:
                seen = {"generation": generation, "size": file.size, "modified": file.modified}
                self._store.put("mounted", key, seen)
            else:
                self._store.delete("mounted", key)

    def _unlearn(self, project: str, bucket: str) -> None:
        with self._store.transaction():
            for key, _ in self._store.list("mounted", f"{project}\n{bucket}/"):
                self._store.delete("mounted", key)

    async def _store_file(self, project: str, name: str, file: File, item: JSON | None) -> None:
        bucket, _, key = name.partition("/")
        try:
            content = await asyncio.to_thread((self.folder(project) / name).read_bytes)
        except OSError:
            return  # it has just gone
        if item and int(item["size"]) == len(content):
            old = await asyncio.to_thread(content_file(self._store, item["file"]).read_bytes)
            if old == content:  # as after a kill between the two steps of writing a file
                self._learn(project, name, item["generation"], file)
                return
        with self._store.transaction():
            made = save(self._store, bucket, key, content)
            self._learn(project, name, made["generation"], file)

    async def _write_file(self, project: str, name: str, item: JSON) -> None:
        source = content_file(self._store, item["file"])
        file = await asyncio.to_thread(_write_file, self.folder(project), name, source)
        if file:
            self._learn(project, name, item["generation"], file)

    def _delete_object(self, project: str, name: str) -> None:
        bucket, _, key = name.partition("/")
        with self._store.transaction():
            if item := live_object(self._store, bucket, key):
                retire(self._store, find_bucket(self._store, bucket), item)
            self._learn(project, name, "", None)


# ------------------------------------------------------------------------------------------- files of this machine


def _inside(root: Path, path: Path) -> bool:
    """Whether a path stays in the folder, also where a container has put a link into it."""
    return Path(os.path.realpath(path.parent)).is_relative_to(root)


def _write_file(root: Path, name: str, source: Path) -> File | None:
    """Copies an object's content to its file, in one step for those who read it. None where that can not be done."""
    path = root / name
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    if not _inside(root, path):
        return None
    try:
        _make_folders(root, path.parent)
        shutil.copyfile(source, temporary)
        temporary.chmod(0o666)
        temporary.replace(path)
        status = path.stat()
    except OSError as error:  # such as a file where another object's name needs a folder
        log.warning("/gcs/%s: %s", name, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return None
    return File(status.st_size, status.st_mtime_ns)


def _delete_file(root: Path, name: str) -> None:
    path = root / name
    with contextlib.suppress(OSError):
        if _inside(root, path):
            path.unlink()
            bucket = root / name.partition("/")[0]
            while (path := path.parent) != bucket:
                path.rmdir()


def _make_folders(root: Path, folder: Path) -> None:
    """Makes a folder below `root`, in which the users of containers may write, whoever they are."""
    for path in reversed([folder, *folder.parents]):
        if path.is_relative_to(root) and not path.is_dir():
            path.mkdir()
            path.chmod(0o777)


def _make_bucket(root: Path, bucket: str) -> None:
    """Makes the folder of a bucket, in which this process may change what a container's user makes there.

    Other users of this machine get no further than the folder of all projects. A container's user is mostly root.
    Where this process is not, an access control list that new files inherit gives it the same rights; on a file system
    without such lists, it keeps what it cannot remove.
    """
    root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    root.mkdir(exist_ok=True)
    _make_folders(root, root / bucket)
    if not hasattr(os, "setxattr") or os.getuid() == 0:
        return
    # Version 2, then tag, permissions and id of the owner, a user, the group, the mask and others: linux/posix_acl.h.
    rwx, nobody = 7, 0xFFFFFFFF
    entries = [(1, nobody), (2, os.getuid()), (4, nobody), (16, nobody), (32, nobody)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, rwx, owner) for tag, owner in entries)
    with contextlib.suppress(OSError):
        os.setxattr(root / bucket, "system.posix_acl_default", value)
