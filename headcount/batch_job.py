"""A bucket of pictures, counted by batch prediction jobs of Vertex AI with the release that a stack serves.

Everything that a batch needs to go on stands in its folder of a bucket: the manifest, the instances and the results.
A job is known by its display name, so a command that was killed finds the job that it had started.
"""

from __future__ import annotations

import datetime
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from headcount.batch_bucket import (
    MANIFEST,
    TABLE,
    Buckets,
    collect,
    fill,
    picture_of,
    write_instances,
)
from headcount.batch_plan import Plan, Wish, plan, request_size, split
from headcount.bucket import client_of
from headcount.google import Google, GoogleError, Place, place_of
from headcount.ledger import BatchError, Ledger, Totals
from headcount.releases import endpoint_url
from review.prices import load
from serving.contract import Parameters

ENDED: Final = ("SUCCEEDED", "PARTIALLY_SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")
ROUNDS: Final = 3  # jobs of a run: all pictures, then twice those that failed
POLL_SECONDS = 15.0
TELL_SECONDS: Final = 60.0
LOOKS: Final = 20  # in a row that may fail


@dataclass(frozen=True)
class Release:
    """The release that serves. model: with its version. machine: a MachineSpec. buckets: those that it may read.

    key: of Cloud KMS, or "".
    """

    model: str
    machine: dict[str, Any]
    account: str
    key: str
    buckets: frozenset[str]


@dataclass
class Manifest:
    """A batch as it stands in its folder. files: of instances, once all are written. jobs: names of those started."""

    name: str
    source: str
    model: str
    machine: dict[str, Any]
    account: str
    kms_key: str
    parameters: dict[str, Any]
    listed: bool  # the instances are a list of files, which Vertex AI reads
    files: list[str] = field(default_factory=list)
    pictures: int = 0
    picture_bytes: int = 0
    jobs: list[str] = field(default_factory=list)
    done: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What the same command asks for."""
        return self.source, self.model, self.parameters

    @property
    def detail(self) -> str:
        return str(self.parameters.get("detail", Parameters.detail))


class Vertex(Google):
    """Releases and batch prediction jobs of a place. Raises GoogleError."""

    def serving(self, outputs: dict[str, Any], stack: str) -> Release:
        """The release with most of the traffic. Raises BatchError where there is none."""
        endpoint = self.ask("GET", endpoint_url(outputs))
        shares = endpoint.get("trafficSplit", {})
        deployed = max(endpoint.get("deployedModels", []), key=lambda one: int(shares.get(one["id"], 0)), default=None)
        if not deployed or not shares.get(deployed["id"]):
            raise BatchError(f"Stack {stack} has no release that serves: `pulumi up -s {stack}` first.")
        name, _, number = str(deployed["model"]).partition("@")
        model = f"{name}@{deployed.get('modelVersionId') or number}"
        described = self.ask("GET", f"{self.place.vertex}/v1/{model}")
        variables = described.get("containerSpec", {}).get("env", [])
        env = {one["name"]: one.get("value", "") for one in variables}
        return Release(
            model,
            deployed["dedicatedResources"]["machineSpec"],
            str(deployed.get("serviceAccount", "")),
            str(described.get("encryptionSpec", {}).get("kmsKeyName", "")),
            frozenset(filter(None, env.get("HEADCOUNT_BUCKETS", "").split(","))),
        )

    def job(self, name: str) -> dict[str, Any]:
        return self.ask("GET", f"{self.place.vertex}/v1/{name}")

    def started(self, display_name: str) -> dict[str, Any] | None:
        """The job of a display name."""
        found = self.ask("GET", self._jobs, filter=f'display_name="{display_name}"')
        return next(iter(found.get("batchPredictionJobs", [])), None)

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        return self.ask("POST", self._jobs, body)

    def cancel(self, name: str) -> None:
        self.ask("POST", f"{self.place.vertex}/v1/{name}:cancel", {})

    @property
    def _jobs(self) -> str:
        return f"{self.place.vertex}/v1/projects/{self.place.project}/locations/{self.place.region}/batchPredictionJobs"


def folder_of(wish_out: str, outputs: dict[str, Any]) -> str:
    """The gs:// folder of a stack's batches. Raises BatchError."""
    if not wish_out and not outputs.get("modelBucket"):
        raise BatchError("The stack has no bucket for results yet: run `pulumi up`, or name one with --out gs://…")
    out = (wish_out or f"{outputs['modelBucket']}/batch").rstrip("/")
    split(out)
    return out


