"""What the workloads share: the folders of a run, its checkpoints, its log, its processes, and broken records."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Where a training container of Vertex AI finds Cloud Storage:
# https://cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system
GCS = Path("/gcs")
KEPT_CHECKPOINTS = 2  # the newest may be broken where a file system cannot rename a file in one step
SHOWN_BAD_RECORDS = 10


class UsageError(Exception):
    """A run cannot start or go on; the message says how to repair it."""


def local_path(text: str) -> Path:
    """The path of a file or folder; `gs://bucket/name` is `/gcs/bucket/name`. Raises UsageError without /gcs."""
    if not text.startswith("gs://"):
        return Path(text).expanduser()
    if not GCS.is_dir():
        raise UsageError(
            f"{text} is reached through {GCS}, which Vertex AI mounts and this machine lacks; copy it here"
        )
    return GCS / text.removeprefix("gs://")


@dataclass(frozen=True)
class Folders:
    """Where a run writes: the model that it ends with, its checkpoints, and TensorBoard's files."""

    model: Path
    checkpoints: Path
    logs: Path

    @classmethod
    def choose(cls, job_dir: str | None, environment: Mapping[str, str] = os.environ) -> Folders:
        """Vertex AI's variables come first, because all trials of a study are given the same --job-dir.

        https://cloud.google.com/vertex-ai/docs/training/code-requirements. Raises UsageError where neither says a
        folder.
        """

        def folder(variable: str, name: str) -> Path:
            if text := environment.get(variable):
                return local_path(text)
            if job_dir:
                return local_path(job_dir) / name
            raise UsageError("give --job-dir DIR (on Vertex AI: set baseOutputDirectory), the folder for the results")

        return cls(
            folder("AIP_MODEL_DIR", "model"),
            folder("AIP_CHECKPOINT_DIR", "checkpoints"),
            folder("AIP_TENSORBOARD_LOG_DIR", "logs"),
        )


def add_arguments(parser: argparse.ArgumentParser, *, checkpoint_every: int) -> None:
    """The options that every workload has."""
    parser.add_argument(
        "--job-dir", metavar="DIR", help="folder for model/, checkpoints/ and logs/; gs:// on Vertex AI"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (0)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=checkpoint_every, metavar="N", help="steps (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over, whatever checkpoints there are")
    parser.add_argument(
        "--on-bad-record", choices=("fail", "skip"), default="fail", help="what to do about broken records (fail)"
    )


# Options that change no weight, or that say where the data is, whose content is compared instead.
NOT_RESULTS = (
    "job_dir",
    "checkpoint_every",
    "fresh",
    "eval_every",
    "data_dir",
    "train_files",
    "eval_files",
    "init_from",
)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """`--learning_rate=0.1` is `--learning-rate 0.1`: a study names its parameters so, and Vertex AI passes them on."""
    return parser.parse_args([re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv])


def whole(text: str) -> int:
    """A whole number of at least 1, for argparse. A study may write 64 as 64.0."""
    if float(text) != int(float(text)) or float(text) < 1:
        raise ValueError
    return int(float(text))


def fraction(text: str) -> float:
    """A number of [0, 1), for argparse."""
    if not 0 <= float(text) < 1:
        raise ValueError
    return float(text)


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def seed_for(*numbers: int) -> int:
    """32 bits that depend on all the numbers: torch's generators of a CPU look at no more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batch_at(step: int, batch: int, records: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the records of one step, shape [batch].

    Epochs follow each other without a gap, each a permutation of all records. Only the step and the seed decide, so a
    run that starts in the middle needs no history.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    found = np.empty(batch, np.int64)
    for epoch in range(positions[0] // records, positions[-1] // records + 1):
        inside = positions // records == epoch
        found[inside] = _permutation(records, seed, int(epoch))[positions[inside] % records]
    return found


@functools.lru_cache(maxsize=4)
def _permutation(records: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(records)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Rises to the peak over a twentieth of the steps, then falls to zero in a straight line."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def data_sha256(arrays: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of tensors: two runs with the same one see the same data."""
    digest = hashlib.sha256()
    for one in arrays:
        digest.update(one.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass
class BadRecords:
    """The broken records of a run's files, with their places. policy: fail or skip."""

    policy: str
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, file: Path, line: int, why: str) -> None:
        """line: from 1; for a file of fixed-size records, the number of the record."""
        self.count += 1
        if len(self.shown) < SHOWN_BAD_RECORDS:
            self.shown.append(f"{file}:{line}: {why}")

    def close(self, run: Run) -> None:
        """Logs the broken records where they are skipped. Raises UsageError where they are not."""
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        if self.count and self.policy == "fail":
            remedy = "repair them, or skip them with --on-bad-record skip"
            raise UsageError("\n".join([f"{self.count} broken records; {remedy}:", *self.shown, *more]))
        for line in self.shown + more:
            run.say(f"skipped {line}", severity="WARNING")


