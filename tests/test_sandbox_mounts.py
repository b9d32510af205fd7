"""The folder of buckets that a job's containers have as /gcs: what is carried which way."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.projects import project_number
from sandbox.storage.contents import content_file, live_object, retire, save
from sandbox.storage.mounts import File, Mounts, SyncPlan, is_file_name, plan
from sandbox.store import Store

PROJECT = "a-project"
OLD, NEW = File(3, 100), File(4, 200)


@pytest.mark.parametrize(
    ("file", "before", "generation", "known", "final", "expected"),
    [
        (OLD, OLD, "1", ("1", OLD), False, set()),
        (NEW, None, None, None, False, set()),  # it may still be written
        (NEW, NEW, None, None, False, {"store"}),
        (NEW, None, None, None, True, {"store"}),
        (NEW, OLD, "1", ("1", OLD), False, set()),
        (NEW, NEW, "1", ("1", OLD), False, {"store"}),
        (NEW, NEW, "2", ("1", OLD), False, {"store"}),  # changed in both places
        (OLD, OLD, "2", ("1", OLD), False, {"write"}),
        (None, None, "1", None, False, {"write"}),
        (None, OLD, "1", ("1", OLD), False, {"delete_objects"}),
        (None, OLD, "2", ("1", OLD), False, {"write"}),
        (OLD, OLD, None, ("1", OLD), False, {"delete_files"}),
        (None, None, None, ("1", OLD), False, set()),
    ],
)
def test_what_is_to_be_done_follows_from_what_last_agreed(
    file: File | None,
    before: File | None,
    generation: str | None,
    known: tuple[str, File] | None,
    final: bool,
    expected: set[str],
) -> None:
    name = "bucket/a"
    found: SyncPlan = plan(
        {name: file} if file else {},
        {name: before} if before else {},
        {name: generation} if generation else {},
        {name: known} if known else {},
        final=final,
    )
    assert {kind for kind, names in vars(found).items() if names} == expected
    assert all(names in ([], [name]) for names in vars(found).values())


@pytest.mark.parametrize("name", ["a//b", "/a", "a/", "..", "../a", "a/../../b", ".", ""])
def test_names_that_lead_elsewhere_are_no_files(name: str) -> None:
    assert not is_file_name(name)
    assert is_file_name("a/b..c/.d")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state")
    with store.transaction():
        store.put("bucket", "bucket", {"projectNumber": project_number(PROJECT), "storageClass": "STANDARD"})
        store.put("bucket", "other", {"projectNumber": project_number("other-project"), "storageClass": "STANDARD"})
    yield store
    store.close()


def content(store: Store, name: str) -> bytes | None:
    item = live_object(store, "bucket", name)
    return content_file(store, item["file"]).read_bytes() if item else None


def look(mounts: Mounts, times: int = 2) -> None:
    for _ in range(times):  # a change counts when it is seen twice
        asyncio.run(mounts.sync(PROJECT))


def test_files_and_objects_are_carried_both_ways(store: Store) -> None:
    save(store, "bucket", "data/in.txt", b"rows")
    save(store, "other", "secret", b"of another project")
    mounts = Mounts(store)
    look(mounts)
    root = mounts.folder(PROJECT)
    assert [p.relative_to(root).as_posix() for p in root.rglob("*")] == ["bucket", "bucket/data", "bucket/data/in.txt"]
    file = root / "bucket" / "data" / "in.txt"
    assert file.read_bytes() == b"rows"

    (root / "bucket" / "out").mkdir()
    (root / "bucket" / "out" / "model").write_bytes(b"one")
    look(mounts)
    assert content(store, "out/model") == b"one"
    generation = live_object(store, "bucket", "out/model")
    look(mounts)
    assert live_object(store, "bucket", "out/model") == generation  # once

    with (root / "bucket" / "out" / "model").open("ab") as appended:
        appended.write(b" two")
    save(store, "bucket", "data/in.txt", b"more rows")
    look(mounts)
    assert content(store, "out/model") == b"one two"
    assert file.read_bytes() == b"more rows"

    (root / "bucket" / "out" / "model").unlink()
    item = live_object(store, "bucket", "data/in.txt")
    assert item
    with store.transaction():
        retire(store, {}, item)
    look(mounts)
    assert content(store, "out/model") is None
    assert not file.exists()


def test_nothing_is_lost_when_the_sandbox_is_killed_or_the_folder_vanishes(store: Store) -> None:
    save(store, "bucket", "kept", b"kept")
    first = Mounts(store)
    look(first)
    root = first.folder(PROJECT)
    (root / "bucket" / "written").write_bytes(b"meanwhile")
    before = live_object(store, "bucket", "kept")
    second = Mounts(store)  # what a killed sandbox's successor has
    look(second)
    assert content(store, "written") == b"meanwhile"
    assert live_object(store, "bucket", "kept") == before
    shutil.rmtree(root)
    look(second)
    assert (root / "bucket" / "kept").read_bytes() == b"kept"
    with store.transaction():  # as after a kill between the two steps of writing a file
        for name, _ in store.list("mounted"):
            store.delete("mounted", name)
    look(Mounts(store))
    assert live_object(store, "bucket", "kept") == before


def test_the_folder_goes_with_its_last_user(store: Store) -> None:
    async def use() -> None:
        mounts = Mounts(store)
        root = await mounts.open(PROJECT)
        await mounts.open(PROJECT)
        (root / "bucket" / "late").write_bytes(b"late")
        await mounts.close(PROJECT)
        assert root.is_dir()
        (root / "bucket" / "later").write_bytes(b"later")
        await mounts.close(PROJECT)

    asyncio.run(use())
    assert not (store.folder / "gcs").exists()
    assert store.list("mounted") == []
    assert (content(store, "late"), content(store, "later")) == (b"late", b"later")


def test_a_folder_that_a_job_opens_while_it_is_removed_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    removing, opened, remove = threading.Event(), threading.Event(), shutil.rmtree

    def wait_and_remove(folder: Path, **options: Any) -> None:
        removing.set()
        opened.wait(60)
        remove(folder, **options)

    async def both() -> None:
        mounts = Mounts(store)
        await mounts.open(PROJECT)
        monkeypatch.setattr(shutil, "rmtree", wait_and_remove)
        closing = asyncio.create_task(mounts.close(PROJECT))
        await asyncio.to_thread(removing.wait, 60)
        opening = asyncio.create_task(mounts.open(PROJECT))
        await asyncio.wait([opening], timeout=0.5)  # it must wait for the removal
        opened.set()
        folder = await opening
        await closing
        assert (folder / "bucket").is_dir()
        await mounts.close(PROJECT)
        assert not folder.exists()

    asyncio.run(both())


def test_links_lead_nowhere(store: Store, tmp_path: Path) -> None:
    """A container can make links, which lead to files of this machine when the sandbox follows them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    mounts = Mounts(store)
    look(mounts)
    bucket = mounts.folder(PROJECT) / "bucket"
    (bucket / "link").symlink_to(outside / "secret")
    (bucket / "folder").symlink_to(outside)
    save(store, "bucket", "folder/new", b"new")
    look(mounts)
    assert content(store, "link") is None
    assert content(store, "folder/secret") is None
    assert [p.name for p in outside.iterdir()] == ["secret"]


