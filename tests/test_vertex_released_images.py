"""Released images: the provider as a process, and its registry client, against the reference registry.

The registries are Artifact Registry's of the sandbox, which asks for access tokens, and a plain one; a registry that
lies and fails stands for what these two do not do.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from registry_images import INDEX, MANIFEST, Remote, Repositories, digest_of
from vertex_plugin import CallFailed, Plugin, Stack

from pulumi_vertex import registry as registries
from pulumi_vertex.access import Access
from pulumi_vertex.engine_call import EngineCall
from pulumi_vertex.errors import PassingError, ProblemError
from pulumi_vertex.registry import Repository
from pulumi_vertex.wire import UNKNOWN
from sandbox.artifact_registry.registry import RegistryServer
from sandbox.testing import RunningSandbox

URN = "urn:pulumi:test::people::vertex:index:ReleasedImage::main"
NOWHERE = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def repositories() -> Iterator[Repositories]:
    with RunningSandbox("--registry-port", "0", "--token-lifetime", "3600") as running:
        yield Repositories(running)


@pytest.fixture(scope="module")
def plugin(repositories: Repositories) -> Iterator[Plugin]:
    with Plugin(repositories.sandbox.url, settings={"accessToken": "sandbox"}) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A path in a registry that asks for no password."""
    one = RegistryServer(tmp_path_factory.mktemp("registry"), 0, uuid.uuid4().hex[:12])
    one.start()
    yield Remote(f"{one.address}/plain/people")
    one.remove("")


def released(target: Remote, digest: str, *sources: Remote, tag: str = "release-main") -> dict[str, Any]:
    inputs = {"repository": target.path, "digest": digest, "tag": tag}
    return inputs | ({"sources": [s.path for s in sources]} if sources else {})


def client() -> registries.RegistryClient:
    return registries.RegistryClient(Access("p", "l", "http://127.0.0.1:1", access_token="sandbox"))


def call(seconds: float = 60) -> EngineCall:
    return EngineCall(URN, seconds, threading.Event())


real = pytest.mark.needs("registry")


