"""Reading objects of Cloud Storage over HTTPS with the metadata server's token, standard library only.

JSON API: https://cloud.google.com/storage/docs/json_api/v1/objects/get. STORAGE_EMULATOR_HOST points it at an
emulator, as it does Google's own clients, and then no token is sent.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

TIMEOUT = 10  # seconds without a byte
METADATA_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"

_lock = threading.Lock()
_token: tuple[str, float] = ("", 0.0)  # bearer token, time it is renewed


class StorageError(Exception):
    """An object that could not be read; code is the HTTP status to answer with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def read_object(uri: str, limit: int) -> bytes:
    """The bytes of gs://bucket/object, at most limit of them. Raises StorageError."""
    try:
        with _open(uri, "?alt=media") as response:
            data = bytes(response.read(limit + 1))
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"reading {uri} broke off: {error}", 503) from None
    if len(data) > limit:
        raise StorageError(f"{uri} is larger than {limit / 1e6:g} MB", 400)
    return data


def download_checkpoint(uri: str, folder: Path) -> Path:
    """Copy the one .pt file below a gs:// prefix (AIP_STORAGE_URI) or in a local folder. Raises StorageError."""
    if not uri.startswith("gs://"):
        found = sorted(Path(uri.removeprefix("file://")).glob("*.pt"))
        if len(found) != 1:
            raise StorageError(f"AIP_STORAGE_URI is {uri}, where there are {len(found)} .pt files; put one there", 400)
        return found[0]
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    listing = f"gs://{bucket}/"
    with _open(listing, "?" + urllib.parse.urlencode({"prefix": prefix, "fields": "items(name)"})) as response:
        names: list[str] = [item["name"] for item in json.load(response).get("items", [])]
    names = [name for name in names if name.endswith(".pt")]
    if len(names) != 1:
        raise StorageError(
            f"AIP_STORAGE_URI is {uri}, below which there are {len(names)} .pt files; put exactly one there",
            400,
        )
    target = folder / names[0].rpartition("/")[2]
    with _open(f"gs://{bucket}/{names[0]}", "?alt=media") as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
    return target


def _open(uri: str, query: str) -> IO[bytes]:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    host = emulator if "://" in emulator else f"http://{emulator}" if emulator else "https://storage.googleapis.com"
    url = f"{host}/storage/v1/b/{bucket}/o"
    request = urllib.request.Request(url + (f"/{urllib.parse.quote(name, safe='')}" if name else "") + query)
    if not emulator:
        try:
            request.add_header("Authorization", f"Bearer {_access_token()}")
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise StorageError(f"no token of a service account to read {uri} with: {error}", 503) from None
    try:
        response: IO[bytes] = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        reasons = {
            404: f"{uri} does not exist",
            403: f"the server's service account may not read {uri}; grant it roles/storage.objectViewer on the bucket",
            401: f"the server's service account may not read {uri}",
        }
        reason = reasons.get(error.code, f"reading {uri} failed: {error}")
        raise StorageError(reason, 503 if error.code == 429 or error.code >= 500 else 400) from None
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"reading {uri} failed: {error}", 503) from None


def _access_token() -> str:
    global _token
    with _lock:
        if time.monotonic() >= _token[1]:
            host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
            request = urllib.request.Request(f"http://{host}{METADATA_TOKEN}", headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                answer = json.load(response)
            _token = (answer["access_token"], time.monotonic() + answer["expires_in"] - 60)
        return _token[0]
