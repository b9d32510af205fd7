"""Cloud Storage: buckets, objects with their generations, and the policies of buckets.

https://cloud.google.com/storage/docs/json_api/v1
Our own, because the emulators on PyPI have no policies, no generations, or no maintainer. Contents lie in files
beside the state, named by a random key.
"""

import base64
import hashlib
import json
import random
import re
import urllib.parse
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandbox.cloud import Call, check_labels, project_number
from sandbox.discovery import read_request
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.iam import policy, set_policy
from sandbox.store import JSON, now

# First segments of its paths; uploads and downloads have their own.
ROOTS = ("storage", "upload", "download", "resumable")
# https://cloud.google.com/storage/docs/buckets#naming
BUCKET = re.compile(r"(?!goog)(?!.*g[o0]{2}gle)[a-z0-9](?:[a-z0-9_.-]{1,220})[a-z0-9]")
CHUNK = 256 * 1024
PUBLIC = {"allUsers", "allAuthenticatedUsers"}


def meant(request: Request) -> tuple[str, str]:
    """(HTTP method, path) of the API method that a request means; the path's segments still encoded.

    Names of objects may have any character, so they are decoded after the path is split.
    """
    raw: bytes = request.scope["raw_path"]
    path = raw.decode("ascii").partition("?")[0].partition("storage/")[2]
    uploading = request.method == "PUT" and "upload_id" in request.query_params
    return "POST" if uploading else request.method, path.replace(":", "%3A")


def _parts(call: Call) -> list[str]:
    """`[bucket]` or `[bucket, object]` of the path."""
    return [urllib.parse.unquote(p) for p in call.name.split("/")[1::2]]


def _conditions(call: Call, resource: JSON | None) -> None:
    """Raises 412 unless the query's preconditions hold for `resource` (None: there is none)."""
    for name in ("generation", "metageneration"):
        actual = str(resource[name]) if resource and name in resource else "0"
        wanted = call.query.get(f"if{name.capitalize()}Match")
        unwanted = call.query.get(f"if{name.capitalize()}NotMatch")
        if (wanted is not None and wanted != actual) or (unwanted is not None and unwanted == actual):
            raise GoogleError(
                "FAILED_PRECONDITION", "At least one of the pre-conditions you specified did not hold.", http=412
            )


# ------------------------------------------------------------------------------------------- buckets


def _bucket(call: Call, name: str) -> JSON:
    bucket = call.cloud.store.get("bucket", name)
    if not bucket:
        raise not_found("The specified bucket does not exist.")
    return bucket


def _resource(bucket: str) -> str:
    return f"projects/_/buckets/{bucket}"


def _born_with(bucket: JSON) -> list[JSON]:
    """The bindings that a new bucket has."""
    project = bucket["projectNumber"]
    owners = [f"projectEditor:{project}", f"projectOwner:{project}"]
    return [
        {"role": "roles/storage.legacyBucketOwner", "members": owners},
        {"role": "roles/storage.legacyBucketReader", "members": [f"projectViewer:{project}"]},
    ]


def _with_defaults(bucket: JSON) -> JSON:
    iam: JSON = bucket.setdefault("iamConfiguration", {})
    uniform = iam.setdefault("uniformBucketLevelAccess", {"enabled": False})
    iam["bucketPolicyOnly"] = dict(uniform)
    iam.setdefault("publicAccessPrevention", "inherited")
    bucket.setdefault("softDeletePolicy", {"retentionDurationSeconds": "604800"})
    for name in ("labels", "lifecycle", "versioning", "cors", "encryption", "logging", "website"):
        if not bucket.get(name, True):
            del bucket[name]
    return bucket


async def insert_bucket(call: Call) -> JSON:
    body, project = dict(call.body), call.query.get("project", "")
    name = body.get("name", "")
    if not BUCKET.fullmatch(name) or (len(name) > 63 and "." not in name):
        raise invalid(f"Invalid bucket name: '{name}'")
    if not project:
        raise invalid("Required parameter: project")
    check_labels(body.get("labels", {}))
    if call.cloud.store.get("bucket", name):
        raise GoogleError("ALREADY_EXISTS", "Your previous request to create the named bucket succeeded.")
    time = now()
    location = body.get("location", "US").upper()
    bucket = _with_defaults(
        {
            **body,
            "kind": "storage#bucket",
            "id": name,
            "selfLink": f"https://www.googleapis.com/storage/v1/b/{name}",
            "projectNumber": project_number(project),
            "generation": str(random.randrange(10**15, 10**16)),
            "metageneration": "1",
            "location": location,
            "locationType": "region" if "-" in location else "multi-region",
            "storageClass": body.get("storageClass", "STANDARD"),
            "timeCreated": time,
            "updated": time,
        }
    )
    with call.cloud.store.transaction():
        call.cloud.store.put("bucket", name, {**bucket, "etag": "CAE="})
    return _bucket(call, name)


