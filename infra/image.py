"""The images: built for linux/amd64, pushed, and from here on known by their digests."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pulumi
import pulumi_docker_build as docker_build
from docker.utils.build import exclude_paths

from infra.foundation import Foundation
from infra.settings import Settings
from infra.torch_source import torch_source

ROOT: Final = Path(__file__).resolve().parent.parent
WEIGHTS: Final = Path(".headcount/weights")
CONTEXT: Final = Path(".headcount/context")
# Machine families whose processors multiply bfloat16: https://cloud.google.com/compute/docs/cpu-platforms
BFLOAT16_FAMILIES: Final = {"c3", "c3d", "c4", "c4d", "n4"}


@dataclass(frozen=True)
class Target:
    """A target of the Dockerfile. name: of its image in the repository. files: the beginnings of its files' paths."""

    stage: str  # "" for the last one
    name: str
    files: tuple[str, ...]


# An image changes with its own files only. Both have the same layer of torch.
TORCH: Final = ("Dockerfile", ".dockerignore", "requirements/torch.txt", "requirements/tools.txt")
SERVING: Final = Target("", "headcount", (*TORCH, "requirements/serve.txt", "serving/"))
TRAINING: Final = Target(
    "training",
    "headcount-training",
    (*TORCH, "requirements/training.txt", "training/", "headcount/data.py", "serving/__init__.py",
     "serving/contract.py", "serving/exported/"),
)  # fmt: skip


class Image(pulumi.ComponentResource):
    """An image of these sources, in the stack's repository.

    It is not built in previews. Unchanged sources are not built again, on any machine, because the builder
    gets a copy without the times and modes that differ between checkouts. It stays in the repository
    when it leaves the stack, because releases may be pinned to it; the cleanup policy removes it.
    """

    def __init__(
        self,
        settings: Settings,
        foundation: Foundation,
        target: Target,
        gpu: bool,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("headcount:index:Image", settings.stack, None, opts)
        arguments = {
            "BASE": settings.base_image,
            "ACCELERATOR": "cuda" if gpu else "cpu",
            "TORCH": "index" if gpu else settings.torch or torch_source(ROOT, pulumi.log.info),
        }
        files = target.files
        if target == SERVING:
            weights = fetch_weights(ROOT, settings.weights)
            arguments |= {"REQUIRE": required_precision(settings), "WEIGHTS": weights}
            files += (str(WEIGHTS / f"{weights}.pt"),)
        context = ROOT / CONTEXT / ".".join(filter(None, [settings.names.labels["stack"], target.stage]))
        sources = stage(ROOT, context, files)
        image = pulumi.Output.concat(foundation.repository.registry_uri, "/", target.name)
        cache = pulumi.Output.concat(image, ":cache")
        build = docker_build.Image(
            "image",
            # Relative to this program's folder: the state is the same in every checkout.
            context={"location": os.path.relpath(context)},
            dockerfile={"location": os.path.relpath(context / "Dockerfile")},
            platforms=[docker_build.Platform.LINUX_AMD64],  # Vertex AI's platform, also on Apple silicon
            target=target.stage or None,
            build_args={**arguments, "SOURCES": sources, **settings.build_args},
            tags=[pulumi.Output.concat(image, ":", sources)],
            push=True,
            build_on_preview=False,
            builder={"name": settings.builder} if settings.builder else None,
            cache_from=[{"registry": {"ref": cache}}],
            # The image's own layers, not those of earlier stages: these hold gigabytes that another machine fetches
            # faster than a registry stores them. Artifact Registry takes a cache as an OCI image only.
            cache_to=[
                {
                    "registry": {
                        "ref": cache,
                        "mode": docker_build.CacheMode.MIN,
                        "image_manifest": True,
                        "oci_media_types": True,
                        "ignore_error": True,
                    }
                }
            ],
            registries=[
                {
                    "address": foundation.repository.registry_uri.apply(lambda uri: uri.partition("/")[0]),
                    "username": "oauth2accesstoken",
                    "password": foundation.token,
                }
            ],
            opts=pulumi.ResourceOptions(parent=self, retain_on_delete=True),
        )
        self.digest: pulumi.Output[str] = build.digest
        #: Its name by digest.
        self.ref = pulumi.Output.concat(image, "@", build.digest)
        self.register_outputs({})


def required_precision(settings: Settings) -> str:
    """The precision that the network has to be compiled for, so that the stack's machines count at their full speed."""
    if settings.accelerator:
        return ""
    return "bfloat16" if settings.machine_type.partition("-")[0] in BFLOAT16_FAMILIES else "float32"


def fetch_weights(root: Path, weights: str) -> str:
    """Returns the name of the weights in `.headcount/weights`: the requested ones, or their substitute.

    Fetches missing weights. Raises pulumi.RunError with the remedy.
    """
    if (root / WEIGHTS / f"{weights}.pt").exists():
        return weights
    return fetch(root, f"{weights}.pt")[0].stem


def fetch(root: Path, name: str) -> list[Path]:
    """Returns the files of a name of `headcount.data`, and fetches missing ones. Raises pulumi.RunError."""
    # In a process of its own, because the program imports nothing of headcount/.
    done = subprocess.run(
        [sys.executable, "-m", "headcount.data", name],
        cwd=root, env={**os.environ, "HEADCOUNT_HOME": str(root / ".headcount")}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise pulumi.RunError(done.stderr.strip())
    if done.stderr:
        pulumi.log.info(done.stderr.strip())
    return [Path(line) for line in done.stdout.splitlines()]


def stage(root: Path, to: Path, files: tuple[str, ...]) -> str:
    """Copies the files of an image from `root` to the folder `to`; returns their hash.

    These are the files that `.dockerignore` lets in and whose paths begin with one of `files`. Modes and times do not
    depend on the checkout, because a layer's digest depends on them. Times depend on the content, because BuildKit
    treats a file of the same size and time as unchanged.
    """
    ignore = (root / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in ignore if line.strip() and not line.lstrip().startswith("#")]
    allowed = {"Dockerfile", *exclude_paths(str(root), patterns)}
    shutil.rmtree(to, ignore_errors=True)
    whole = hashlib.sha256()
    for name in sorted(name for name in allowed if name.startswith(files) and (root / name).is_file()):
        source, target = root / name, to / name
        content, mode = source.read_bytes(), 0o755 if source.stat().st_mode & 0o100 else 0o644
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
        time = 10**9 + int.from_bytes(hashlib.sha256(content).digest()[:4]) % 10**8  # 2001 to 2004
        os.utime(target, (time, time))
        whole.update(f"{name}\0{mode:o}\0{len(content)}\0".encode() + content)
    for folder in [to, *(path for path in to.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
        os.utime(folder, (10**9, 10**9))
    return whole.hexdigest()[:16]
