"""The graph of a pipeline job with the states of its tasks, and its drawing as text. Pure: a PipelineJob in, text out.

The tasks come from the compiled pipeline in the job, so that those which have not started are there, too. Their states
come from `jobDetail.taskDetails`, as
https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.pipelineJobs describes them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from headcount.results import printable

STATES: Final = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "CANCEL_PENDING": "cancelling",
    "CANCELLING": "cancelling",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "SKIPPED": "cached",  # Vertex AI's word for a task whose outputs come from the cache
    "NOT_TRIGGERED": "not triggered",
}
ENDED: Final = ("SUCCEEDED", "FAILED", "CANCELLED")  # states of a job


@dataclass(frozen=True)
class Node:
    """A task, a group of tasks, or one iteration of a loop.

    title: the name that the pipeline shows, where that is another one. kind: task, group, loop or iteration.
    state: a value of STATES, "waiting" before a task starts, or "not run".
    layer: 0 for what starts first. after: the names of those beside it for which it waits. condition: when it runs;
    "" for always. job: the custom job that carries it out, and failed_jobs those of its failed attempts, the oldest
    first. started, ended: RFC 3339, or "". error: why it failed.
    """

    name: str
    title: str = ""
    kind: str = "task"
    state: str = "waiting"
    layer: int = 0
    after: tuple[str, ...] = ()
    condition: str = ""
    started: str = ""
    ended: str = ""
    error: str = ""
    job: str = ""
    failed_jobs: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()

    @property
    def jobs(self) -> tuple[str, ...]:
        """All its custom jobs, the oldest first."""
        return (*self.failed_jobs, *([self.job] if self.job else []))


def graph(job: Mapping[str, Any]) -> tuple[Node, ...]:
    """The nodes of a pipeline job, in an order in which they can run."""
    details = [dict(one) for one in job.get("jobDetail", {}).get("taskDetails", [])]
    reader = _Reader(job.get("pipelineSpec") or {}, details, _job_state(job) in ENDED)
    return reader.nodes(reader.spec.get("root", {}).get("dag", {}).get("tasks", {}), reader.top())


def _job_state(job: Mapping[str, Any]) -> str:
    return str(job.get("state", "")).removeprefix("PIPELINE_STATE_")


class _Reader:
    def __init__(self, spec: Mapping[str, Any], details: Sequence[dict[str, Any]], ended: bool) -> None:
        self.spec, self.ended = spec, ended
        ids = {one.get("taskId") for one in details}
        self.below: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in sorted(details, key=lambda one: str(one.get("createTime", ""))):
            parent = one.get("parentTaskId")
            self.below[str(parent) if parent in ids else ""].append(one)

    def top(self) -> list[dict[str, Any]]:
        """The details of the root's tasks. The run itself has one too, of which they are children."""
        known = self.spec.get("root", {}).get("dag", {}).get("tasks", {})
        found = []
        for one in self.below[""]:
            inner = self.below[str(one.get("taskId"))]
            found += inner if inner and known and _match(one, known) is None else [one]
        return found

    def nodes(self, tasks: Mapping[str, Any], details: Sequence[dict[str, Any]]) -> tuple[Node, ...]:
        if not tasks:  # the job does not have its specification
            return tuple(self.node(str(one.get("taskName", "")), {}, one, 0, ()) for one in details)
        after = {name: _after(task, tasks) for name, task in tasks.items()}
        layers = _layers(after)
        found = {key: one for one in details if (key := _match(one, tasks)) is not None}
        order = sorted(tasks, key=lambda name: layers[name])  # stable, hence in the template's order within a layer
        return tuple(self.node(name, tasks[name], found.get(name, {}), layers[name], after[name]) for name in order)

    def node(
        self, name: str, task: Mapping[str, Any], detail: Mapping[str, Any], layer: int, after: tuple[str, ...]
    ) -> Node:
        component = self.spec.get("components", {}).get(task.get("componentRef", {}).get("name"), {})
        inner = component.get("dag", {}).get("tasks", {})
        loop = "parameterIterator" in task or "artifactIterator" in task
        below = self.below[str(detail.get("taskId"))] if detail else []
        nodes = self.iterations(inner, below) if loop else self.nodes(inner, below) if inner or below else ()
        policy, executor = task.get("triggerPolicy", {}), detail.get("executorDetail", {})
        container = executor.get("containerDetail", {}) or executor.get("customJobDetail", {})
        title = str(task.get("taskInfo", {}).get("name", ""))
        condition = _condition(str(policy.get("condition", "")))
        if policy.get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
            condition = "whatever becomes of it"
        return Node(
            name,
            title if title != name else "",
            "loop" if loop else "group" if inner or below else "task",
            self.state(detail),
            layer,
            after,
            condition,
            str(detail.get("startTime", "")),
            str(detail.get("endTime", "")),
            str(detail.get("error", {}).get("message", "")),
            str(container.get("mainJob") or container.get("job") or ""),
            tuple(container.get("failedMainJobs") or container.get("failedJobs") or ()),
            nodes,
        )

    def state(self, detail: Mapping[str, Any]) -> str:
        if detail:
            return STATES.get(str(detail.get("state", "")), "pending")
        return "not run" if self.ended else "waiting"

    def iterations(self, tasks: Mapping[str, Any], details: Sequence[dict[str, Any]]) -> tuple[Node, ...]:
        """The iterations of a loop, or its tasks before the first one starts.

        An iteration either is a child of the loop with the tasks as children of its own, or the loop's children are the
        tasks, each as often as there are iterations.
        """
        if not details:
            return self.nodes(tasks, ())
        rounds: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = []
        seen: defaultdict[str, int] = defaultdict(int)
        for one in details:
            if (key := _match(one, tasks)) is None:
                rounds.append((one, self.below[str(one.get("taskId"))]))
                continue
            if seen[key] == len(rounds):
                rounds.append(({}, []))
            rounds[seen[key]][1].append(one)
            seen[key] += 1
        found = []
        for number, (own, inner) in enumerate(rounds):
            nodes = self.nodes(tasks, inner)
            state = self.state(own) if own else _together(nodes)
            started = min((n.started for n in nodes if n.started), default="")
            ended = max((n.ended for n in nodes), default="") if all(n.ended for n in nodes) else ""
            error = str(own.get("error", {}).get("message", ""))
            found.append(Node(f"[{number}]", "", "iteration", state, 0, (), "", started, ended, error, nodes=nodes))
        return tuple(found)