async def get_bucket(call: Call) -> JSON:
    return _bucket(call, _parts(call)[0])


async def list_buckets(call: Call) -> JSON:
    number, prefix = project_number(call.query.get("project", "")), call.query.get("prefix", "")
    found = [b for _, b in call.cloud.store.list("bucket", prefix) if b["projectNumber"] == number]
    return {"kind": "storage#buckets", **({"items": found} if found else {})}


def _merged(old: Any, change: Any) -> Any:
    """JSON merge patch, RFC 7396: null removes."""
    if not isinstance(change, dict):
        return change
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


async def patch_bucket(call: Call) -> JSON:
    name = _parts(call)[0]
    bucket = _bucket(call, name)
    _conditions(call, bucket)
    change = json.loads(call.raw or b"{}")
    read_request(call.method, list(call.query), change)  # raises for what has no place in it
    bucket = _with_defaults(_merged(bucket, {k: v for k, v in change.items() if k not in ("name", "id")}))
    check_labels(bucket.get("labels", {}))
    bucket["metageneration"] = str(int(bucket["metageneration"]) + 1)
    bucket["updated"] = now()
    bucket["etag"] = base64.b64encode(bucket["metageneration"].encode()).decode()
    with call.cloud.store.transaction():
        call.cloud.store.put("bucket", name, bucket)
    return bucket


async def delete_bucket(call: Call) -> Response:
    name = _parts(call)[0]
    _conditions(call, _bucket(call, name))
    if call.cloud.store.list("object", f"{name}/"):
        raise GoogleError("ABORTED", "The bucket you tried to delete is not empty.")  # 409 conflict
    with call.cloud.store.transaction():
        call.cloud.store.delete("bucket", name)
        call.cloud.store.delete("policy", _resource(name))
    return Response(status_code=204)


async def get_policy(call: Call) -> JSON:
    name = _parts(call)[0]
    bucket = _bucket(call, name)
    held = policy(call.cloud, _resource(name), _born_with(bucket))
    return {"kind": "storage#policy", "resourceId": _resource(name), **held}


async def put_policy(call: Call) -> JSON:
    name = _parts(call)[0]
    bucket = _bucket(call, name)
    members = {m for b in call.body.get("bindings", []) for m in b.get("members", [])}
    if members & PUBLIC and bucket["iamConfiguration"]["publicAccessPrevention"] == "enforced":
        raise GoogleError(
            "FAILED_PRECONDITION",
            "The member bindings allUsers and allAuthenticatedUsers are not allowed since public access prevention "
            "is enforced.",
            http=412,
        )
    held = set_policy(call.cloud, _resource(name), call.body, _born_with(bucket))
    return {"kind": "storage#policy", "resourceId": _resource(name), **held}


async def test_permissions(call: Call) -> JSON:
    _bucket(call, _parts(call)[0])
    asked = call.request.query_params.getlist("permissions")
    return {"kind": "storage#testIamPermissionsResponse", "permissions": asked}


# ------------------------------------------------------------------------------------------- objects


def _file(call: Call, key: str) -> Path:
    return call.cloud.settings.state / "objects" / key


def _key(bucket: str, name: str, generation: str) -> str:
    return f"{bucket}/{name}\n{generation}"  # a name has no line feed


def _object(call: Call, bucket: str, name: str) -> JSON:
    """The generation that is asked for, else the live one. Raises NOT_FOUND."""
    wanted = call.query.get("generation")
    for _, found in call.cloud.store.list("object", f"{bucket}/{name}\n"):
        if found["generation"] == wanted or (not wanted and "timeDeleted" not in found):
            return found
    raise not_found(f"No such object: {bucket}/{name}")


def _shown(item: JSON) -> JSON:
    return {k: v for k, v in item.items() if k != "file"}


def _retire(call: Call, bucket: JSON, item: JSON) -> None:
    """A live generation is replaced or deleted: it becomes noncurrent, or goes. Inside a transaction."""
    key = _key(item["bucket"], item["name"], item["generation"])
    if bucket.get("versioning", {}).get("enabled"):
        call.cloud.store.put("object", key, {**item, "timeDeleted": now()})
    else:
        call.cloud.store.delete("object", key)
        _file(call, item["file"]).unlink(missing_ok=True)


