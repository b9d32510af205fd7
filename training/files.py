"""Where the files of training are: Cloud Storage as Vertex AI mounts it, and the published data sets.

Nothing here imports torch, because the steps of a pipeline that only copy files start without it.
"""

from __future__ import annotations

from pathlib import Path

# Where a training container of Vertex AI finds Cloud Storage:
# https://cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system
GCS = Path("/gcs")


class UsageError(Exception):
    """A run cannot start or continue; the message says how to repair it."""


def local_path(text: str) -> Path:
    """Returns the path of a file or folder: `gs://bucket/name` becomes `/gcs/bucket/name`.

    Raises UsageError for gs:// where /gcs is not mounted.
    """
    if not text.startswith("gs://"):
        return Path(text).expanduser()
    if not GCS.is_dir():
        raise UsageError(
            f"{text} is read through {GCS}, which Vertex AI mounts and this machine does not have; copy it here first: "
            f"gcloud storage cp -r {text} ."
        )
    return GCS / text.removeprefix("gs://")


def published(name: str) -> Path:
    """Returns the path of a file of `headcount.data`, which is fetched if it is absent. Raises UsageError."""
    from headcount.data import DataError, fetch

    try:
        return fetch(name)
    except DataError as error:
        raise UsageError(str(error)) from None