@pytest.mark.skipif(not hasattr(os, "setxattr") or os.getuid() != 0, reason="only root can be several users")
def test_a_sandbox_without_privileges_may_remove_what_a_containers_root_wrote() -> None:
    if subprocess.run(["setpriv", "--version"], capture_output=True).returncode:
        pytest.skip("there is no command setpriv")
    program = """if True:
        import asyncio, pathlib, sys
        from sandbox.projects import project_number
        from sandbox.storage.mounts import Mounts
        from sandbox.store import Store
        store = Store(pathlib.Path(sys.argv[1]))
        with store.transaction():
            store.put("bucket", "bucket", {"projectNumber": project_number("p"), "storageClass": "STANDARD"})
        mounts = Mounts(store)
        async def main():
            print(await mounts.open("p"), flush=True)
            input()
            await mounts.close("p")
        asyncio.run(main())
        print((pathlib.Path(sys.argv[1]) / "gcs").exists(), store.list("object")[0][1]["size"])
    """
    as_another = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", program]
    with tempfile.TemporaryDirectory() as folder:  # another user can not enter pytest's
        Path(folder).chmod(0o777)
        command = [*as_another, f"{folder}/state"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdin
            assert running.stdout
            if not (root := running.stdout.readline().strip()):
                pytest.skip("another user can not read this checkout")
            below = Path(root) / "bucket" / "a" / "b"
            below.mkdir(parents=True)
            (below / "model").write_bytes(b"12345")
            running.stdin.write("\n")
            running.stdin.flush()
            assert running.stdout.read().split() == ["False", "5"]