def _match(detail: Mapping[str, Any], tasks: Mapping[str, Any]) -> str | None:
    """The key of the task that a detail is of: its name is the key, or the task's display name."""
    name = detail.get("taskName")
    if name in tasks:
        return str(name)
    return next((key for key, task in tasks.items() if task.get("taskInfo", {}).get("name") == name), None)


def _together(nodes: Sequence[Node]) -> str:
    states = {node.state for node in nodes}
    for state in ("failed", "cancelled", "cancelling", "running", "pending"):
        if state in states:
            return state
    if "waiting" in states:
        return "running" if states - {"waiting"} else "waiting"
    return "cached" if states == {"cached"} else "succeeded"


def _after(task: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks for which one waits: those that it names, and those whose outputs it takes."""
    inputs = task.get("inputs", {})
    taken = [
        one[kind].get("producerTask")
        for one in (*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values())
        for kind in ("taskOutputParameter", "taskOutputArtifact", "taskFinalStatus")
        if kind in one
    ]
    return tuple(sorted(name for name in {*task.get("dependentTasks", []), *taken} if name in beside))


def _layers(after: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The layer of each task: one more than the highest of those for which it waits."""
    layers: dict[str, int] = {}
    while len(layers) < len(after):
        ready = [name for name in after if name not in layers and all(one in layers for one in after[name])]
        for name in ready or after:  # a circle, which no compiler writes, ends here
            layers.setdefault(name, 1 + max((layers.get(one, -1) for one in after[name]), default=-1))
    return layers


def _condition(text: str) -> str:
    """A condition as a reader would write it, from KFP's expression."""
    if not text:
        return ""
    text = re.sub(r"inputs\.parameter_values\['(?:pipelinechannel--)?([^']*)'\]", r"\1", text)
    return "if " + re.sub(r"\b(int|double|string)\(([\w.-]+)\)", r"\2", text)


def flat(nodes: Sequence[Node], path: str = "") -> Iterator[tuple[str, Node]]:
    """Each node with its path, such as `for-loop-1[0].train`, parents before their children."""
    for node in nodes:
        own = path + node.name if node.kind == "iteration" else f"{path}.{node.name}" if path else node.name
        yield own, node
        yield from flat(node.nodes, own)


# --- drawing --------------------------------------------------------------------------------------------------


def text(job: Mapping[str, Any], now: datetime | None = None) -> str:
    """The job in a line, and a table of its tasks: nested ones indented, errors below their task."""
    now = now or datetime.now(UTC)
    found = graph(job)
    error = str(job.get("error", {}).get("message", ""))
    lines = [headline(job, now), *([f"error: {printable(error)}"] if error else [])]
    rows = list(_rows(found, now, 0))
    if rows:
        header = ("TASK", "STATE", "STARTED", "TOOK", "AFTER", "")
        widths = [max(map(len, column)) for column in zip(header, *(row for row, _ in rows), strict=True)]
        lines += ["", _line(header, widths)]
        for row, said in rows:
            indent = " " * (len(row[0]) - len(row[0].lstrip()) + 2)
            lines += [_line(row, widths), *(f"{indent}! {line}" for line in said)]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def headline(job: Mapping[str, Any], now: datetime) -> str:
    """Its name, state and duration."""
    started = str(job.get("startTime") or job.get("createTime", ""))
    name = str(job.get("name", "")).rpartition("/")[2]
    parts = [name, _job_state(job).lower() or "unknown", f"started {clock(started, date=True)}" if started else ""]
    return printable(", ".join(part for part in [*parts, took(started, str(job.get("endTime", "")), now)] if part))


def _rows(nodes: Sequence[Node], now: datetime, depth: int) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for node in nodes:
        cells = (
            "  " * depth + printable(node.name),
            node.state,
            clock(node.started),
            took(node.started, node.ended, now),
            ", ".join(map(printable, node.after)),
            printable(", ".join(remarks(node))),
        )
        yield cells, [printable(line) for line in node.error.splitlines() if line.strip()]
        yield from _rows(node.nodes, now, depth + 1)


def remarks(node: Node) -> list[str]:
    """Its title, when it runs, how many iterations are done, and how often it was tried; each only if there is any."""
    found = [f'"{node.title}"'] if node.title else []
    found += [node.condition] if node.condition else []
    if node.kind == "loop" and node.nodes and node.nodes[0].kind == "iteration":
        done = sum(one.state in ("succeeded", "cached") for one in node.nodes)
        found.append(f"{done} of {len(node.nodes)} iterations done")
    elif node.kind == "loop":
        found.append("for each")
    return found + ([f"{len(node.jobs)} attempts"] if node.failed_jobs else [])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def as_json(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """The nodes for tools, without what they do not have."""
    found = []
    for node in nodes:
        fields = {name: value for name, value in asdict(node).items() if value not in ("", ())} | {"layer": node.layer}
        found.append(fields | ({"nodes": as_json(node.nodes)} if node.nodes else {}))
    return found


def moment(text: str) -> datetime | None:
    """A time of RFC 3339; None of ""."""
    # Python 3.11 reads six digits of a second, and Google writes up to nine.
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)) if text else None


def clock(text: str, date: bool = False) -> str:
    """The time of day of a time of RFC 3339 in UTC, with its date if wanted."""
    found = moment(text)
    return found.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S") if found else ""


def took(started: str, ended: str, now: datetime) -> str:
    """The time between two times of RFC 3339, or until now, in words; "" for what has not started."""
    begin = moment(started)
    if begin is None:
        return ""
    seconds = round(((moment(ended) or now) - begin).total_seconds())
    hours, rest = divmod(max(seconds, 0), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
