"""The provider rolls out real containers: many of a tiny image, and one of the serving image."""

from __future__ import annotations

import base64
import collections
from collections.abc import Iterator
from pathlib import Path

import docker
import httpx
import images
import pytest
from helpers import Load
from vertex_harness import Cloud, plugin, release, rollout_inputs, version_inputs
from vertex_plugin import ROLLOUT_URN, VERSION_URN, CallFailed, Plugin, Stack

from headcount import Client
from sandbox.testing import RunningSandbox

__all__ = ["plugin"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def sandbox(docker_engine: docker.DockerClient) -> Iterator[RunningSandbox]:
    with RunningSandbox(runner="docker") as running:
        yield running
        assert running.violations() == []


@pytest.fixture(scope="module")
def cloud(sandbox: RunningSandbox) -> Cloud:
    return Cloud.of(sandbox)


def version(plugin: Plugin, name: str, model: str, tiny_image: str, **more: object) -> Stack:
    made = Stack(f"{VERSION_URN}{name}")
    made.up(plugin, version_inputs(model, tiny_image, **more))
    return made


def test_a_rollout_under_load_loses_no_request_and_a_canary_gets_its_share(
    sandbox: RunningSandbox, cloud: Cloud, plugin: Plugin, tiny_image: str
) -> None:
    endpoint = cloud.endpoint("shares")
    old = version(plugin, "shares-old", "shares", tiny_image)
    new = version(plugin, "shares-new", "shares", tiny_image, env={"TINY_SECONDS": "1"})
    rollout = Stack(f"{ROLLOUT_URN}shares")
    rollout.up(plugin, rollout_inputs(endpoint, main=release(old.id)))
    url = f"{sandbox.url}/v1/{endpoint}:predict"
    with httpx.Client() as client:

        def asked(times: int) -> collections.Counter[str]:
            """The number of answers of each version."""
            by = {id_: model for id_, (model, _) in cloud.deployed(endpoint).items()}
            answers = [client.post(url, json={"instances": [1]}, timeout=30) for _ in range(times)]
            return collections.Counter(by[answer.raise_for_status().json()["deployedModelId"]] for answer in answers)

        rollout.up(plugin, rollout_inputs(endpoint, main=release(old.id, 90), next=release(new.id, 10)))
        share = asked(500)
        assert 25 <= share["shares@2"] <= 75, share  # five standard deviations of 500 requests at 10 %
        with Load(url, {"instances": [1]}) as load:
            newest = version(plugin, "shares-newest", "shares", tiny_image, env={"TINY_SECONDS": "1", "NEWEST": "1"})
            rollout.up(plugin, rollout_inputs(endpoint, drain=1, main=release(newest.id)))
        assert {status for status, _ in load.answers} == {200}, load.answers
        assert load.answers.total() > 50
        assert set(asked(20)) == {"shares@3"}
    rollout.delete(plugin)
    cloud.check_history(endpoint)


def test_a_broken_image_says_why_and_traffic_never_left_the_old_one(
    cloud: Cloud, plugin: Plugin, tiny_image: str
) -> None:
    endpoint = cloud.endpoint("broken")
    good = version(plugin, "broken-good", "broken", tiny_image)
    bad = version(plugin, "broken-bad", "broken", tiny_image, env={"TINY_EXIT": "1"})
    rollout = Stack(f"{ROLLOUT_URN}broken")
    rollout.up(plugin, rollout_inputs(endpoint, main=release(good.id)))
    with pytest.raises(CallFailed, match=r"(?s)no weights"):
        rollout.up(plugin, rollout_inputs(endpoint, main=release(bad.id)))
    assert cloud.traffic(endpoint) == {"broken@1": 100}
    assert len(cloud.deployed(endpoint)) == 1, "what failed is undeployed again"
    cloud.check_history(endpoint)
    rollout.delete(plugin)


def test_the_serving_image_counts_four_through_the_endpoint(
    sandbox: RunningSandbox,
    cloud: Cloud,
    plugin: Plugin,
    serving_image: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = cloud.endpoint("people")
    made = Stack(f"{VERSION_URN}people")
    rollout = Stack(f"{ROLLOUT_URN}people")
    with images.named_by_digest(serving_image) as image:
        made.up(plugin, version_inputs("people", image, predictRoute="/predictions/people"))
        rollout.up(plugin, rollout_inputs(endpoint, main=release(made.id)))
    try:
        picture = base64.b64encode((data / "people" / "bus.jpg").read_bytes()).decode()
        body = {"instances": [{"image": {"b64": picture}}], "parameters": {"confidence": 0.25}}
        answer = httpx.post(f"{sandbox.url}/v1/{endpoint}:predict", json=body, timeout=60)
        assert answer.raise_for_status().json()["predictions"][0]["count"] == 4
        # As `headcount count --stack` does, once Pulumi has told it where; the second time it must send it smaller.
        for room in (1_500_000, len(picture)):
            known = {"url": f"{sandbox.url}/v1/{endpoint}", "maxRequestBytes": room}
            monkeypatch.setattr("headcount.endpoint.outputs", lambda stack, known=known: known)
            with Client(stack="local") as client:
                counted = client.count(data / "people" / "bus.jpg")
            assert (counted.count, counted.width, counted.height) == (4, 810, 1080)
            assert bool(counted.note) == (room == len(picture))
    finally:
        rollout.delete(plugin)
        made.delete(plugin)
