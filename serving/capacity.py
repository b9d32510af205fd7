"""How many workers fit on this machine, or into this container: CPUs, memory and GPUs, read from the system."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

WORKERS_PER_GPU = 4  # one decodes while another computes
# Bytes. A worker takes 0.6 GB, and 1.5 GB while it decodes and annotates the largest picture that is accepted.
MEMORY_PER_WORKER = 1_600_000_000
# Bytes of the launcher, the front and TorchServe's Java process, whatever the number of workers.
MEMORY_OF_THE_REST = 400_000_000

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def workers_that_fit(cpus: int, memory: int, gpus: int, spool_bytes: int) -> int:
    """One worker for each CPU, fewer where the memory or the GPUs do not suffice for that, at least 1.

    spool_bytes: the most that the bodies of requests take. They are counted as memory because the folder for temporary
    files usually is memory in a container.
    """
    by_memory = (memory - spool_bytes - MEMORY_OF_THE_REST) // MEMORY_PER_WORKER
    by_gpus = WORKERS_PER_GPU * gpus or cpus
    return max(1, min(cpus, by_memory, by_gpus))


def available_cpus(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """CPUs that this process may use, at least 1: its affinity, and the smallest quota of its cgroups rounded down."""
    cpus = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in _cgroups("cpu", root, membership):
        quota = _read(folder / "cpu.max")
        quota = quota or _read(folder / "cpu.cfs_quota_us") + " " + _read(folder / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError):  # "max" or nothing: no quota
            runtime, period = map(int, quota.split())
            if runtime > 0:
                cpus.append(runtime / period)
    return max(1, math.floor(min(cpus)))


def available_memory(root: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process may use: the machine's memory, or the smallest limit of its cgroups if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _cgroups("memory", root, membership):
        with contextlib.suppress(ValueError):  # "max" or nothing: no limit
            limits.append(int(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")))
    return min(limits)


def gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs of this machine that the image was built to use."""
    return 0 if os.environ.get("HEADCOUNT_ACCELERATOR") == "cpu" else len(list(devices.glob("nvidia[0-9]*")))


def _cgroups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process' cgroup and of all above it, whose limits hold as well.

    Version 2 has one hierarchy, version 1 one for each controller (cgroups(7)). A container may see its own cgroup as
    the root, and a path of the host in /proc/self/cgroup.
    """
    places = [(root, ""), (root / controller, "")]
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places.append((root, path))
        elif controller in controllers.split(","):
            places.append((root / controller, path))
    for base, path in places:
        # A cgroup outside of the namespace is shown as /../NAME.
        parts = [] if ".." in path else [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield base.joinpath(*parts[:depth])


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