def job_body(manifest: Manifest, number: int, files: list[str], planned: Plan, folder: str) -> dict[str, Any]:
    """The resource of a batch's job. number: of the job, from 0 on."""
    size = manifest.picture_bytes // max(manifest.pictures, 1) if manifest.listed else 0
    together = request_size(manifest.detail, size)
    return {
        "displayName": f"{manifest.name}-{number}",
        "model": manifest.model,
        "inputConfig": {
            "instancesFormat": "file-list" if manifest.listed else "jsonl",
            "gcsSource": {"uris": files},
        },
        "outputConfig": {"predictionsFormat": "jsonl", "gcsDestination": {"outputUriPrefix": f"{folder}/results"}},
        "modelParameters": {**manifest.parameters, "max_people": 0, "inline_errors": True},
        "dedicatedResources": {
            "machineSpec": manifest.machine,
            "startingReplicaCount": planned.machines,
            "maxReplicaCount": planned.machines,
        },
        # Pictures that failed together are asked for in small requests.
        "manualBatchTuningParameters": {"batchSize": together if number == 0 else max(1, together // 8)},
        "labels": {"headcount-batch": manifest.name},
        **({"serviceAccount": manifest.account} if manifest.account else {}),
        **({"encryptionSpec": {"kmsKeyName": manifest.kms_key}} if manifest.kms_key else {}),
    }


class Batch:
    """One batch: started, or taken up again."""

    def __init__(self, stack: str, outputs: dict[str, Any], wish: Wish) -> None:
        self.place: Place = place_of(outputs)
        self._stack, self._outputs, self._wish = stack, outputs, wish
        self._vertex = Vertex(self.place)
        self._client = client_of(outputs)
        self._buckets = Buckets(self._client)
        self._out = folder_of(wish.out, outputs)
        self.manifest: Manifest

    def close(self) -> None:
        self._vertex.close()
        self._client.close()

    # ---------------------------------------------------------------------------------------------- the beginning

    def begin(self) -> None:
        """Takes up an unfinished batch that was begun with the same command, or begins one. Raises BatchError."""
        release = self._vertex.serving(self._outputs, self._stack)
        source = self._wish.source
        bucket, prefix = split(source)
        out_bucket, out_name = split(self._out)
        if bucket == out_bucket and f"{out_name}/".startswith(prefix):
            raise BatchError(
                f"The results in {self._out} would be among the pictures of {source}: name another place with --out, "
                "or a longer prefix."
            )
        for uri in (source, self._out):
            self._buckets.check_region(uri, self.place.region)
        wanted = Manifest(
            name=f"batch-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            source=source,
            model=release.model,
            machine=machine_of(release.machine, self._wish.machine_type),
            account=release.account,
            kms_key=release.key,
            parameters=self._wish.parameters.as_json(),
            listed=bucket not in release.buckets,
        )
        self.manifest = next((one for one in self._unfinished() if one.key == wanted.key), wanted)
        if self.manifest is not wanted:
            say(f"going on with {self.manifest.name}")

    def resume(self, name: str) -> None:
        """Takes up a batch by its name. Raises BatchError."""
        found = self._buckets.read(f"{self._out}/{name}/{MANIFEST}")
        if found is None:
            names = ", ".join(one.name for one in self._unfinished()) or "none"
            raise BatchError(f"There is no batch {name} in {self._out}; unfinished there: {names}.")
        self.manifest = Manifest(**found)

    def _unfinished(self) -> list[Manifest]:
        bucket, name = split(self._out)
        found = []
        for folder in self._buckets.folders(f"gs://{bucket}/{name}/batch-"):
            content = self._buckets.read(f"{folder}{MANIFEST}")
            if content and not content["done"]:
                found.append(Manifest(**content))
        return found

    @property
    def folder(self) -> str:
        return f"{self._out}/{self.manifest.name}"

    @property
    def table(self) -> str:
        return f"{self.folder}/{TABLE}"

    def _save(self) -> None:
        self._buckets.write(f"{self.folder}/{MANIFEST}", json.dumps(asdict(self.manifest), indent=1))

    # ------------------------------------------------------------------------------------------------- the course

    def run(self, *, dry: bool = False) -> Totals:
        """Goes on to the end. dry: only as far as the estimate. Raises BatchError and GoogleError."""
        with tempfile.TemporaryDirectory(prefix="headcount-batch-") as temporary:
            ledger = Ledger(Path(temporary) / "ledger", {})
            try:
                self._list(ledger, dry=dry)
                if dry:
                    say(f"{self._plan(self.manifest.pictures)}; nothing is started")
                    return ledger.totals()
                why = self._count(ledger)
                last = why.most_common(1)[0][0] if why else "the job gave no result for it"
                ledger.give_up(last)
                path = str(Path(temporary) / TABLE)
                with Path(path).open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    ledger.write(file)
                self._buckets.upload(self.table, path)
                self.manifest.done = True
                self._save()
                return ledger.totals()
            finally:
                ledger.close()

    def _list(self, ledger: Ledger, *, dry: bool) -> None:
        """Fills the ledger, and writes the instances if that was not done before."""
        manifest = self.manifest
        if manifest.files:
            for file in manifest.files:
                lines = (line.rstrip("\n") for line in self._buckets.lines(file) if line.strip())
                read = (picture_of(line if manifest.listed else json.loads(line)) for line in lines)
                ledger.add((uri, "") for uri in read)
            return
        manifest.pictures, manifest.picture_bytes = fill(ledger, self._buckets.pictures(manifest.source))
        if not manifest.pictures:
            raise BatchError(
                f"{manifest.source} has no pictures: there is no object whose name or type is that of one. Correct the "
                "prefix."
            )
        if not dry:
            self._plan(manifest.pictures)  # what costs too much is refused before anything is written
            files, _ = self._write(ledger, 0)
            manifest.files = files
            self._save()

    def _write(self, ledger: Ledger, number: int) -> tuple[list[str], int]:
        def write(uri: str, text: str) -> None:
            self._buckets.write(uri, text, "text/plain")

        return write_instances(write, ledger.left(), f"{self.folder}/instances/{number}", self.manifest.listed)

    def _plan(self, pictures: int, spent: float = 0.0) -> Plan:
        """The next job. spent: machine hours, which the limit of costs has to pay for, too."""
        wish, manifest = self._wish, self.manifest
        limit = None if wish.usd is None else max(0.0, wish.usd - (self._price().at(spent) or 0))
        return plan(
            pictures, manifest.detail, manifest.machine, self.place.region, load(),
            hours=wish.hours, limit=limit, machines=wish.machines,
        )  # fmt: skip

    def _price(self) -> Plan:
        """A plan of one picture, for its price only."""
        return plan(1, self.manifest.detail, self.manifest.machine, self.place.region, load())

    def _count(self, ledger: Ledger) -> Counter[str]:
        """Runs jobs until no picture is left, or no job helps. Returns the reasons of the failures of the last."""
        why, spent = Counter[str](), 0.0
        for name in self.manifest.jobs:
            why, hours = self._follow(name, ledger, spent)
            spent += hours
        for round_ in range(ROUNDS):
            left = ledger.totals().left
            if not left:
                break
            name = self._start(ledger, left, spent, again=round_ > 0)
            why, hours = self._follow(name, ledger, spent)
            spent += hours
            totals, state = ledger.totals(), self._state(name)
            if state in ("CANCELLED", "EXPIRED") or totals.left == totals.pictures:
                error = self._vertex.job(name).get("error", {}).get("message", "")
                reason = next((message for message, _ in why.most_common(1)), error)
                raise BatchError(
                    f"The job {name} ended as {state}{f': {reason}' if reason else ''}. Not counted yet: "
                    f"{totals.left:,} of {totals.pictures:,}. When that is repaired, go on with: {self.command}"
                )
            if totals.left == left:
                break
        return why

    def _start(self, ledger: Ledger, left: int, spent: float, *, again: bool) -> str:
        """Starts the next job for all pictures that are left, unless it was started already. Returns its name."""
        manifest, number = self.manifest, len(self.manifest.jobs)
        planned = self._plan(left, spent)
        files = manifest.files if number == 0 else self._write(ledger, number)[0]
        body = job_body(manifest, number, files, planned, self.folder)
        job = self._vertex.started(body["displayName"])
        if job is None:
            say(f"{'again: ' if again else ''}{planned}")
            job = self._vertex.start(body)
        manifest.jobs.append(str(job["name"]))
        self._save()
        return str(job["name"])

    def _state(self, name: str) -> str:
        return str(self._vertex.job(name).get("state", "")).removeprefix("JOB_STATE_")

    @property
    def command(self) -> str:
        """The command that takes the batch up again."""
        out = f" --out {self._wish.out}" if self._wish.out else ""
        return f"headcount batch --resume {self.manifest.name} --stack {self._stack}{out}"

    @property
    def left_alone(self) -> str:
        """What becomes of the batch if the command ends, in words."""
        jobs = self.manifest.jobs
        end = f", or end it: headcount jobs --stack {self._stack} cancel {jobs[-1].rpartition('/')[2]}" if jobs else ""
        if not self.manifest.files:
            return "Nothing was started: repeat the command to begin."
        goes_on = " and its job goes on" if jobs else ""
        return f"{self.manifest.name} stays as it is{goes_on}. Take it up again: {self.command}{end}"

    def _follow(self, name: str, ledger: Ledger, spent: float) -> tuple[Counter[str], float]:
        """Waits for the end of a job and records its results. Returns the reasons of failures, and its machine hours.

        spent: machine hours of the batch's jobs before. A job whose costs reach the limit is cancelled.
        """
        planned, told, due = replace(self._price(), pictures=ledger.totals().left), "", 0.0
        while True:
            job = self._look(name)
            state = str(job.get("state", "")).removeprefix("JOB_STATE_")
            hours = float(job.get("resourcesConsumed", {}).get("replicaHours", 0))
            if state != told or time.monotonic() > due:
                say(f"{self.manifest.name}: {progress(state, job, planned, spent + hours)}")
                told, due = state, time.monotonic() + TELL_SECONDS
            if state in ENDED:
                break
            usd = planned.at(spent + hours)
            if self._wish.usd is not None and usd is not None and usd > self._wish.usd and state != "CANCELLING":
                say(f"the limit of {self._wish.usd:g} USD is reached: the job is cancelled")
                self._vertex.cancel(name)
            time.sleep(POLL_SECONDS)
        why = Counter[str]()
        if folder := job.get("outputInfo", {}).get("gcsOutputDirectory"):
            why = collect(self._buckets, folder, ledger)
        return why, hours

    def _look(self, name: str) -> dict[str, Any]:
        """The job as it is now; a network that fails for some minutes does not end the command."""
        for _ in range(LOOKS):
            try:
                return self._vertex.job(name)
            except GoogleError as error:
                if error.status not in (0, 429) and error.status < 500:
                    raise
                say(f"{error}; trying again")
                time.sleep(POLL_SECONDS)
        return self._vertex.job(name)


def machine_of(served: dict[str, Any], wanted: str) -> dict[str, Any]:
    """The MachineSpec of the job: that of the release, or another type, which then has no accelerator."""
    return {"machineType": wanted} if wanted and wanted != served.get("machineType") else served


def progress(state: str, job: dict[str, Any], planned: Plan, hours: float) -> str:
    """How far a job is, in words. hours: of machines, all jobs of the batch together."""
    stats = job.get("completionStats", {})
    done = int(stats.get("successfulCount", 0)) + int(stats.get("failedCount", 0))
    counted = f", {done:,} of {planned.pictures:,} pictures" if done else ""
    cost = f", {planned.money(hours)} so far" if hours else ""
    return f"{state.lower().replace('_', ' ')}{counted}{cost}"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
