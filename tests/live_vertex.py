"""The provider on Google's own service: create, predict, update, scale to zero, destroy. Costs money for some hours of
one machine, or two.

    make live PROJECT=my-project REGION=europe-west4 IMAGE=europe-west4-docker.pkg.dev/…@sha256:…
    python -m tests.live_vertex my-project --image …@sha256:… --instance instance.json --count 4

Needs Application Default Credentials with roles/aiplatform.admin, and an image that Vertex AI may read; with
--predictor also roles/iam.roleAdmin, with --copy-to also roles/artifactregistry.repoAdmin on that repository. What is
not as expected is said at once and again at the end, and the steps go on. What the run shows belongs to
docs/unverified.md: strike there what was seen, correct what was wrong. Everything that it makes is deleted at the end,
also after a failure or Ctrl-C; what is left in spite of that is named with what it costs. The exit status is 0 only
where all was as expected and nothing is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google.auth
import google.auth.credentials
import google.auth.transport.requests
from google.cloud import aiplatform_v1

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, also under `python -m tests.live_vertex`
from vertex_harness import release, rollout_inputs, version_inputs
from vertex_plugin import ROLLOUT_URN, VERSION_URN, Plugin, Stack

NAME = "pulumi-vertex-live"
COPY_URN = f"urn:pulumi:test::people::vertex:index:ReleasedImage::{NAME}"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
IDLE = {"minReplicas": 0, "maxReplicas": 1, "minScaleupSeconds": 300, "idleScaledownSeconds": 300}
COLD_SECONDS = 3600  # until a model has scaled to zero, and until it is up again


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project")
    parser.add_argument("--location", default=os.environ.get("REGION") or "europe-west4", help="also from REGION")
    image = os.environ.get("IMAGE")
    parser.add_argument("--image", default=image, required=not image, help="a serving image by digest, also from IMAGE")
    parser.add_argument("--instance", type=Path, help="a file with one instance as JSON; an empty object where absent")
    parser.add_argument("--count", type=int, help="the `count` that the prediction of that instance must have")
    parser.add_argument("--predictor", help="a member, such as user:me@example.com, who gets leave to predict")
    parser.add_argument("--copy-to", metavar="PATH", help="an image's path in another repository, to copy the image to")
    parser.add_argument("--health-route", default="/ping")
    parser.add_argument("--predict-route", default="/predictions/people")
    parser.add_argument("--machine-type", default="n1-standard-2")
    parser.add_argument("--url", default="", help="another address than Google's: the sandbox, to try this program")
    options = parser.parse_args(arguments)
    sys.exit(Live(options).run())


class Live:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.parent = f"projects/{options.project}/locations/{options.location}"
        self.id = str(10**8 + int(time.time()) % (9 * 10**8))  # a number, as the program's
        self.endpoint = f"{self.parent}/endpoints/{self.id}"
        self.model = f"{self.parent}/models/{NAME}"
        self.role = f"projects/{options.project}/roles/pulumi_vertex_live_{self.id}"
        self.url = options.url or f"https://{options.location}-aiplatform.googleapis.com"
        self.iam = f"{options.url}/iam" if options.url else "https://iam.googleapis.com"
        credentials: Any = google.auth.credentials.AnonymousCredentials()  # type: ignore[no-untyped-call]
        if not options.url:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        self.http: Any = google.auth.transport.requests.AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
        given: dict[str, Any] = {"credentials": credentials, "transport": "rest"}
        given["client_options"] = {"api_endpoint": self.url}
        self.endpoints: Any = aiplatform_v1.EndpointServiceClient(**given)
        self.models: Any = aiplatform_v1.ModelServiceClient(**given)
        self.old, self.new = Stack(VERSION_URN + f"{NAME}-old"), Stack(VERSION_URN + f"{NAME}-new")
        self.rollout, self.copy = Stack(ROLLOUT_URN + NAME), Stack(COPY_URN)
        self.wrong: list[str] = []  # what was not as expected

    def plugin(self) -> Plugin:
        where = {"project": self.options.project, "location": self.options.location}
        return Plugin(self.options.url, settings=where | ({"accessToken": "sandbox"} if self.options.url else {}))

    def run(self) -> int:
        """The exit status."""
        try:
            with self.plugin() as plugin:
                self.prove(plugin)
        except (Exception, KeyboardInterrupt) as error:
            self.note(f"ended early: {type(error).__name__}: {error}")
        finally:
            left = self.tidy()
        for line in self.wrong:
            print(f"Not as expected: {line}")
        for line in left:
            print(f"LEFT: {line}")
        if not self.wrong and not left:
            print("All of it went as it should, and nothing is left.")
        return bool(self.wrong or left)

    def prove(self, plugin: Plugin) -> None:
        first, second = self.version(aliases=["live"]), self.version(env={"SECOND": "1"})
        self.step("endpoint without a DNS name", self.make_endpoint)
        if self.options.copy_to:
            self.step("image copied", lambda: self.copied(plugin))
        self.step("first version", lambda: self.old.up(plugin, first))
        self.step("alias live", lambda: self.alias(self.old))
        self.step("no drift of the version", lambda: self.same(plugin, self.old))
        with self.unfinished():
            self.step("first rollout", lambda: self.roll_out(plugin, {self.old.id: 100}, main=self.released(self.old)))
        self.step("DNS name", self.dns)
        self.step("no drift of the rollout", lambda: self.same(plugin, self.rollout))
        self.step("predict", self.predict)
        if self.options.predictor:
            self.step("predictor", self.grant)
        self.step("second version", lambda: self.new.up(plugin, second))
        both = {"main": self.released(self.old, 90), "next": self.released(self.new, 10)}
        self.step("canary at 10 %", lambda: self.roll_out(plugin, {self.old.id: 90, self.new.id: 10}, **both))
        self.step("alias moved", lambda: self.new.up(plugin, second | {"aliases": ["live"]}))
        self.step("alias live", lambda: self.alias(self.new))
        more = self.released(self.new) | {"maxReplicas": 2}
        self.step("promotion leaves one model", lambda: self.roll_out(plugin, {self.new.id: 100}, main=more))
        self.step("no drift of the rollout", lambda: self.same(plugin, self.rollout))
        self.step("predict", self.predict)
        idle = self.released(self.new) | IDLE
        self.step("scale to zero declared", lambda: self.roll_out(plugin, {self.new.id: 100}, main=idle))
        self.step("its periods", self.periods)
        self.step("no drift of the rollout", lambda: self.same(plugin, self.rollout))
        self.step("scaled to zero", self.cold)
        self.step("no drift while it is cold", lambda: self.same(plugin, self.rollout))
        self.step("the first request starts it", self.wake)

    # -- what is said

    def step(self, what: str, work: Callable[[], object]) -> None:
        begun = time.monotonic()
        print(f"{what} …", flush=True)
        answer = work()
        print(f"    {time.monotonic() - begun:.0f} s {answer if answer is not None else ''}", flush=True)

    def note(self, wrong: str) -> None:
        print(f"    NOT AS EXPECTED: {wrong}", flush=True)
        self.wrong.append(wrong)

    def expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.note(f"{what}: {found!r}, not {wanted!r}")

    # -- what is done

    def version(self, **more: Any) -> dict[str, Any]:
        inputs = version_inputs(NAME, self.options.image, **more)
        return inputs | {"healthRoute": self.options.health_route, "predictRoute": self.options.predict_route}

    def released(self, version: Stack, traffic: int = 100) -> dict[str, Any]:
        return release(version.id, traffic) | {"machineType": self.options.machine_type}

    def roll_out(self, plugin: Plugin, shares: dict[str, int], **models: Any) -> str:
        """Rolls out, and expects these versions, by their ids, with these shares, and no others."""
        self.rollout.up(plugin, rollout_inputs(self.endpoint, 10, **models))
        there = self.endpoints.get_endpoint(name=self.endpoint)
        found = {
            f"{d.model.rpartition('/')[2].partition('@')[0]}@{d.model_version_id}": there.traffic_split.get(d.id, 0)
            for d in there.deployed_models
        }
        self.expect("models and traffic", found, {id_.rpartition("/")[2]: share for id_, share in shares.items()})
        return ", ".join(f"{name} {share} %" for name, share in found.items())

    def same(self, plugin: Plugin, resource: Stack) -> None:
        before = (resource.inputs, resource.outputs)
        if resource.refresh(plugin):
            self.note(f"a refresh right after found other values: {before}, then {resource.inputs, resource.outputs}")
        self.expect("a second run", resource.up(plugin, resource.inputs), "same")

    def alias(self, version: Stack) -> str:
        found = self.models.get_model(name=f"{self.model}@live")
        self.expect("the version with the alias live", f"{NAME}@{found.version_id}", version.id.rpartition("/")[2])
        return str(found.version_id)

    def make_endpoint(self) -> None:
        wanted = aiplatform_v1.Endpoint(display_name=NAME, dedicated_endpoint_enabled=True)
        request = aiplatform_v1.CreateEndpointRequest(parent=self.parent, endpoint=wanted, endpoint_id=self.id)
        self.endpoints.create_endpoint(request=request).result(timeout=600)
        name = self.endpoints.get_endpoint(name=self.endpoint).dedicated_endpoint_dns
        self.expect("the DNS name before the first deployment", name, "")

    def copied(self, plugin: Plugin) -> str:
        source, _, digest = self.options.image.partition("@")
        inputs = {"repository": self.options.copy_to, "digest": digest, "tag": "release-live", "sources": [source]}
        self.copy.up(plugin, inputs)
        self.same(plugin, self.copy)
        return str(self.copy.outputs["image"])

    @contextlib.contextmanager
    def unfinished(self) -> Any:
        """While the block runs, expects a deployment that only `allDeploymentStates` and the operations show."""
        seen: set[str] = set()
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.1 if self.options.url else 10):
                listed = self.get(f"{self.endpoint}?allDeploymentStates=true").get("deployedModels", [])
                running = [
                    o for o in self.get(f"{self.endpoint}/operations").get("operations", []) if not o.get("done")
                ]
                plain = self.get(self.endpoint).get("deployedModels", [])
                if running and not plain:
                    seen.add("running operation")
                    seen.update(f"state {one['state']}" for one in listed if "state" in one)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        print(f"    while it ran: {', '.join(sorted(seen)) or 'nothing was seen'}")
        self.expect("what was listed of the unfinished deployment", seen, {"running operation", "state BEING_DEPLOYED"})

    def dns(self) -> str:
        there = self.get(self.endpoint)
        found = there.get("dedicatedEndpointDns", "").removeprefix("https://")
        number = there["name"].split("/")[1]
        built = f"{self.id}.{self.options.location}-{number}.prediction.vertexai.goog"
        self.expect("the DNS name", found, self.options.url.removeprefix("http://") or built)
        return str(found)

    def get(self, path: str, version: str = "v1") -> Any:
        return self.done(self.http.get(f"{self.url}/{version}/{path}", timeout=60))

    @staticmethod
    def done(answer: Any) -> Any:
        """The body of a response. Raises RuntimeError with Google's words."""
        if not answer.ok:
            raise RuntimeError(f"{answer.url} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json()

    def ask(self) -> Any:
        """The response to a prediction of the instance, from the endpoint's own address."""
        given = json.loads(self.options.instance.read_text()) if self.options.instance else {}
        host = self.get(self.endpoint).get("dedicatedEndpointDns", "").removeprefix("https://")
        url = f"{self.options.url or f'https://{host}'}/v1/{self.endpoint}:predict"
        return self.http.post(url, json={"instances": [given]}, timeout=300)

    def predict(self) -> str:
        answer = self.ask()
        self.expect("the status of a prediction", answer.status_code, 200)
        predictions = answer.json().get("predictions", [{}])
        if self.options.count is not None:
            self.expect("the count", predictions[0].get("count"), self.options.count)
        return f"from {answer.json().get('deployedModelId')}: {str(predictions)[:200]}"

    def grant(self) -> None:
        """What the program does for `predictors`: a role of its own, granted on the endpoint."""
        role = {"title": NAME, "includedPermissions": ["aiplatform.endpoints.predict"], "stage": "GA"}
        parent, _, role_id = self.role.partition("/roles/")
        self.done(self.http.post(f"{self.iam}/v1/{parent}/roles", json={"roleId": role_id, "role": role}))
        bindings = [{"role": self.role, "members": [self.options.predictor]}]
        path = f"{self.url}/v1beta1/{self.endpoint}"  # v1 has no policies of endpoints
        self.done(self.http.post(f"{path}:setIamPolicy", json={"policy": {"bindings": bindings}}))
        found = self.done(self.http.post(f"{path}:getIamPolicy"))
        self.expect("the endpoint's policy", found.get("bindings"), bindings)

    def periods(self) -> None:
        (there,) = self.get(self.endpoint, "v1beta1")["deployedModels"]
        wanted = {"minScaleupPeriod": "300s", "idleScaledownPeriod": "300s"}
        self.expect("the periods", there["dedicatedResources"].get("scaleToZeroSpec"), wanted)

    def cold(self) -> None:
        def replicas() -> int:
            (there,) = self.get(self.endpoint)["deployedModels"]
            return int(there.get("status", {}).get("availableReplicaCount", 0))

        if not self.until(lambda: replicas() == 0):
            self.note(f"it still runs after {COLD_SECONDS} s without a request")

    def wake(self) -> str:
        begun, cold = time.monotonic(), self.ask()
        self.expect("the status of a prediction by a cold model", cold.status_code, 429)
        if not self.until(lambda: self.ask().status_code == 200):
            self.note(f"it does not answer {COLD_SECONDS} s after the first request")
        return f"{time.monotonic() - begun:.0f} s from the first request to an answer; the first was {cold.text[:200]}"

    def until(self, holds: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + COLD_SECONDS
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1 if self.options.url else 10)
        return True

    # -- the end

    def tidy(self) -> list[str]:
        """Deletes everything, each thing whatever became of the others; what is left."""
        with contextlib.ExitStack() as stack:
            try:
                plugin = stack.enter_context(self.plugin())
                for resource in (self.rollout, self.old, self.new, self.copy):
                    if resource.id or resource.replaced:
                        name = resource.id.rpartition("/")[2]
                        self.attempt(f"delete {name}", lambda resource=resource: resource.delete(plugin))  # type: ignore[misc]
            except Exception as error:
                self.note(f"the provider does not start: {error}")
        # Whatever the provider has left, in the order in which Vertex AI lets go of it.
        for deployed in self.found(self.endpoint).get("deployedModels", []):
            request = {"endpoint": self.endpoint, "deployed_model_id": deployed["id"]}
            self.note(f"{deployed['id']} is still deployed")
            self.attempt(
                "undeploy it",
                lambda request=request: self.endpoints.undeploy_model(request=request).result(timeout=3600),  # type: ignore[misc]
            )
        if self.found(self.model):
            self.note(f"{self.model} is still there")
            self.attempt("delete the model", lambda: self.models.delete_model(name=self.model).result(timeout=600))
        if self.found(self.endpoint):
            self.attempt(
                "delete endpoint", lambda: self.endpoints.delete_endpoint(name=self.endpoint).result(timeout=600)
            )
        if self.granting():
            role = f"{self.iam}/v1/{self.role}"
            self.attempt("delete role", lambda: self.http.delete(role).raise_for_status())
        left = [
            f"{name}, which {costs}"
            for name, costs in (
                (self.endpoint, "costs a machine while models are deployed on it"),
                (self.model, "costs nothing but the image's storage"),
            )
            if self.found(name)
        ]
        return [*left, *([f"{self.role}, which costs nothing"] if self.granting() else [])]

    def granting(self) -> bool:
        """Whether the role is there. A deleted one is shown for some weeks."""
        answer = self.http.get(f"{self.iam}/v1/{self.role}", timeout=60) if self.options.predictor else None
        return answer is not None and answer.ok and not answer.json().get("deleted")

    def found(self, name: str) -> Any:
        """What a name stands for, {} where there is no such thing; the name alone where that cannot be found out."""
        try:
            answer = self.http.get(f"{self.url}/v1/{name}", timeout=60)
        except Exception as error:
            self.note(f"{name} cannot be read: {error}")
            return {"name": name}
        return {} if answer.status_code == 404 else answer.json() if answer.ok else {"name": name}

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        try:
            self.step(what, work)
        except Exception as error:
            self.note(f"{what}: {error}")


if __name__ == "__main__":
    main()
