"""What a batch prediction job reads and writes: its input as instances, and the lines of its output.

https://docs.cloud.google.com/vertex-ai/docs/predictions/get-batch-predictions has the formats of the input and of the
results. The file of errors is the one that Google's pipeline of 2016 wrote (GoogleCloudPlatform/cloudml-samples), whose
lines the troubleshooting page still quotes: `('MESSAGE', NUMBER OF INSTANCES)`, without the instances.
"""

import base64
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sandbox.store import JSON

INPUT_FORMATS = ("jsonl", "csv", "file-list")
OUTPUT_FORMATS = ("jsonl",)
# InstanceConfig of the discovery document.
INSTANCE_TYPES = ("", "object", "array")
ATTEMPTS = 3  # as the error's `retry=3` says
REQUEST_SECONDS = 600.0  # Google's front end waits ten minutes for an answer: the troubleshooting page


class InstanceError(Exception):
    """An instance cannot be read or transformed."""


@dataclass(frozen=True)
class Item:
    """An instance. sent: as the container gets it. shown: the part of its line of output that is not the prediction."""

    sent: Any
    shown: JSON


def wildcard(pattern: str) -> re.Pattern[str]:
    """The names of objects that a URI's wildcards mean: `*` stays in a folder, `**` does not.

    https://cloud.google.com/storage/docs/wildcards
    """
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    meanings = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meanings.get(p) or (p if p.startswith("[") and p[-1:] == "]" else re.escape(p))
                              for p in parts), re.DOTALL)  # fmt: skip


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and name of a gs:// URI. Raises InstanceError."""
    match = re.fullmatch(r"gs://([^/]+)/(.*)", uri, re.DOTALL)
    if not match:
        raise InstanceError(f'Invalid Cloud Storage URI "{uri}": gs://BUCKET/NAME is expected.')
    return match[1], match[2]


def transformed(value: Any, config: JSON) -> Item:
    """An instance of JSON Lines as `instanceConfig` has it sent and shown. Raises InstanceError."""
    key, included, excluded = (config.get(name) for name in ("keyField", "includedFields", "excludedFields"))
    sent, shown = value, {}
    if (key or included or excluded) and not isinstance(value, dict):
        raise InstanceError("With key_field, included_fields or excluded_fields each line must be a JSON object.")
    if key:
        if key not in value:
            raise InstanceError(f'The key field "{key}" is missing.')
        shown["key"] = value[key]
        sent = {k: v for k, v in sent.items() if k != key}
    if included:
        if missing := [name for name in included if name not in value]:
            raise InstanceError(f'The field "{missing[0]}" is missing.')
        sent = {name: value[name] for name in included}
    elif excluded:
        sent = {k: v for k, v in sent.items() if k not in excluded}
    if config.get("instanceType") == "object" and not isinstance(sent, dict):
        raise InstanceError("With instance_type object each line must be a JSON object.")
    if config.get("instanceType") == "array" and isinstance(sent, dict):
        if not included:
            raise InstanceError("With instance_type array, objects need included_fields for the order of the values.")
        sent = list(sent.values())
    if not key:
        # "Excluded will be attached to the batch prediction output if key_field is not specified."
        shown["instance"] = value if excluded else sent
    return Item(sent, shown)


def of_json_lines(lines: Iterable[str], config: JSON) -> Iterator[Item | InstanceError]:
    for line in lines:
        if line.strip():
            try:
                yield transformed(json.loads(line), config)
            except ValueError as error:
                yield InstanceError(f"The line {line.strip()[:200]} is not JSON ({error}).")
            except InstanceError as error:
                yield error


def of_csv(lines: Iterable[str], config: JSON) -> Iterator[Item | InstanceError]:
    """One instance a row below the header, as an array: quoted values are texts, others floating point numbers."""
    rows = csv.reader(lines, quoting=csv.QUOTE_NONNUMERIC, strict=True)
    try:
        header = next(rows, [])
        key = header.index(config["keyField"]) if config.get("keyField") else None
        for row in rows:
            if len(row) != len(header):
                yield InstanceError(f"A row has {len(row)} values, and the header has {len(header)}.")
            elif key is None:
                yield Item(row, {"instance": row})
            else:
                yield Item(row[:key] + row[key + 1 :], {"key": row[key]})
    except (ValueError, csv.Error) as error:
        yield InstanceError(f"The CSV file cannot be read: {error}.")


def of_file(uri: str, content: bytes) -> Item:
    """An entry of a file list: the container gets the file's bytes, and the output shows its URI."""
    return Item({"b64": base64.b64encode(content).decode()}, {"instance": uri})


def request(items: list[Item], parameters: Any) -> bytes:
    """The body that the container gets."""
    body = {"instances": [item.sent for item in items]}
    return json.dumps(body if parameters is None else {**body, "parameters": parameters}).encode()


def predictions(body: bytes, wanted: int) -> list[Any]:
    """The predictions of a container's answer. Raises InstanceError."""
    try:
        found = json.loads(body)["predictions"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list):
        raise InstanceError(f'The answer has no list "predictions": {body[:200].decode(errors="replace")}')
    if len(found) != wanted:
        raise InstanceError(f"There are {len(found)} predictions for {wanted} instances.")
    return found


def refused(status: int, body: bytes, seconds: float) -> str:
    """The words for a request that was refused to the end, as the troubleshooting page has them."""
    said = body[:1000].decode(errors="replace")
    return (
        f"Post request fails. Cannot get predictions. Error: Exceeded retries: Non-OK result {status} ({said}) from "
        f"server, retry={ATTEMPTS}, elapsed={seconds:.2f}s."
    )
