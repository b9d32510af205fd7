"""A stub of containers in this process, for tests that need none."""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field

from sandbox.clock import now
from sandbox.runner import Container, ContainerResponse, Launch, Line, UnreachableError


class StubRunner:
    """No container at all: answers at once, for tests of the protocol.

    The container spec's environment sets its behaviour:
    STUB_HEALTH=never  the health route answers 503 for ever
    STUB_HEALTH=exit   the container exits with status 1 as soon as it is started
    STUB_LOG=…         its log lines
    STUB_SECONDS=1.5   seconds until the health route answers 200
    STUB_STATUS=500    status of every prediction, with STUB_LOG as the body
    STUB_COUNT=4       people in every picture
    STUB_BAD=text      instances with this text have an error in place of the prediction
    STUB_CROWD=text    requests with this text that have more than one instance are answered with status 500
    STUB_ECHO=1        every prediction has what was sent

    and that of a job's containers:
    STUB_LOG=…, STUB_ERRORS=…  the lines that it writes to stdout and to stderr
    STUB_SECONDS=1.5           seconds until it ends
    STUB_EXIT=1                its exit status
    STUB_FAILS=2,3             trials of a tuning job that end with status 1
    STUB_METRIC=accuracy       the metric that it reports: the sum of its numeric --name=value arguments
    STUB_OUTPUTS={"best": "1"} texts of the files that a task of a pipeline writes, by the last part of their paths;
                               those of its other outputs fit their types
    """

    def __init__(self, port: int) -> None:
        pass

    async def resolve(self, image: str) -> str:
        return image

    async def fetch(self, image: str) -> None:
        pass

    async def start(self, launch: Launch) -> Container:
        return StubContainer(launch)

    async def find(self, state: str) -> list[Container]:
        return []  # they ended with the process

    async def cpus(self) -> tuple[int, ...]:
        return tuple(range(64))  # so that a test whose job goes on does not keep others waiting

    async def close(self) -> None:
        pass


@dataclass
class StubContainer:
    launch: Launch
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    began: str = field(default_factory=now)
    stopped: bool = False

    @property
    def labels(self) -> dict[str, str]:
        return self.launch.labels

    async def get(self, path: str, port: int, timeout: float) -> int:
        env = self.launch.env
        age = asyncio.get_running_loop().time() - self.started
        bad = env.get("STUB_HEALTH") == "never" or age < float(env.get("STUB_SECONDS", 0))
        return 503 if bad else 200

    async def post(self, path: str, body: bytes, content_type: str, timeout: float) -> ContainerResponse:
        env = self.launch.env
        if self.stopped:
            raise UnreachableError("the stub was stopped")
        if "STUB_STATUS" in env:
            return ContainerResponse(int(env["STUB_STATUS"]), "text/plain", env.get("STUB_LOG", "").encode())
        said = {"deployedModelId": env["AIP_DEPLOYED_MODEL_ID"], "imageUri": self.launch.image} | {
            "count": int(env.get("STUB_COUNT", 4)),
            "people": [],
            "image": {"width": 810, "height": 1080},
            "model": {"name": "stub", "version": "1"},
        }
        try:
            request = json.loads(body)
            instances = list(request["instances"])
        except (ValueError, KeyError, TypeError):
            request, instances = {}, [None]
        if "STUB_CROWD" in env and len(instances) > 1 and env["STUB_CROWD"] in body.decode():
            return ContainerResponse(500, "text/plain", b"too many at once")
        answers = [_predicted(one, request.get("parameters"), env, said) for one in instances]
        return ContainerResponse(200, "application/json", json.dumps({"predictions": answers}).encode())

    async def connect(self, port: int, timeout: float) -> None:
        pass

    async def execute(self, command: list[str], timeout: float) -> int:
        return 0

    async def exit_code(self) -> int | None:
        if not self.launch.port:
            return self._exit_code_of_job()
        return 1 if self.stopped or self.launch.env.get("STUB_HEALTH") == "exit" else None

    async def logs(self, lines: int, *, only_errors: bool = False) -> list[str]:
        return self.launch.env.get("STUB_ERRORS" if only_errors else "STUB_LOG", "").splitlines()[-lines:]

    def _exit_code_of_job(self) -> int | None:
        env = self.launch.env
        age = asyncio.get_running_loop().time() - self.started
        if self.stopped or age < float(env.get("STUB_SECONDS", 0)):
            return 143 if self.stopped else None
        self._write_outputs()
        failing = env.get("CLOUD_ML_TRIAL_ID") in env.get("STUB_FAILS", "").split(",")
        return 1 if failing else int(env.get("STUB_EXIT", 0))

    def _write_outputs(self) -> None:
        texts = json.loads(self.launch.env.get("STUB_OUTPUTS", "{}"))
        for path, text in self.launch.outputs.items():
            file = self.launch.folders["/gcs"] / path.removeprefix("/gcs/")
            if not file.exists() and texts.get(file.name, text) is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(texts.get(file.name, text))

    @property
    def out_of_memory(self) -> bool:
        return self.launch.env.get("STUB_EXIT") == "137"

    async def output(self, since: dict[str, str]) -> list[Line]:
        streams = {"stdout": "STUB_LOG", "stderr": "STUB_ERRORS"}
        lines = [
            Line(self.began, stream, text)
            for stream, variable in streams.items()
            for text in self.launch.env.get(variable, "").splitlines()
        ]
        return [line for line in lines if line.time > since.get(line.stream, "")]

    async def read_file(self, path: str) -> bytes:
        env = self.launch.env
        if "STUB_METRIC" not in env or path != env.get("CLOUD_ML_HP_METRIC_FILE"):
            return b""
        values = [a.partition("=")[2] for a in self.launch.args if a.startswith("--")]
        total = sum(float(v) for v in values if re.fullmatch(r"-?[\d.]+(e-?\d+)?", v))
        line = {"timestamp": time.time(), "trial": env["CLOUD_ML_TRIAL_ID"], env["STUB_METRIC"]: str(total)}
        return json.dumps(line | {"global_step": "1", "checkpoint_path": ""}).encode() + b"\n"

    async def halt(self, grace: float) -> None:
        self.stopped = True

    async def stop(self, grace: float) -> None:
        self.stopped = True


def _predicted(instance: object, parameters: object, env: dict[str, str], said: dict[str, object]) -> dict[str, object]:
    """The stub's prediction for an instance."""
    if "STUB_BAD" in env and env["STUB_BAD"] in json.dumps(instance):
        return {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "this is no picture"}}
    return {**said, "sent": instance, "parameters": parameters} if "STUB_ECHO" in env else said
