"""A sandbox that is killed, stopped and started again finds its containers, or removes them."""

import functools
import time
from pathlib import Path

import docker
import pytest
from docker_sandbox import (
    RESIZE_MASK,
    RESIZED,
    answers,
    containers,
    deploy,
    deployment,
    endpoint,
    has_replicas,
    sandbox,
    state,
    tidy,
    undeploy,
    until,
    upload,
)

from sandbox.runner import LABEL
from sandbox.testing import RunningSandbox

pytestmark = pytest.mark.slow
__all__ = ["sandbox", "state", "tidy"]  # fixtures


def test_a_killed_sandbox_finds_its_containers_again(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    upload(sandbox, "slow-start", tiny_image, env={"TINY_SECONDS": "3"})
    kept, going, gone = (endpoint(sandbox, n) for n in ("kept", "going", "gone"))
    deploy(sandbox, kept, 7, replicas=2)
    deploy(sandbox, gone, 7)
    before = {c.id for c in containers(docker_engine, kept)}
    _, operation = sandbox.ask("POST", f"{going}:deployModel", deployment(7, model="slow-start"))
    until(lambda: containers(docker_engine, going))
    pending = {c.id for c in containers(docker_engine, going)}
    sandbox.kill()
    assert sum(len(containers(docker_engine, where)) for where in (kept, going, gone)) == 4, "SIGKILL stops none"
    # One of two is lost meanwhile, and one belongs to nothing.
    containers(docker_engine, kept)[0].remove(force=True)
    labels = {**containers(docker_engine, gone)[0].labels, LABEL + "deployed-model": "99"}
    docker_engine.containers.run(tiny_image, detach=True, environment={"AIP_HTTP_PORT": "8080"}, labels=labels)
    sandbox.start()
    assert "response" in sandbox.done(operation)
    assert {c.id for c in containers(docker_engine, going)} == pending  # picked up, not started twice

    def settled() -> bool:
        now = [len(containers(docker_engine, e)) for e in (kept, going, gone)]
        return now == [2, 1, 1]

    until(settled)
    assert len(before & {c.id for c in containers(docker_engine, kept)}) == 1
    for where in (kept, going, gone):
        until(functools.partial(answers, sandbox, where))
        undeploy(sandbox, where, 7)
        assert containers(docker_engine, where) == []


@pytest.mark.parametrize("moment", [0.05, 0.4, 1.0])
def test_a_kill_amid_a_resize_or_an_undeployment_ends_right(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, moment: float
) -> None:
    where = endpoint(sandbox, f"amid-{moment}".replace(".", "-"))
    deploy(sandbox, where, 7)
    for verb, body, left in (
        ("mutateDeployedModel", {"deployedModel": RESIZED, "updateMask": RESIZE_MASK}, 3),
        ("undeployModel", {"deployedModelId": "7"}, 0),
    ):
        _, operation = sandbox.ask("POST", f"{where}:{verb}", body)
        time.sleep(moment)
        sandbox.kill()
        sandbox.start()
        assert "response" in sandbox.done(operation)
        until(functools.partial(has_replicas, sandbox, docker_engine, where, left))


def test_replicas_that_are_being_brought_back_can_be_undeployed(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient, tiny_image: str
) -> None:
    upload(sandbox, "tardy", tiny_image, env={"TINY_SECONDS": "2"})
    where = endpoint(sandbox, "tardy")
    deploy(sandbox, where, 7, model="tardy")
    sandbox.kill()
    containers(docker_engine, where)[0].remove(force=True)
    sandbox.start()
    until(lambda: containers(docker_engine, where))
    undeploy(sandbox, where, 7)
    time.sleep(2)  # the task that brings replicas back would start another one now
    assert containers(docker_engine, where) == []


def test_a_fresh_start_removes_the_containers_of_before(
    docker_engine: docker.DockerClient, tiny_image: str, tmp_path: Path
) -> None:
    with RunningSandbox(runner="docker", state=tmp_path) as killed:
        upload(killed, "tiny", tiny_image)
        deploy(killed, endpoint(killed, "before"), 7)
        killed.kill()
    assert len(containers(docker_engine, "before")) == 1
    with RunningSandbox("--fresh", runner="docker", state=tmp_path) as fresh:
        assert fresh.do("GET", "endpoints") == {}
        until(lambda: containers(docker_engine, "before") == [])


def test_a_stop_ends_the_containers_and_a_start_brings_them_back(
    sandbox: RunningSandbox, docker_engine: docker.DockerClient
) -> None:
    where = endpoint(sandbox, "restart")
    deploy(sandbox, where, 7)
    sandbox.stop()
    assert containers(docker_engine, where) == []
    sandbox.start()
    until(functools.partial(answers, sandbox, where))
    undeploy(sandbox, where, 7)
