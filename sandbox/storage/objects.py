"""Objects of Cloud Storage, with their generations.

https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import datetime
import json
import random
import re
import urllib.parse
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from starlette.responses import JSONResponse, Response

from sandbox import clock
from sandbox.context import Call
from sandbox.conventions import cut
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.storage.contents import content_file, find_bucket, live_object, remove, retire, save
from sandbox.storage.paths import check_conditions, names
from sandbox.store import JSON


def _object(call: Call, bucket: str, name: str) -> JSON:
    """The generation that is asked for, else the live one. Raises NOT_FOUND."""
    wanted = call.query.get("generation")
    for _, found in call.cloud.store.list("object", f"{bucket}/{name}\n"):
        if found["generation"] == wanted or (not wanted and "timeDeleted" not in found):
            return found
    raise not_found(f"No such object: {bucket}/{name}")


def _shown(item: JSON) -> JSON:
    return {k: v for k, v in item.items() if k != "file"}


def is_due(rule: JSON, item: JSON) -> bool:
    """Whether a lifecycle rule deletes an object now. A rule with a condition that is not known here deletes nothing.

    https://cloud.google.com/storage/docs/lifecycle#conditions
    """
    condition: JSON = rule["condition"]
    live = "timeDeleted" not in item
    if rule["action"]["type"] != "Delete" or set(condition) - {"age", "isLive", "daysSinceNoncurrentTime"}:
        return False
    if condition.get("isLive", live) != live or _days_since(item["timeCreated"]) < condition.get("age", 0):
        return False
    days = condition.get("daysSinceNoncurrentTime")
    return days is None or (not live and _days_since(item["timeDeleted"]) >= days)


def _days_since(time: str) -> float:
    return (clock.time() - datetime.datetime.fromisoformat(time).timestamp()) / 86400


def _find_bucket(call: Call, name: str) -> JSON:
    """The bucket, after its lifecycle rules were applied to its objects. Raises NOT_FOUND.

    Google applies them within a day; the sandbox applies them at each request for an object.
    """
    bucket = find_bucket(call.cloud.store, name)
    if rules := bucket.get("lifecycle", {}).get("rule", []):
        for _, item in call.cloud.store.list("object", f"{name}/"):
            if any(is_due(rule, item) for rule in rules):
                with call.cloud.store.transaction():
                    remove(call.cloud.store, item) if "timeDeleted" in item else retire(call.cloud.store, bucket, item)
    return bucket


def _save(call: Call, bucket: str, metadata: JSON, content: bytes, media: str) -> JSON:
    store, name = call.cloud.store, metadata.get("name") or call.query.get("name", "")
    _find_bucket(call, bucket)
    if not name or len(name.encode()) > 1024 or "\n" in name or "\r" in name:
        raise invalid(f"Invalid object name: '{name}'")
    check_conditions(call, live_object(store, bucket, name))
    return _shown(save(store, bucket, name, content, metadata, media))


def _split(call: Call) -> tuple[JSON, bytes, str]:
    """(metadata, content, content type) of a multipart/related upload."""
    head = f"Content-Type: {call.request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + call.raw)
    parts: Any = message.get_payload()
    if not isinstance(parts, list) or len(parts) != 2:
        raise invalid("Multipart upload bodies need two parts: metadata and media.")
    # The parser reads lines; the content is taken as it is, between the part's head and the last boundary.
    boundary = b"--" + str(message.get_boundary()).encode()
    media = call.raw.split(boundary)[2:-1]
    content = boundary.join(media)
    end = min(i for i in (content.find(b"\r\n\r\n"), content.find(b"\n\n")) if i >= 0)
    skip = 4 if content[end : end + 4] == b"\r\n\r\n" else 2
    tail = 2 if content.endswith(b"\r\n") else 1
    return json.loads(parts[0].get_payload()), content[end + skip : -tail], parts[1].get_content_type()


async def insert(call: Call) -> Any:
    bucket, kind = names(call)[0], call.query.get("uploadType", "media")
    if upload := call.query.get("upload_id"):
        return _resume(call, bucket, upload)
    _find_bucket(call, bucket)
    media = call.request.headers.get("content-type", "application/octet-stream")
    if kind == "media":
        return _save(call, bucket, {}, call.raw, media)
    if kind == "multipart":
        metadata, content, media = _split(call)
        return _save(call, bucket, metadata, content, media)
    if kind != "resumable":
        raise invalid(f"Invalid upload type {kind}")
    metadata = json.loads(call.raw or b"{}")
    metadata.setdefault("name", call.query.get("name", ""))
    metadata.setdefault("contentType", call.request.headers.get("x-upload-content-type", media))
    upload = f"{random.getrandbits(128):032x}"
    with call.cloud.store.transaction():
        call.cloud.store.put("upload", upload, metadata)
    query = {k: v for k, v in call.query.items() if k.startswith("if")} | {"upload_id": upload}
    location = call.request.url.replace(query=urllib.parse.urlencode({"uploadType": "resumable", **query}))
    return Response(headers={"Location": str(location)})


def _resume(call: Call, bucket: str, upload: str) -> Response:
    """One chunk of a resumable upload. https://cloud.google.com/storage/docs/resumable-uploads"""
    metadata = call.cloud.store.get("upload", upload)
    if metadata is None:
        raise not_found("Upload not found.")
    path = content_file(call.cloud.store, upload)
    path.parent.mkdir(exist_ok=True)
    have = path.stat().st_size if path.exists() else 0
    span = re.fullmatch(
        r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)",
        call.request.headers.get("content-range", f"bytes 0-{len(call.raw) - 1}/{len(call.raw)}"),
    )
    if span and span[1] and int(span[1]) == have:
        with path.open("ab") as file:
            file.write(call.raw)
        have += len(call.raw)
    if not span or span[3] == "*" or int(span[3]) != have:
        return Response(status_code=308, headers={"Range": f"bytes=0-{have - 1}"} if have else {})
    content = path.read_bytes() if path.exists() else b""
    item = _save(call, bucket, metadata, content, "application/octet-stream")
    path.unlink(missing_ok=True)
    with call.cloud.store.transaction():
        call.cloud.store.delete("upload", upload)
    return JSONResponse(item)


