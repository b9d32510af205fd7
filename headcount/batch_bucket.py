"""The objects of a batch on Vertex AI: the pictures of a bucket, instances, results, and the manifest beside them."""

from __future__ import annotations

import ast
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from headcount.batch_plan import in_region, split
from headcount.bucket import explained
from headcount.files import SUFFIXES
from headcount.ledger import PAGE, BatchError, Ledger, Row

SHARD: Final = 50_000  # instances of a file
MANIFEST: Final = "manifest.json"
TABLE: Final = "table.csv"
LISTED: Final = "items(name,size,contentType,md5Hash,generation),nextPageToken"


class Found(NamedTuple):
    """An object: its gs:// address, and its size in bytes."""

    uri: str
    size: int


class Buckets:
    """Reads and writes objects. client: of google-cloud-storage. Raises StackError."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def check_region(self, uri: str, region: str) -> None:
        """Raises StackError for a bucket that cannot be seen, BatchError for one that is elsewhere."""
        bucket, _ = split(uri)
        with explained(f"gs://{bucket}"):
            described = self._client.get_bucket(bucket)._properties
        if not in_region(described, region):
            raise BatchError(
                f"gs://{bucket} is in {described['location']}, and the model in {region}: a batch job needs both in "
                "one region. Copy the pictures to a bucket there, or deploy a stack where they are."
            )

    def pictures(self, prefix: str) -> Iterator[Found]:
        """The objects below a prefix that are pictures by their names or types, page after page."""
        bucket, name = split(prefix)
        with explained(f"gs://{bucket}"):
            for blob in self._client.list_blobs(bucket, prefix=name, fields=LISTED):
                if is_picture(blob.name, blob.content_type):
                    yield Found(f"gs://{bucket}/{blob.name}", blob.size or 0)

    def read(self, uri: str) -> dict[str, Any] | None:
        """The JSON of an object; None where there is none."""
        bucket, name = split(uri)
        with explained(f"gs://{bucket}"):
            blob = self._client.bucket(bucket).get_blob(name)
            found: dict[str, Any] | None = json.loads(blob.download_as_bytes()) if blob else None
            return found

    def write(self, uri: str, content: str | bytes, kind: str = "application/json") -> None:
        bucket, name = split(uri)
        with explained(f"gs://{bucket}"):
            self._client.bucket(bucket).blob(name).upload_from_string(content, content_type=kind)

    def upload(self, uri: str, path: str) -> None:
        bucket, name = split(uri)
        with explained(f"gs://{bucket}"):
            self._client.bucket(bucket).blob(name).upload_from_filename(path, content_type="text/csv")

    def names(self, prefix: str) -> list[str]:
        """The addresses of the objects below a prefix, for a few."""
        bucket, name = split(prefix)
        with explained(f"gs://{bucket}"):
            return [f"gs://{bucket}/{blob.name}" for blob in self._client.list_blobs(bucket, prefix=name)]

    def folders(self, prefix: str) -> list[str]:
        """The addresses of the folders whose names begin with a prefix, each with its slash."""
        bucket, name = split(prefix)
        with explained(f"gs://{bucket}"):
            listing = self._client.list_blobs(bucket, prefix=name, delimiter="/")
            list(listing)  # the folders are known after the last page
            return [f"gs://{bucket}/{folder}" for folder in sorted(listing.prefixes)]

    def lines(self, uri: str) -> Iterator[str]:
        """The lines of an object, which is read in pieces."""
        bucket, name = split(uri)
        with explained(uri), self._client.bucket(bucket).blob(name).open("rt", encoding="utf-8") as file:
            yield from file


def is_picture(name: str, content_type: str | None) -> bool:
    """Whether an object may be a picture, by its name or its type."""
    return not name.endswith("/") and (name.lower().endswith(SUFFIXES) or (content_type or "").startswith("image/"))


# ------------------------------------------------------------------------------------------ instances and results


def instance(uri: str, listed: bool) -> str:
    """The line of a picture in a file of instances. listed: the file is a list of files, and no JSON."""
    return uri if listed else json.dumps({"image": {"uri": uri}})


def picture_of(line: Any) -> str:
    """The gs:// address in a line of instances, or in the `instance` of a result."""
    return line if isinstance(line, str) else str(line["image"]["uri"])


def write_instances(
    write: Callable[[str, str], object], uris: Iterable[str], prefix: str, listed: bool
) -> tuple[list[str], int]:
    """Writes the instances in files of SHARD lines below a prefix; returns the files and the number of lines."""
    files: list[str] = []
    number = 0
    remaining = iter(uris)
    while lines := [instance(uri, listed) for uri in itertools.islice(remaining, SHARD)]:
        files.append(f"{prefix}-{len(files):05}.{'txt' if listed else 'jsonl'}")
        write(files[-1], "\n".join(lines) + "\n")
        number += len(lines)
    return files, number


def fill(ledger: Ledger, found: Iterable[Found]) -> tuple[int, int]:
    """Notes the pictures of a listing in the ledger; returns their number and their bytes."""
    number = size = 0
    remaining = iter(found)
    while page := list(itertools.islice(remaining, PAGE)):
        ledger.add((one.uri, "") for one in page)
        number, size = number + len(page), size + sum(one.size for one in page)
    return number, size


def row_of(line: str) -> Row | None:
    """What a line of results says of its picture; None where asking again may help."""
    said = json.loads(line)
    picture, prediction = picture_of(said["instance"]), said.get("prediction")
    error = prediction.get("error") if isinstance(prediction, dict) else None
    if isinstance(error, dict):
        code, message = int(error.get("code", 500)), str(error.get("message", ""))
        return None if code in (408, 429) or code >= 500 else Row(picture, error=message.partition("]: ")[2] or message)
    if not isinstance(prediction, dict) or not isinstance(prediction.get("count"), int):
        return Row(picture, error="the answer has no count: does the stack's release count people?")
    return Row(picture, prediction["count"])


def collect(buckets: Buckets, folder: str, ledger: Ledger) -> Counter[str]:
    """Records the results in a job's folder of output. Returns the reasons of failures, and how often each occurred."""
    why = Counter[str]()
    for uri in buckets.names(folder + "/"):
        file = uri.rpartition("/")[2]
        lines = (line for line in buckets.lines(uri) if line.strip())
        if file.startswith("prediction.results"):
            while page := list(itertools.islice(lines, PAGE)):
                ledger.record(row for row in map(row_of, page) if row)
        elif file.startswith("prediction.errors_stats"):
            for line in lines:
                why += _reason(line)
    return why


def _reason(line: str) -> Counter[str]:
    """The reason in a line of the statistics of errors, which is a tuple of Python: ('MESSAGE', NUMBER)."""
    try:
        message, number = ast.literal_eval(line)
        return Counter({str(message): int(number)})
    except (ValueError, TypeError, SyntaxError):
        return Counter({line.strip(): 1})
