"""Cloud Storage and the metadata server, as far as serving/storage.py uses them, with possible faults."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeStorage:
    """Objects by "bucket/name", listed in pages of page_size.

    asked: paths with the Authorization header of each request, in order. status: answered instead of anything else.
    headers: added to what an object is answered with. cut: bytes after which an object's answer breaks off. token: what
    the metadata server gives out, valid for token_seconds.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    page_size: int = 1000
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    token: str = "secret"
    token_seconds: int = 3600

    def __enter__(self) -> FakeStorage:
        storage = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                storage.asked.append((self.path, self.headers["Authorization"]))
                status, headers, content = storage.answer(urllib.parse.urlsplit(self.path), self.headers)
                self.send_response(status)
                length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(content))}
                for name, value in (length | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: storage.cut if "X-Goog-Hash" in headers else None])

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, url: urllib.parse.SplitResult, headers: Any) -> tuple[int, dict[str, str], bytes]:
        if url.path.startswith("/computeMetadata/"):
            assert headers["Metadata-Flavor"] == "Google"
            token = {"access_token": self.token, "expires_in": self.token_seconds, "token_type": "Bearer"}
            return 200, {}, json.dumps(token).encode()
        if self.status != 200:
            return self.status, self.headers, b""
        _, _, _, _, bucket, _, *name = url.path.split("/")
        query = dict(urllib.parse.parse_qsl(url.query))
        if name:
            assert query == {"alt": "media"}
            content = self.objects.get(f"{bucket}/{urllib.parse.unquote(name[0])}")
            if content is None:
                return 404, {}, b""
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            return 200, {"X-Goog-Hash": f"crc32c=AAAAAA==,md5={md5}", **self.headers}, content
        found = sorted(key.partition("/")[2] for key in self.objects if key.startswith(f"{bucket}/{query['prefix']}"))
        start = int(query.get("pageToken", "0"))
        page: dict[str, Any] = {"items": [{"name": key} for key in found[start : start + self.page_size]]}
        if start + self.page_size < len(found):
            page["nextPageToken"] = str(start + self.page_size)
        return 200, {}, json.dumps(page).encode()