@real
def test_an_index_is_copied_whole_by_mounts_and_outlives_its_source(
    repositories: Repositories, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = repositories.new(), repositories.new()
    digest = source.index("1")
    monkeypatch.delattr(registries.Checked, "__iter__")  # without it no bytes can be sent
    client().copy(call(), Repository.of(source.path), Repository.of(target.path), digest)
    repositories.delete(source)
    target.check(digest)


@real
def test_between_two_registries_the_bytes_are_sent(repositories: Repositories, plain: Remote, plugin: Plugin) -> None:
    target, digest = repositories.new(), plain.index("1")
    image = Stack(URN)
    assert image.up(plugin, released(target, digest, repositories.new(), plain)) == "create"
    assert image.outputs["image"] == f"{target.path}@{digest}"
    target.check(digest)
    tag = image.outputs["tagName"]
    assert re.fullmatch(r"release-main-[0-9a-f]{8}", tag)
    assert target.tags() == {tag: digest}
    assert image.id == f"{target.path}:{tag}"
    assert f"copied {digest} from {plain.path}" in plugin.lines()
    assert image.up(plugin, image.inputs | released(target, digest, repositories.new(), plain)) == "update"
    assert image.up(plugin, dict(image.inputs)) == "same"
    assert image.refresh(plugin) is False
    assert "sandbox" not in json.dumps([image.inputs, image.outputs]), "no token in the state"


@pytest.mark.needs("registry", "crane")
def test_crane_finds_the_copy_valid(
    repositories: Repositories, plain: Remote, plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    crane = [["crane", *line.split()] for line in (
        f"append --oci-empty-base -f {tmp_path}/layer.tar -t {plain.path}:crane",
        f"digest {plain.path}:crane",
        "validate --remote {}",
    )]  # fmt: skip
    import tarfile

    with tarfile.open(tmp_path / "layer.tar", "w") as archive:
        archive.add(__file__, "file")
    subprocess.run(crane[0], check=True, capture_output=True)
    digest = subprocess.run(crane[1], check=True, capture_output=True, text=True).stdout.strip()
    target = repositories.new()
    Stack(URN).up(plugin, released(target, digest, plain))
    host = target.path.partition("/")[0]
    login = ["crane", "auth", "login", host, "-u", "oauth2accesstoken", "-p", "sandbox"]
    subprocess.run(login, check=True, capture_output=True)
    found = subprocess.run(["crane", "validate", "--remote", f"{target.path}@{digest}"], capture_output=True, text=True)
    assert "PASS" in found.stdout + found.stderr


@real
def test_an_image_that_is_there_is_only_tagged(repositories: Repositories, plugin: Plugin) -> None:
    repositories.need_to_remove_tags()
    target = repositories.new()
    digest = target.index("1")
    dead = Remote("127.0.0.1:1/nobody/people")
    image = Stack(URN)
    image.up(plugin, released(target, digest, dead))
    assert target.tags() == {"1": digest, image.outputs["tagName"]: digest}
    image.delete(plugin)
    assert target.tags() == {"1": digest}


@real
def test_an_image_that_is_nowhere_is_said_with_every_place(repositories: Repositories, plugin: Plugin) -> None:
    target, source = repositories.new(), repositories.new()
    with pytest.raises(CallFailed) as failed:
        Stack(URN).up(plugin, released(target, NOWHERE, source))
    said = str(failed.value)
    assert said.startswith(f"The image {NOWHERE} is in none of {target.path}, {source.path}. Build it again")
    assert "imageSource" in said


@real
def test_a_replacement_keeps_the_tag_that_it_has_made_and_a_killed_create_leaves_none(
    repositories: Repositories, plugin: Plugin
) -> None:
    repositories.need_to_remove_tags()
    target = repositories.new()
    digest = target.image("1")["digest"]
    inputs = released(target, digest)
    Stack(URN).up(plugin, inputs)  # its state got lost
    image = Stack(URN)
    image.up(plugin, inputs)
    assert set(target.tags()) == {"1", image.outputs["tagName"]}
    assert image.up(plugin, inputs, force=True) == "replace"
    assert set(target.tags()) == {"1", image.outputs["tagName"]}
    assert image.up(plugin, inputs | {"tag": "release-next"}) == "replace"
    assert set(target.tags()) == {"1", image.outputs["tagName"]}
    assert image.outputs["tagName"].startswith("release-next-")
    other = Stack(URN + "2")
    other.up(plugin, inputs | {"tag": "release"})
    assert set(target.tags()) == {"1", image.outputs["tagName"], other.outputs["tagName"]}


@real
def test_another_digest_moves_the_tag(repositories: Repositories, plugin: Plugin) -> None:
    source, target = repositories.new(), repositories.new()
    first, second = source.index("1"), source.index("2")
    image = Stack(URN)
    image.up(plugin, released(target, first, source))
    before = image.id
    assert image.up(plugin, released(target, second, source)) == "update"
    assert (image.id, target.tags()) == (before, {image.outputs["tagName"]: second})
    assert image.outputs["image"] == f"{target.path}@{second}"
    target.check(second)


@real
def test_a_refresh_finds_a_tag_that_was_removed_or_moved(repositories: Repositories, plugin: Plugin) -> None:
    repositories.need_to_remove_tags()
    target = repositories.new()
    digest, other = target.index("1"), target.index("2")
    image, inputs = Stack(URN), released(target, digest)
    image.up(plugin, inputs)
    with target.http as http:
        body = http.get(f"manifests/{other}")
        http.put(f"manifests/{image.outputs['tagName']}", content=body.content, headers={"content-type": INDEX})
    assert image.refresh(plugin) is True
    assert image.inputs["digest"] == other
    assert image.up(plugin, inputs) == "update"
    assert target.tags()[image.outputs["tagName"]] == digest

    target.untag(image.outputs["tagName"])
    assert image.refresh(plugin) is True
    assert image.id == ""
    assert image.up(plugin, inputs) == "create"

    imported = Stack(URN, id=image.id)
    imported.refresh(plugin)
    assert imported.inputs == inputs


@real
def test_what_is_gone_already_is_deleted_without_an_error(repositories: Repositories, plugin: Plugin) -> None:
    target = repositories.new()
    image = Stack(URN)
    image.up(plugin, released(target, target.index("1")))
    state = image.state
    image.delete(plugin)
    image.delete_again(plugin, state)
    repositories.delete(target)
    image.delete_again(plugin, state)
    image.id, image.inputs = state.id, state.inputs
    assert image.refresh(plugin) is True
    assert image.id == ""


@real
def test_an_expired_token_is_said_to_be_one(repositories: Repositories) -> None:
    sandbox, target = repositories.sandbox, repositories.new()
    form = {"grant_type": "refresh_token", "refresh_token": "any"}
    token = httpx.post(f"{sandbox.url}/oauth2/token", data=form, trust_env=False).json()["access_token"]
    digest = target.index("1")
    sandbox.advance(3601)
    with (
        Plugin(sandbox.url, settings={"accessToken": token}) as late,
        pytest.raises(CallFailed, match="did not accept the credentials"),
    ):
        Stack(URN).up(late, released(target, digest))


@real
def test_a_preview_knows_the_image_before_it_is_there(plugin: Plugin) -> None:
    target = Remote("europe-west4-docker.pkg.dev/prod/images/people")
    image = Stack(URN)
    outputs = image.create(plugin, released(target, NOWHERE), preview=True)
    assert outputs["image"] == f"{target.path}@{NOWHERE}"
    assert outputs["tagName"] == UNKNOWN
    unknown = image.create(plugin, released(target, UNKNOWN), preview=True)
    assert unknown["image"] == UNKNOWN


@real
def test_wrong_inputs_are_said_at_a_preview(plugin: Plugin) -> None:
    target = Remote("europe-west4-docker.pkg.dev/prod/images/people")
    wrong = released(Remote(f"{target.path}:1"), "latest", Remote("https://x/y"), tag="-x")
    assert set(Stack(URN).failures(plugin, wrong)) == {"repository", "digest", "tag", "sources[0]"}
    own = Stack(URN).failures(plugin, released(target, NOWHERE, target))
    assert own == {"sources": "has the repository itself. Leave it out."}


# ------------------------------------------------------------------- a registry that lies and fails


class Liar:
    """A registry on loopback with one image, which answers as a test says.

    statuses: what a path answers instead, as often as it stands there; None closes the connection.
    """

    def __init__(self) -> None:
        self.blobs = {digest_of(content): content for content in (b"config", b"layer" * 10)}
        config, layer = self.blobs
        described = [{"digest": d, "size": len(self.blobs[d]), "mediaType": "x"} for d in (config, layer)]
        self.layer = layer
        self.manifest = json.dumps(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
        ).encode()
        self.statuses: dict[str, list[int | None]] = {}
        self.asked: Counter[str] = Counter()
        self.authorizations: set[str | None] = set()
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                what = self.path.split("/")[-2]
                liar.asked[what] += 1
                liar.authorizations.add(self.headers.get("authorization"))
                status, content = 200, liar.manifest
                if what == "blobs":
                    content = liar.blobs[self.path.rpartition("/")[2]]
                if liar.statuses.get(what):
                    ordered = liar.statuses[what].pop(0)
                    if ordered is None:
                        self.close_connection = True
                        return
                    status, content = ordered, json.dumps({"errors": [{"code": "X", "message": "for a test"}]}).encode()
                self.send_response(status)
                self.send_header("content-type", MANIFEST)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.remote = Remote(f"127.0.0.1:{self._server.server_port}/some/people")
        self.repository = Repository.of(self.remote.path)

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def liar() -> Iterator[Liar]:
    one = Liar()
    yield one
    one.close()


@real
def test_faults_that_pass_are_met_again(repositories: Repositories, liar: Liar, plugin: Plugin) -> None:
    liar.statuses = {"manifests": [503, None, 429], "blobs": [500, None]}
    target = repositories.new()
    Stack(URN).up(plugin, released(target, liar.digest, liar.remote))
    target.check(liar.digest)
    assert liar.statuses == {"manifests": [], "blobs": []}


def test_a_fault_that_stays_ends_after_some_tries(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pulumi_vertex.retries.LONGEST_PAUSE", 0.01)
    liar.statuses = {"manifests": [503] * 20}
    with pytest.raises(PassingError, match="answered 503: for a test"):
        client().digest(call(), liar.repository, "1")
    assert liar.asked["manifests"] == 10


@real
@pytest.mark.parametrize("content", [b"LAYER" * 10, b"layer" * 11])
def test_a_layer_that_is_not_what_its_digest_says_never_arrives(
    repositories: Repositories, liar: Liar, content: bytes
) -> None:
    target = repositories.new()
    liar.blobs[liar.layer] = content
    with pytest.raises(ProblemError, match=f"layer {liar.layer} does not fit"):
        client().copy(call(), liar.repository, Repository.of(target.path), liar.digest)
    with target.http as http:
        assert http.head(f"blobs/{liar.layer}").status_code == 404
        assert http.head(f"manifests/{liar.digest}").status_code == 404


@real
def test_a_layer_that_ends_too_early_is_asked_for_again(
    repositories: Repositories, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pulumi_vertex.retries.LONGEST_PAUSE", 0.01)
    liar.blobs[liar.layer] = b"layer" * 9
    with pytest.raises(PassingError):
        client().copy(call(), liar.repository, Repository.of(repositories.new().path), liar.digest)
    assert liar.asked["blobs"] > 10


def test_another_manifest_than_the_one_that_was_asked_for_is_refused(liar: Liar) -> None:
    with pytest.raises(ProblemError, match="answers another manifest"):
        client().manifest(call(), liar.repository, NOWHERE)


@real
def test_a_source_that_may_not_be_read_is_said_with_the_role(liar: Liar, plugin: Plugin) -> None:
    liar.statuses = {"manifests": [404, 403]}
    here, there = liar.remote, Remote(liar.remote.path + "-source")
    with pytest.raises(CallFailed) as failed:
        Stack(URN).up(plugin, released(here, NOWHERE, there))
    said = str(failed.value)
    assert f"is in none of {here.path}, {there.path}" in said
    assert f"{there.path} is refused (for a test)." in said
    assert "roles/artifactregistry.reader" in said


def test_only_google_and_this_machine_are_shown_a_token() -> None:
    for host in ("europe-west4-docker.pkg.dev", "eu.gcr.io", "gcr.io", "127.0.0.1:5000"):
        assert client()._password(host) == "sandbox"
    for host in ("docker.io", "pkg.dev.example.com", "example.com", "evil-docker.pkg.dev.example.com", "xgcr.io"):
        assert client()._password(host) == ""


def test_a_challenge_of_another_host_gets_no_token(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    liar.manifest = json.dumps({"token": "anonymous"}).encode()
    realm = f"http://{liar.remote.path.partition('/')[0]}/v2/token/x"
    found = client()._authorized(Repository.of("gcr.io/p/r"), f'Bearer realm="{realm}",service="s"', ["x"])
    assert (found, liar.authorizations) == ("Bearer anonymous", {None})
