"""Reading objects of Cloud Storage over HTTPS with the metadata server's token, standard library only.

JSON API: https://cloud.google.com/storage/docs/json_api/v1/objects/get. STORAGE_EMULATOR_HOST points it at an
emulator, as it does Google's own clients, and then no token is sent.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from serving.exported.model_contract import CONTRACT, PROGRAM

HOST = "https://storage.googleapis.com"
TIMEOUT = 10  # seconds without a byte
METADATA_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"

_lock = threading.Lock()
_token: tuple[str, float] = ("", 0.0)  # bearer token, and the time on the monotonic clock at which it is renewed


class StorageError(Exception):
    """An object that could not be read. code: the HTTP status to answer with; 503 where asking again may help."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def read_object(uri: str, limit: int) -> bytes:
    """Returns the bytes of gs://bucket/object, at most `limit` bytes. Raises StorageError."""
    content = io.BytesIO()
    _copy(uri, {"alt": "media"}, content, limit)
    return content.getvalue()


def fetch_model(uri: str, folder: Path) -> Path:
    """Returns the model of a folder, copied from gs:// or where it is: a .pt file, or a folder of an exported model.

    uri: a local folder, or a gs:// prefix (AIP_STORAGE_URI). folder: for copies. Raises StorageError and OSError.
    """
    if not uri.startswith("gs://"):
        local = Path(uri.removeprefix("file://"))
        return local / _choose([one.name for one in local.glob("*")], uri)
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    names = [name.removeprefix(prefix) for name in _names(bucket, prefix)]
    chosen = _choose(names, uri)
    target = folder / (chosen.rpartition("/")[2] or "model")
    wanted = {chosen: target} if chosen else {name: target / name for name in (PROGRAM, CONTRACT)}
    try:
        for name, path in wanted.items():
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                _copy(f"gs://{bucket}/{prefix}{name}", {"alt": "media"}, file)
    except BaseException:
        for path in wanted.values():
            path.unlink(missing_ok=True)
        raise
    return target


def _choose(names: list[str], uri: str) -> str:
    """The name of the one checkpoint among these, or "" where they are an exported model. Raises StorageError."""
    checkpoints = [name for name in names if name.endswith(".pt")]
    exported = {PROGRAM, CONTRACT} & set(names)
    if len(checkpoints) == 1 and not exported:
        return checkpoints[0]
    if not checkpoints and len(exported) == 2:
        return ""
    found = f"{len(checkpoints)} .pt files" + "".join(f" and {name}" for name in sorted(exported))
    raise StorageError(
        f"{uri} has no model: there are {found}. Put exactly one .pt file there, or {PROGRAM} and {CONTRACT}", 400
    )


def _names(bucket: str, prefix: str) -> list[str]:
    """The names of all objects whose names begin with the prefix, from as many pages as they take."""
    names: list[str] = []
    query = {"prefix": prefix, "fields": "items(name),nextPageToken"}
    while True:
        page = io.BytesIO()
        _copy(f"gs://{bucket}/", query, page)
        try:
            content = json.loads(page.getvalue())
            names += [item["name"] for item in content.get("items", [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"the list of gs://{bucket}/{prefix} cannot be read: {error!r}", 503) from None
        if not content.get("nextPageToken"):
            return names
        query["pageToken"] = content["nextPageToken"]


def _copy(uri: str, query: dict[str, str], target: BinaryIO, limit: int | None = None) -> None:
    """Writes Cloud Storage's answer to target. Raises StorageError, also if the answer is not complete."""
    size, digest = 0, hashlib.md5(usedforsecurity=False)
    try:
        with _open(uri, query) as response:
            length = response.headers.get("Content-Length", "")
            expected = int(length) if length.isdigit() else None
            while (limit is None or max(size, expected or 0) <= limit) and (chunk := response.read(1 << 20)):
                size += len(chunk)
                digest.update(chunk)
                target.write(chunk)
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"reading {uri} broke off: {error!r}", 503) from None
    if limit is not None and max(size, expected or 0) > limit:
        raise StorageError(f"{uri} is larger than {limit / 1e6:g} MB", 400)
    # http.client takes the end of the connection for the end of the answer.
    if expected is not None and size != expected:
        raise StorageError(f"reading {uri} broke off after {size} of {expected} bytes", 503)
    if _stored_md5(response.headers) not in (None, base64.b64encode(digest.digest()).decode()):
        raise StorageError(f"{uri} arrived damaged: its MD5 is not the one that Cloud Storage has for it", 503)


def _stored_md5(headers: Message) -> str | None:
    """The MD5 of the answer in base64, if Cloud Storage says it.

    Composed objects have a CRC32C only, which the standard library does not have; of these the length is checked.
    https://cloud.google.com/storage/docs/data-validation
    """
    if headers.get("X-Goog-Stored-Content-Encoding", "identity") != "identity":
        return None  # it is that of the compressed object, and the answer may be decompressed
    for header in headers.get_all("X-Goog-Hash", []):
        for part in header.split(","):
            kind, _, value = part.strip().partition("=")
            if kind == "md5":
                return value
    return None


def _open(uri: str, query: dict[str, str]) -> http.client.HTTPResponse:
    """Ask for an object, or for a bucket's list of objects where the name is empty. Raises StorageError."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    host = emulator if "://" in emulator else f"http://{emulator}" if emulator else HOST
    url = f"{host}/storage/v1/b/{bucket}/o" + (f"/{urllib.parse.quote(name, safe='')}" if name else "")
    request = urllib.request.Request(f"{url}?{urllib.parse.urlencode(query)}")
    if not emulator:
        try:
            # Unredirected: a server that the answer may point to gets no token.
            request.add_unredirected_header("Authorization", f"Bearer {_access_token()}")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"no token of a service account to read {uri} with: {error}", 503) from None
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            _forget_token()
            raise StorageError(f"Cloud Storage did not accept the service account's token to read {uri}", 503) from None
        reasons = {
            404: f"{uri} does not exist",
            403: f"the server's service account may not read {uri}; grant it roles/storage.objectViewer on the bucket",
        }
        reason = reasons.get(error.code, f"reading {uri} failed: {error}")
        raise StorageError(reason, 503 if error.code in (408, 429) or error.code >= 500 else 400) from None


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


def _forget_token() -> None:
    global _token
    with _lock:
        _token = ("", 0.0)
