"""The provider on Google's own service: create, predict, update, destroy. Costs money for about an hour of
one machine.

    make live PROJECT=my-project REGION=europe-west4 IMAGE=europe-west4-docker.pkg.dev/…@sha256:…
    python -m tests.live_vertex my-project --image …@sha256:… --instance instance.json

Needs Application Default Credentials with roles/aiplatform.admin, and an image that Vertex AI may read. What it shows
belongs to docs/unverified.md: strike there what was seen, correct what was wrong. Everything it makes is named
`pulumi-vertex-live` and deleted at the end, also after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import google.auth.credentials
from google.api_core.exceptions import NotFound
from google.cloud import aiplatform_v1

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, also under `python -m tests.live_vertex`
from vertex_harness import release, rollout_inputs, version_inputs
from vertex_plugin import ROLLOUT_URN, VERSION_URN, Plugin, Stack

NAME = "pulumi-vertex-live"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project")
    parser.add_argument("--location", default=os.environ.get("REGION") or "europe-west4", help="also from REGION")
    image = os.environ.get("IMAGE")
    parser.add_argument("--image", default=image, required=not image, help="a serving image by digest, also from IMAGE")
    parser.add_argument("--instance", type=Path, help="a file with one instance as JSON; an empty object where absent")
    parser.add_argument("--health-route", default="/ping")
    parser.add_argument("--predict-route", default="/predictions/people")
    parser.add_argument("--machine-type", default="n1-standard-2")
    parser.add_argument("--url", default="", help="another address than Google's: the sandbox, to try this program")
    options = parser.parse_args(arguments)
    Live(options).run()


class Live:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.parent = f"projects/{options.project}/locations/{options.location}"
        self.endpoint = f"{self.parent}/endpoints/{NAME}"
        url = options.url or f"https://{options.location}-aiplatform.googleapis.com"
        given: dict[str, Any] = {"client_options": {"api_endpoint": url}, "transport": "rest"}
        if options.url:
            given["credentials"] = google.auth.credentials.AnonymousCredentials()  # type: ignore[no-untyped-call]
        self.endpoints: Any = aiplatform_v1.EndpointServiceClient(**given)
        self.predictions: Any = aiplatform_v1.PredictionServiceClient(**given)
        self.old, self.new = Stack(VERSION_URN + f"{NAME}-old"), Stack(VERSION_URN + f"{NAME}-new")
        self.rollout = Stack(ROLLOUT_URN + NAME)

    def plugin(self) -> Plugin:
        where = {"project": self.options.project, "location": self.options.location}
        return Plugin(self.options.url, settings=where)

    def step(self, what: str, work: Callable[[], object]) -> None:
        begun = time.monotonic()
        print(f"{what} …", flush=True)
        answer = work()
        print(f"    {time.monotonic() - begun:.0f} s {answer if answer is not None else ''}", flush=True)

    def run(self) -> None:
        try:
            with self.plugin() as plugin:
                self.step("endpoint", self.make_endpoint)
                self.step("first version", lambda: self.old.up(plugin, self.version(aliases=["live"])))
                self.step("no drift of the version", lambda: self.same(plugin, self.old))
                self.step("first rollout", lambda: self.roll_out(plugin, main=self.released(self.old)))
                self.step("no drift of the rollout", lambda: self.same(plugin, self.rollout))
                self.step("predict", self.predict)
                self.step("second version", lambda: self.new.up(plugin, self.version(env={"SECOND": "1"})))
                both = {"main": self.released(self.old, 90), "next": self.released(self.new, 10)}
                self.step("canary at 10 %", lambda: self.roll_out(plugin, **both))
                second = self.version(env={"SECOND": "1"}, aliases=["live"])
                self.step("alias moved", lambda: self.new.up(plugin, second))
                more = self.released(self.new) | {"maxReplicas": 2}
                self.step("promotion", lambda: self.roll_out(plugin, main=more))
                self.step("no drift of the rollout", lambda: self.same(plugin, self.rollout))
                self.step("predict", self.predict)
        finally:
            with self.plugin() as plugin:
                for resource in (self.rollout, self.old, self.new):
                    if resource.id:
                        self.step(f"delete {resource.id.rsplit('/', 1)[-1]}", lambda r=resource: r.delete(plugin))  # type: ignore[misc]
            self.step("delete endpoint", self.delete_endpoint)
        print("All of it went as it should.")

    def version(self, **more: Any) -> dict[str, Any]:
        inputs = version_inputs(NAME, self.options.image, **more)
        return inputs | {"healthRoute": self.options.health_route, "predictRoute": self.options.predict_route}

    def released(self, version: Stack, traffic: int = 100) -> dict[str, Any]:
        return release(version.id, traffic) | {"machineType": self.options.machine_type}

    def roll_out(self, plugin: Plugin, **models: Any) -> str:
        self.rollout.up(plugin, rollout_inputs(self.endpoint, 10, **models))
        there = self.endpoints.get_endpoint(name=self.endpoint)
        return ", ".join(
            f"{d.id}: {d.model}@{d.model_version_id} {there.traffic_split.get(d.id, 0)} %, status {d.status}".replace(
                "\n", " "
            )
            for d in there.deployed_models
        )

    def same(self, plugin: Plugin, resource: Stack) -> None:
        before = (resource.inputs, resource.outputs)
        if resource.refresh(plugin):
            sys.exit(f"A refresh right after found other values:\n{before}\n{(resource.inputs, resource.outputs)}")
        if (ran := resource.up(plugin, resource.inputs)) != "same":
            sys.exit(f"A second run was not empty: {ran}")

    def make_endpoint(self) -> None:
        request = aiplatform_v1.CreateEndpointRequest(
            parent=self.parent, endpoint=aiplatform_v1.Endpoint(display_name=NAME), endpoint_id=NAME
        )
        self.endpoints.create_endpoint(request=request).result(timeout=600)

    def delete_endpoint(self) -> None:
        try:
            self.endpoints.delete_endpoint(name=self.endpoint).result(timeout=600)
        except NotFound:
            return

    def predict(self) -> str:
        given = json.loads(self.options.instance.read_text()) if self.options.instance else {}
        answer = self.predictions.predict(endpoint=self.endpoint, instances=[given])
        return f"from {answer.deployed_model_id}: {str(answer.predictions)[:200]}"


if __name__ == "__main__":
    main()
