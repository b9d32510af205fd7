"""Copies files to the bucket of a stack, on Google or in the sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headcount.stacks import StackError


def copy(files: Mapping[str, Path], found: dict[str, Any], what: str) -> str:
    """Copies files to the models' bucket of a stack with these outputs, in order; returns the bucket's gs:// address.

    files: by the objects' names, which have to change with the content, because what is there already stays. what: the
    files in a word, for messages. Raises StackError.
    """
    if not found.get("modelBucket"):
        raise StackError("The stack has no bucket for models yet: run `pulumi up` first.")
    import google.api_core.exceptions
    import google.auth.exceptions

    bucket = str(found["modelBucket"]).removeprefix("gs://")
    try:
        client = client_of(found)
        try:
            for name, file in files.items():
                blob = client.bucket(bucket).blob(name)
                with contextlib.suppress(google.api_core.exceptions.PreconditionFailed):  # it is there already
                    blob.upload_from_filename(str(file), if_generation_match=0, checksum="crc32c")
        finally:
            client.close()
    except google.api_core.exceptions.GoogleAPICallError as error:
        raise StackError(f"The {what} was not uploaded to gs://{bucket}: {error.message}") from None
    except google.auth.exceptions.GoogleAuthError as error:
        raise StackError(
            f"The Google credentials are refused ({error}): run `gcloud auth application-default login`."
        ) from None
    except OSError as error:
        raise StackError(f"gs://{bucket} cannot be reached: {error}") from None
    return f"gs://{bucket}"


def client_of(found: dict[str, Any]) -> Any:
    """Google's client of Cloud Storage for a stack with these outputs."""

    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    project, url = str(found["endpoint"]).split("/")[1], str(found["url"])
    if url.startswith("https://"):
        return storage.Client(project)
    # The sandbox takes no credentials.
    sandbox = {"api_endpoint": url.partition("/v1/")[0]}
    return storage.Client(project, AnonymousCredentials(), client_options=sandbox)  # type: ignore[no-untyped-call]
