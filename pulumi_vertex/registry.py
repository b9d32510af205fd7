"""Docker registries over HTTP: whether a repository has an image, its tags, and copies between repositories.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from .access import Access, is_loopback
from .definition import VERSION
from .engine_call import EngineCall
from .errors import PassingError, ProblemError, RefusedError
from .network import REQUEST_SECONDS, translated
from .retries import repeated

T = TypeVar("T")

# https://cloud.google.com/artifact-registry/docs/docker/authentication#token
USER: Final = "oauth2accesstoken"
# The only hosts that are shown an access token, besides those of this machine.
GOOGLE_HOSTS: Final = re.compile(r"[a-z0-9-]+-docker\.pkg\.dev|([a-z]+\.)?gcr\.io")
MEDIA_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
MANIFEST_BYTES: Final = 4 * 2**20  # what registries have to accept, by the specification
CHUNK_BYTES: Final = 2**20
READER, WRITER, CLEANER = (f"roles/artifactregistry.{role}" for role in ("reader", "writer", "repoAdmin"))


@dataclass(frozen=True)
class Repository:
    """A place for the versions of one image, such as europe-west4-docker.pkg.dev/my-project/images/digits."""

    host: str
    name: str

    @classmethod
    def of(cls, path: str) -> Repository:
        host, _, name = path.partition("/")
        return cls(host, name)

    @property
    def url(self) -> str:
        scheme = "http" if is_loopback(f"http://{self.host}") else "https"
        return f"{scheme}://{self.host}/v2/{self.name}"

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"


@dataclass(frozen=True)
class Manifest:
    """The description of an image, or of several in an index, byte by byte as a registry has it."""

    media_type: str
    content: bytes

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    @property
    def manifests(self) -> list[str]:
        """Digests of the manifests that an index lists."""
        return [one["digest"] for one in json.loads(self.content).get("manifests", [])]

    @property
    def blobs(self) -> list[Blob]:
        """The configuration and the layers, without those that are kept elsewhere (`urls`)."""
        found = json.loads(self.content)
        described = [*([found["config"]] if "config" in found else []), *found.get("layers", [])]
        return [Blob(one["digest"], int(one["size"])) for one in described if not one.get("urls")]


@dataclass(frozen=True)
class Blob:
    digest: str
    size: int


@dataclass
class RegistryClient:
    """Requests to registries. A digest that does not fit its content, or another length, is an error.

    Raises RefusedError, or PassingError where a fault has not passed in about a minute.
    """

    access: Access
    _authorization: dict[tuple[str, ...], str] = field(default_factory=dict)  # by host and scopes

    def digest(self, call: EngineCall, repository: Repository, reference: str) -> str:
        """The digest of a tag, or of a digest itself; "" where the repository does not have it."""
        found = self.manifest(call, repository, reference)
        return found.digest if found else ""

    def manifest(self, call: EngineCall, repository: Repository, reference: str) -> Manifest | None:
        """The manifest of a tag or digest; None where the repository does not have it."""

        def once() -> Manifest | None:
            headers = {"Accept": ", ".join(MEDIA_TYPES)}
            url = f"{repository.url}/manifests/{reference}"
            try:
                answer = self._ask(repository, "GET", url, headers=headers, stream=True)
            except RefusedError as error:
                if error.status == "NOT_FOUND":
                    return None
                raise
            content = b""
            with answer:
                for chunk in answer.iter_content(CHUNK_BYTES):
                    content += chunk
                    if len(content) > MANIFEST_BYTES:
                        raise ProblemError(f"The manifest {reference} in {repository} has more than 4 MiB.")
            media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            found = Manifest(media_type, content)
            if reference.startswith("sha256:") and found.digest != reference:
                raise ProblemError(f"{repository} answers another manifest for {reference}, {found.digest}.")
            if media_type not in MEDIA_TYPES:
                raise ProblemError(f"{reference} in {repository} is no image that can be copied, but {media_type}.")
            return found

        return self._repeated(call, repository, once)

    def tags(self, call: EngineCall, repository: Repository) -> list[str]:
        """All tags of a repository; none where there is no such repository."""
        found: list[str] = []
        url = f"{repository.url}/tags/list?n=1000"
        while url:
            try:
                answer = self._repeated(call, repository, lambda url=url: self._ask(repository, "GET", url))  # type: ignore[misc]
            except RefusedError as error:
                if error.status == "NOT_FOUND":
                    return found
                raise
            found += answer.json().get("tags") or []
            url = urljoin(url, answer.links["next"]["url"]) if "next" in answer.links else ""
        return found

    def tag(self, call: EngineCall, repository: Repository, digest: str, tag: str) -> None:
        """Lets a tag point at a digest that the repository has."""
        manifest = self.manifest(call, repository, digest)
        if manifest is None:
            raise ProblemError(f"The image {digest} is no longer in {repository}. Run `pulumi up` again.")
        self._put(call, repository, tag, manifest)

    def untag(self, call: EngineCall, repository: Repository, tag: str) -> None:
        """Removes a tag, and not the image. It is no error that it is gone already, or stays where none can be removed.

        https://github.com/opencontainers/distribution-spec/blob/main/spec.md#deleting-tags
        """
        url = f"{repository.url}/manifests/{tag}"
        try:
            self._repeated(call, repository, lambda: self._ask(repository, "DELETE", url, role=CLEANER))
        except RefusedError as error:
            if error.status not in ("NOT_FOUND", "UNSUPPORTED"):
                raise

    def copy(self, call: EngineCall, source: Repository, target: Repository, digest: str) -> None:
        """Copies an image with everything below it. Manifests come last, so that one that is there is complete."""
        manifest = self.manifest(call, source, digest)
        if manifest is None:
            raise ProblemError(f"{source} has an image of which a part is missing: {digest}. Push it there again.")
        for part in manifest.manifests:
            if not self.digest(call, target, part):
                self.copy(call, source, target, part)
        blobs = manifest.blobs
        for number, blob in enumerate(blobs, 1):
            call.say(f"copying {number} of {len(blobs)} from {source} ({blob.size / 1e6:.0f} MB)")
            self._repeated(call, target, lambda blob=blob: self._copy_blob(call, source, target, blob))  # type: ignore[misc]
        self._put(call, target, digest, manifest)

    def _put(self, call: EngineCall, repository: Repository, reference: str, manifest: Manifest) -> None:
        url, headers = f"{repository.url}/manifests/{reference}", {"Content-Type": manifest.media_type}
        self._repeated(
            call, repository, lambda: self._ask(repository, "PUT", url, headers=headers, data=manifest.content)
        )

    def _copy_blob(self, call: EngineCall, source: Repository, target: Repository, blob: Blob) -> None:
        """Mounts a blob where both repositories are of one registry, and sends its bytes where that is not done."""
        try:
            self._ask(target, "HEAD", f"{target.url}/blobs/{blob.digest}")
            return
        except RefusedError as error:
            if error.status != "NOT_FOUND":
                raise
        mount = {"mount": blob.digest, "from": source.name} if source.host == target.host else {}
        start = f"{target.url}/blobs/uploads/" + (f"?{urlencode(mount)}" if mount else "")
        began = self._ask(target, "POST", start, mounts=source if mount else None)
        if began.status_code == 201:
            return
        place = urljoin(start, began.headers["Location"])
        with self._ask(source, "GET", f"{source.url}/blobs/{blob.digest}", stream=True) as content:
            sent = self._ask(target, "PATCH", place, data=Checked(content, blob, call), headers=OCTETS)
        place = urljoin(place, sent.headers.get("Location", place))
        self._ask(target, "PUT", f"{place}{'&' if '?' in place else '?'}{urlencode({'digest': blob.digest})}")

    # -- requests

    def _repeated(self, call: EngineCall, repository: Repository, send: Callable[[], T]) -> T:
        return repeated(call, lambda: translated(f"The registry {repository.host} cannot be reached", send))

    def _ask(
        self,
        repository: Repository,
        http: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        data: Any = None,
        stream: bool = False,
        role: str = "",
        mounts: Repository | None = None,
    ) -> Any:
        """Sends a request once, or twice where the registry asks for a token. Raises RefusedError, or PassingError."""
        writes = http not in ("GET", "HEAD")
        action = "pull" if not writes and not role else "pull,push" + (",delete" if role else "")
        scopes = [f"repository:{repository.name}:{action}"]
        scopes += [f"repository:{mounts.name}:pull"] if mounts else []
        key = (repository.host, *scopes)
        for last in (False, True):
            # An upload may go on at another host, which authorizes it by its address.
            ours = urlsplit(url).netloc == repository.host
            answer = self._session.request(
                http, url, headers=headers, data=data, stream=stream, timeout=REQUEST_SECONDS,
                auth=_Authorization(self._authorization.get(key, "") if ours else ""),
            )  # fmt: skip
            if answer.status_code != 401 or last:
                break
            self._authorization[key] = self._authorized(repository, answer.headers.get("WWW-Authenticate", ""), scopes)
            if isinstance(data, Checked):
                raise PassingError(f"The registry {repository.host} asked for a new token.")
        if answer.status_code < 400:
            return answer
        with answer:
            raise refusal(answer.status_code, answer.content, repository, role or (WRITER if writes else READER))

    def _authorized(self, repository: Repository, challenge: str, scopes: list[str]) -> str:
        """The Authorization header that a registry's challenge asks for."""
        kind, _, rest = challenge.partition(" ")
        said = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        password = self._password(repository.host)
        basic = "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode() if password else ""
        if kind.lower() == "basic":
            return basic
        realm = said.get("realm", "")
        if kind.lower() != "bearer" or not realm:
            raise ProblemError(f"The registry {repository.host} asks for credentials of an unknown kind: {kind!r}.")
        asked = urlsplit(realm)
        trusted = asked.netloc == repository.host and repository.url.startswith(f"{asked.scheme}://")
        query = [*({"service": said["service"]} if "service" in said else {}).items(), *(("scope", s) for s in scopes)]
        answer = self._session.get(
            realm, params=query, timeout=REQUEST_SECONDS, auth=_Authorization(basic if trusted else "")
        )
        if answer.status_code >= 400:
            raise refusal(answer.status_code, answer.content, repository, READER)
        issued = answer.json()
        return f"Bearer {issued.get('token') or issued['access_token']}"

    def _password(self, host: str) -> str:
        """An access token, where a host may see one; "" else, and without credentials."""
        import google.auth.transport.requests

        if not GOOGLE_HOSTS.fullmatch(host) and not is_loopback(f"http://{host}"):
            return ""
        credentials: Any = self._credentials
        if not credentials.valid:
            credentials.refresh(google.auth.transport.requests.Request(self._session))
        return credentials.token or ""

    @cached_property
    def _credentials(self) -> Any:
        return self.access.authorize()

    @cached_property
    def _session(self) -> Any:
        import requests

        session = requests.Session()
        session.headers["User-Agent"] = f"pulumi-vertex/{VERSION}"
        return session


