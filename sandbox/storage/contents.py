"""How objects are kept in the state: a document for each generation, and its content in a file beside the state.

The file is named by a random key.
"""

import base64
import hashlib
import random
from pathlib import Path

from sandbox import clock
from sandbox.errors import invalid, not_found
from sandbox.store import JSON, Store


def content_file(store: Store, key: str) -> Path:
    return store.folder / "objects" / key


def key_of(bucket: str, name: str, generation: str) -> str:
    """The name of a generation's document."""
    return f"{bucket}/{name}\n{generation}"  # a name has no line feed


def find_bucket(store: Store, name: str) -> JSON:
    """The bucket as it is stored. Raises NOT_FOUND."""
    bucket = store.get("bucket", name)
    if not bucket:
        raise not_found("The specified bucket does not exist.")
    return bucket


def live_object(store: Store, bucket: str, name: str) -> JSON | None:
    """The live generation of an object, as it is stored."""
    generations = store.list("object", key_of(bucket, name, ""))
    return next((item for _, item in generations if "timeDeleted" not in item), None)


def retire(store: Store, bucket: JSON, item: JSON) -> None:
    """A live generation is replaced or deleted: it becomes noncurrent, or goes. Inside a transaction."""
    if bucket.get("versioning", {}).get("enabled"):
        key = key_of(item["bucket"], item["name"], item["generation"])
        store.put("object", key, {**item, "timeDeleted": clock.now("milliseconds")})
    else:
        remove(store, item)


def remove(store: Store, item: JSON) -> None:
    """Deletes a generation for good. Inside a transaction."""
    store.delete("object", key_of(item["bucket"], item["name"], item["generation"]))
    content_file(store, item["file"]).unlink(missing_ok=True)


def save(
    store: Store,
    bucket_name: str,
    name: str,
    content: bytes,
    metadata: JSON | None = None,
    media: str = "application/octet-stream",
) -> JSON:
    """Stores the content as a new generation of an object, and returns it as it is stored.

    Raises INVALID_ARGUMENT where `metadata` has another checksum.
    """
    metadata, bucket = metadata or {}, find_bucket(store, bucket_name)
    md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
    if metadata.get("md5Hash", md5) != md5:
        raise invalid(f'Provided MD5 hash "{metadata["md5Hash"]}" doesn\'t match calculated MD5 hash "{md5}".')
    # As on Google, the time in microseconds: so generations sort by age.
    now, generation = clock.now("milliseconds"), str(int(clock.time() * 10**6))
    key = bucket.get("encryption", {}).get("defaultKmsKeyName")
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
        "timeCreated": now,
        "updated": now,
        **({"kmsKeyName": f"{key}/cryptoKeyVersions/1"} if key else {}),
        "file": f"{random.getrandbits(128):032x}",
    }
    path = content_file(store, item["file"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with store.transaction():
        if live := live_object(store, bucket_name, name):
            retire(store, bucket, live)
        store.put("object", key_of(bucket_name, name, generation), item)
    return item


def _crc32c(content: bytes) -> int:
    import google_crc32c  # Google's own client computes it with this package

    return int(google_crc32c.value(content))
