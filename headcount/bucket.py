"""Copies files to the bucket of a stack, on Google or in the sandbox."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from headcount.stacks import StackError

TRY_SECONDS: Final = 30.0  # Google's client would try for two minutes in silence


def copy(files: Mapping[str, Path], found: dict[str, Any]) -> str:
    """Copies files to the models' bucket of a stack with these outputs, in order; returns the bucket's gs:// address.

    files: by the objects' names, which have to change with the content, because what is there already stays. Raises
    StackError.
    """
    if not found.get("modelBucket"):
        raise StackError("The stack has no bucket for models yet: run `pulumi up` first.")
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage.retry import DEFAULT_RETRY

    address = str(found["modelBucket"])
    retry = DEFAULT_RETRY.with_timeout(TRY_SECONDS)
    with explained(address), contextlib.closing(client_of(found)) as client:
        for name, file in files.items():
            blob = client.bucket(address.removeprefix("gs://")).blob(name)
            with contextlib.suppress(PreconditionFailed):  # it is there already
                blob.upload_from_filename(str(file), if_generation_match=0, checksum="crc32c", retry=retry)
    return address


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the errors of Google's client into sentences. what: the address that is used. Raises StackError."""
    import google.api_core.exceptions as failures
    import google.auth.exceptions
    import requests

    try:
        yield
    except failures.NotFound:
        raise StackError(f"{what} does not exist: correct the name.") from None
    except (failures.Forbidden, failures.Unauthorized) as error:
        raise StackError(
            f"You have no access to {what}: ask for roles/storage.objectUser and storage.buckets.get on it "
            f"({error.message})."
        ) from None
    except failures.GoogleAPICallError as error:
        raise StackError(f"{what} cannot be used: {error.message}") from None
    except google.auth.exceptions.DefaultCredentialsError:
        raise StackError("There are no Google credentials: run `gcloud auth application-default login`.") from None
    except google.auth.exceptions.GoogleAuthError as error:
        raise StackError(
            f"The Google credentials are refused ({error}): run `gcloud auth application-default login`."
        ) from None
    except failures.RetryError as error:
        raise StackError(f"{what} cannot be reached: {error.cause or error}") from None
    except (requests.RequestException, OSError) as error:
        raise StackError(f"{what} cannot be reached: {error}") from None


def client_of(found: dict[str, Any]) -> Any:
    """Google's client of Cloud Storage for a stack with these outputs. Raises StackError without credentials."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    project, url = str(found["endpoint"]).split("/")[1], str(found["url"])
    if url.startswith("https://"):
        with explained("Cloud Storage"):
            return storage.Client(project)
    # The sandbox takes no credentials.
    sandbox = {"api_endpoint": url.partition("/v1/")[0]}
    return storage.Client(project, AnonymousCredentials(), client_options=sandbox)  # type: ignore[no-untyped-call]