OCTETS: Final = {"Content-Type": "application/octet-stream"}


class _Authorization:
    """The Authorization header of one request. Without it, requests would look for a password in ~/.netrc."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __call__(self, request: Any) -> Any:
        if self._value:
            request.headers["Authorization"] = self._value
        return request


class Checked:
    """A blob's content on its way from one registry to another, in chunks. Its end is an error if it is not the blob.

    The error comes before the upload is committed.
    """

    def __init__(self, answer: Any, blob: Blob, call: EngineCall) -> None:
        self._answer, self._blob, self._call = answer, blob, call

    def __len__(self) -> int:  # requests sends it as the Content-Length
        return self._blob.size

    def __iter__(self) -> Iterator[bytes]:
        sha, left = hashlib.sha256(), self._blob.size
        for chunk in self._answer.iter_content(CHUNK_BYTES):
            self._call.check()
            sha.update(chunk)
            left -= len(chunk)
            if left < 0:
                break
            if left or f"sha256:{sha.hexdigest()}" == self._blob.digest:
                yield chunk
        if left > 0:
            raise PassingError(f"The layer {self._blob.digest} ended {left} bytes too early.")
        if left or f"sha256:{sha.hexdigest()}" != self._blob.digest:
            raise ProblemError(f"The content of the layer {self._blob.digest} does not fit its digest and length.")


def refusal(code: int, content: bytes, repository: Repository, role: str) -> ProblemError:
    """An answer that is an error: `code` is its HTTP status, `role` what allows such a request."""
    try:
        words = "; ".join(str(one.get("message") or one["code"]) for one in json.loads(content)["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy, or of a HEAD
        words = content[:300].decode(errors="replace").strip() or "no explanation"
    if code == 429 or code >= 500:
        return PassingError(f"The registry {repository.host} answered {code}: {words}")
    if code == 404:
        return RefusedError("NOT_FOUND", f"{repository} answered 404: {words}")
    if code == 401:
        return RefusedError(
            "UNAUTHENTICATED",
            f"The registry {repository.host} did not accept the credentials ({words}). "
            "Run `gcloud auth application-default login`.",
        )
    if code == 403:
        return RefusedError(
            "PERMISSION_DENIED",
            f"{repository} is refused ({words}). If it exists, this needs {role} on its repository.",
        )
    return RefusedError("UNSUPPORTED" if code in (400, 405) else "UNKNOWN", f"{repository} answered {code}: {words}")