def _save(call: Call, bucket_name: str, metadata: JSON, content: bytes, media: str) -> JSON:
    bucket, name = _bucket(call, bucket_name), metadata.get("name") or call.query.get("name", "")
    if not name or len(name.encode()) > 1024 or "\n" in name or "\r" in name:
        raise invalid(f"Invalid object name: '{name}'")
    live = next(
        (o for _, o in call.cloud.store.list("object", f"{bucket_name}/{name}\n") if "timeDeleted" not in o), None
    )
    _conditions(call, live)
    md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
    if metadata.get("md5Hash", md5) != md5:
        raise invalid(f'Provided MD5 hash "{metadata["md5Hash"]}" doesn\'t match calculated MD5 hash "{md5}".')
    generation, time = str(random.randrange(10**15, 10**16)), now()
    item = {
        **{k: v for k, v in metadata.items() if k in ("metadata", "cacheControl", "contentEncoding")},
        "kind": "storage#object",
        "id": f"{bucket_name}/{name}/{generation}",
        "name": name,
        "bucket": bucket_name,
        "generation": generation,
        "metageneration": "1",
        "contentType": metadata.get("contentType") or media,
        "storageClass": bucket["storageClass"],
        "size": str(len(content)),
        "md5Hash": md5,
        "crc32c": base64.b64encode(_crc32c(content).to_bytes(4)).decode(),
        "etag": "C" + md5[:10],
        "timeCreated": time,
        "updated": time,
        "file": f"{random.getrandbits(128):032x}",
    }
    path = _file(call, item["file"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with call.cloud.store.transaction():
        if live:
            _retire(call, bucket, live)
        call.cloud.store.put("object", _key(bucket_name, name, generation), item)
    return _shown(item)


def _crc32c(content: bytes) -> int:
    import google_crc32c  # what Google's own client computes it with

    return int(google_crc32c.value(content))


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


async def insert_object(call: Call) -> Any:
    bucket, kind = _parts(call)[0], call.query.get("uploadType", "media")
    if upload := call.query.get("upload_id"):
        return _resume(call, bucket, upload)
    _bucket(call, bucket)
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
    path = _file(call, upload)
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


async def get_object(call: Call) -> Any:
    bucket, name = _parts(call)
    _bucket(call, bucket)
    item = _object(call, bucket, name)
    _conditions(call, item)
    if call.query.get("alt") != "media":
        return _shown(item)
    content, status = _file(call, item["file"]).read_bytes(), 200
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


async def list_objects(call: Call) -> JSON:
    """By name and age; `prefix`, `delimiter`, `versions` and pages as Google has them."""
    bucket, query = _parts(call)[0], call.query
    _bucket(call, bucket)
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
    start, size = int(query.get("pageToken") or 0), int(query.get("maxResults") or 1000)
    answer: JSON = {"kind": "storage#objects"}
    if shown := items[start : start + size]:
        answer["items"] = shown
    if prefixes and not start:
        answer["prefixes"] = sorted(prefixes)
    if start + size < len(items):
        answer["nextPageToken"] = str(start + size)
    return answer


async def delete_object(call: Call) -> Response:
    bucket_name, name = _parts(call)
    bucket, item = _bucket(call, bucket_name), _object(call, bucket_name, name)
    _conditions(call, item)
    with call.cloud.store.transaction():
        if "generation" in call.query:  # for good
            call.cloud.store.delete("object", _key(bucket_name, name, item["generation"]))
            _file(call, item["file"]).unlink(missing_ok=True)
        else:
            _retire(call, bucket, item)
    return Response(status_code=204)


RAW = {"storage.objects.insert", "storage.objects.get", "storage.buckets.patch"}
METHODS: dict[str, Any] = {
    "storage.buckets.insert": insert_bucket,
    "storage.buckets.get": get_bucket,
    "storage.buckets.list": list_buckets,
    "storage.buckets.patch": patch_bucket,
    "storage.buckets.delete": delete_bucket,
    "storage.buckets.getIamPolicy": get_policy,
    "storage.buckets.setIamPolicy": put_policy,
    "storage.buckets.testIamPermissions": test_permissions,
    "storage.objects.insert": insert_object,
    "storage.objects.get": get_object,
    "storage.objects.list": list_objects,
    "storage.objects.delete": delete_object,
}
