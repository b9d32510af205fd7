"""The context of a request: the settings, the state, the running operations and containers, and the call itself."""

from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from sandbox.artifact_registry.registry import RegistryServer
from sandbox.batch_jobs import BatchJobs
from sandbox.discovery import Method
from sandbox.fleet import Fleet
from sandbox.jobs import Jobs
from sandbox.operations import Operations
from sandbox.pipelines.runs import Pipelines
from sandbox.projects import Projects
from sandbox.store import JSON, Store


@dataclass(frozen=True)
class SandboxSettings:
    """The options of `python -m sandbox`; see there."""

    port: int
    state: Path
    fresh: bool = False
    runner: str = "docker"
    admin: bool = False
    validate: bool = False
    hold_after_undeploy: float = 0.0
    operation_seconds: float = 0.0
    service_accounts: tuple[str, ...] = ()
    suppose: frozenset[str] = frozenset()
    idle_seconds: float | None = None
    registry_port: int = 8791
    registry_certificate: Path | None = None
    token_lifetime: float = 3600.0
    api_delay: float | None = None
    account_delay: float = 0.0


@dataclass(frozen=True)
class Cloud:
    settings: SandboxSettings
    store: Store
    projects: Projects
    operations: Operations
    fleet: Fleet
    jobs: Jobs
    pipelines: Pipelines
    batches: BatchJobs
    registry: RegistryServer


@dataclass(frozen=True)
class Call:
    """One request that means a method Google has.

    `name` is the path's resource, without version and verb:
    `projects/p/locations/l/endpoints/e` for a deploy, `projects/p/locations/l/models` for a list.
    """

    cloud: Cloud
    method: Method
    version: str  # v1 or v1beta1
    name: str
    query: dict[str, str]
    body: JSON
    request: Request
    raw: bytes = b""
    # The effect that a fault, ordered through the admin routes, has on the operation that this call starts.
    fault: JSON = field(default_factory=dict)

    @property
    def location(self) -> str:
        """`projects/p/locations/l`."""
        return "/".join(self.name.split("/")[:4])

    @property
    def project(self) -> str:
        """The id of the project in the path, or "" where the path has none."""
        kind, _, rest = self.name.partition("/")
        return rest.partition("/")[0] if kind == "projects" else ""