class Run:
    """One process of a training run: its device, its part of the work, its log and its checkpoints.

    `torchrun` starts several processes; each holds a copy of the model and a share of each batch, and the first, the
    chief, alone writes. The same code runs on a GPU if there is one (HEADCOUNT_ACCELERATOR=cpu leaves it alone).
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folders = Folders.choose(arguments.job_dir)
        self.seed, self.fresh = int(arguments.seed), bool(arguments.fresh)
        self.identity = {name: repr(value) for name, value in vars(arguments).items() if name not in NOT_RESULTS}
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        gpu = torch.cuda.is_available() and os.environ.get("HEADCOUNT_ACCELERATOR") != "cpu"
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
        if self.processes > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if gpu else "gloo")
        # On a GPU some of torch's operations have no deterministic form: it names them in a warning.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=gpu)
        torch.manual_seed(seed_for(self.seed))
        self.terminal = sys.stdout.isatty()
        self._bar: tqdm[int] | None = None
        self._writer: SummaryWriter | None = None

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    def share(self, batch: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """This process's part of a batch, as large as every other process's."""
        if len(batch) % self.processes:
            raise UsageError(f"a batch of {len(batch)} cannot be shared evenly by {self.processes} processes")
        return batch[self.rank :: self.processes]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model that averages its gradients over all processes."""
        return DistributedDataParallel(model) if self.processes > 1 else model

    def agree(self, value: float) -> float:
        """The chief's value, in every process."""
        if self.processes > 1:
            told = torch.tensor([value], dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(told, 0)
            return float(told)
        return value

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The steps that are left, with a progress bar on a terminal.

        What torch draws at random in a step depends on the seed, the step and the process, not on the steps before.
        """
        if first:
            self.say(f"goes on after step {first} of {last}", {"step": first})
        with tqdm(total=last, initial=first, disable=not (self.terminal and self.is_chief), leave=False) as self._bar:
            for step in range(first, last):
                torch.manual_seed(seed_for(self.seed, step, self.rank))
                yield step
                self._bar.update()
        self._bar = None

    def say(self, message: str, values: Mapping[str, object] | None = None, severity: str = "INFO") -> None:
        """A line for people on a terminal; elsewhere one of JSON with values, as Cloud Logging reads it."""
        if not self.is_chief:
            return
        if self.terminal:
            tqdm.write(message, file=sys.stdout)
        else:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            print(json.dumps({"time": now, "severity": severity, "message": message, **(values or {})}), flush=True)

    def report(self, step: int, **values: float) -> None:
        """Figures after a step, into the log and into TensorBoard."""
        if not self.is_chief:
            return
        if self._writer is None:  # figures after the checkpoint were written by a run that was killed: hide them
            self._writer = SummaryWriter(str(self.folders.logs), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        if self._bar is not None and not self._bar.disable and set(values) == {"loss"}:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}: {text}", {"step": step, **values})

    def report_trial(self, step: int, **values: float) -> None:
        """Tells a tuning job its trial's figures, where this run is a trial."""
        if self.is_chief and {"CLOUD_ML_TRIAL_ID", "CLOUD_ML_HP_METRIC_FILE"} & set(os.environ):
            import hypertune

            for name, value in values.items():
                hypertune.HyperTune().report_hyperparameter_tuning_metric(name, value, step)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the state after a number of steps. A kill at any moment leaves the one before."""
        if not self.is_chief:
            return
        if self._writer is not None:
            self._writer.flush()
        folder = self.folders.checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        target, partial = folder / f"step-{step:09}.pt", folder / f"step-{step:09}.partial"
        with partial.open("wb") as file:
            torch.save({"step": step, "identity": self.identity, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        for old in sorted(folder.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def restore(self, **data: str) -> tuple[int, dict[str, Any]]:
        """The steps done and the state of the newest checkpoint that can be read; 0 and {} without one.

        data: what besides the options decides the result, such as the SHA-256 of the training data. Raises UsageError
        if the checkpoint is of another run.
        """
        self.identity |= data
        files = [] if self.fresh else sorted(self.folders.checkpoints.glob("step-*.pt"), reverse=True)
        for file in files:
            try:
                saved = torch.load(file, map_location=self.device, weights_only=True)
                step, identity, state = int(saved["step"]), saved["identity"], dict(saved["state"])
            except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
                self.say(f"{file} cannot be read and is passed over: {error}", severity="WARNING")
                continue
            if identity != self.identity:
                names = sorted({*identity, *self.identity})
                both = [(name, identity.get(name, "absent"), self.identity.get(name, "absent")) for name in names]
                other = ", ".join(f"{name} {was} is now {now}" for name, was, now in both if was != now)
                raise UsageError(
                    f"{file} is of another run ({other}); give another --job-dir, or --fresh to start over in this one"
                )
            return step, state
        if self.is_chief:
            for stale in self.folders.checkpoints.glob("step-*"):
                stale.unlink()
        return 0, {}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def run_of(arguments: argparse.Namespace) -> Iterator[Run]:
    run = Run(arguments)
    try:
        yield run
    finally:
        run.close()


def command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a workload as a command: errors of use in words, exit code 2; 130 after Ctrl-C."""
    try:
        main(sys.argv[1:])
    except UsageError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