async def get(call: Call) -> Any:
    bucket, name = names(call)
    _find_bucket(call, bucket)
    item = _object(call, bucket, name)
    check_conditions(call, item)
    if call.query.get("alt") != "media":
        return _shown(item)
    content, status = content_file(call.cloud.store, item["file"]).read_bytes(), 200
    headers = {
        "ETag": item["etag"],
        "x-goog-hash": f"crc32c={item['crc32c']},md5={item['md5Hash']}",
        "x-goog-generation": item["generation"],
        "x-goog-metageneration": item["metageneration"],
        "x-goog-stored-content-length": item["size"],
    }
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("range", ""))
    if asked:
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            raise GoogleError("INVALID_ARGUMENT", "Request range not satisfiable", http=416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        content, status = content[first : last + 1], 206
    return Response(content, status, headers, item["contentType"])


async def list_(call: Call) -> JSON:
    """By name and age; `prefix`, `delimiter`, `versions` and pages as Google has them."""
    bucket, query = names(call)[0], call.query
    _find_bucket(call, bucket)
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    every = query.get("versions", "").lower() == "true"  # Python's client says True
    items, prefixes = [], set()
    for key, item in call.cloud.store.list("object", f"{bucket}/{prefix}"):
        if "timeDeleted" in item and not every:
            continue
        name = key.removeprefix(f"{bucket}/").partition("\n")[0]
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if found:
            prefixes.add(prefix + head + delimiter)
        else:
            items.append(_shown(item))
    answer = {"kind": "storage#objects", **cut(call, "items", items, usual=1000, most=1000, size="maxResults")}
    if prefixes and not query.get("pageToken"):
        answer["prefixes"] = sorted(prefixes)
    return answer


async def delete(call: Call) -> Response:
    bucket_name, name = names(call)
    bucket, item = _find_bucket(call, bucket_name), _object(call, bucket_name, name)
    check_conditions(call, item)
    with call.cloud.store.transaction():
        if "generation" in call.query:  # for good
            remove(call.cloud.store, item)
        else:
            retire(call.cloud.store, bucket, item)
    return Response(status_code=204)


RAW = {"storage.objects.insert", "storage.objects.get"}
METHODS: dict[str, Any] = {
    "storage.objects.insert": insert,
    "storage.objects.get": get,
    "storage.objects.list": list_,
    "storage.objects.delete": delete,
}
