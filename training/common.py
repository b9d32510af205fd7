"""Shared by the workloads: the folders of a run, its checkpoints, its log, its processes, and broken records."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import math
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

from training.files import UsageError as UsageError
from training.files import local_path as local_path
from training.files import published as published

KEPT_CHECKPOINTS = 2  # a file system that cannot rename in one step may leave the newest one broken
SHOWN_BAD_RECORDS = 10


@dataclass(frozen=True)
class Folders:
    """The folders that a run writes: the exported model, the checkpoints, and TensorBoard's files."""

    model: Path
    checkpoints: Path
    logs: Path

    @classmethod
    def choose(cls, job_dir: str | None, environment: Mapping[str, str] = os.environ) -> Folders:
        """Returns the folders that Vertex AI's variables name, or else those below --job-dir.

        The variables take precedence because all trials of a tuning get the same --job-dir:
        https://cloud.google.com/vertex-ai/docs/training/code-requirements. Raises UsageError if both are absent.
        """

        def folder(variable: str, name: str) -> Path:
            if text := environment.get(variable):
                return local_path(text)
            if job_dir:
                return local_path(job_dir) / name
            raise UsageError("give --job-dir DIR, the folder for the results (on Vertex AI, set baseOutputDirectory)")

        return cls(
            folder("AIP_MODEL_DIR", "model"),
            folder("AIP_CHECKPOINT_DIR", "checkpoints"),
            folder("AIP_TENSORBOARD_LOG_DIR", "logs"),
        )


def add_arguments(parser: argparse.ArgumentParser, *, checkpoint_every: int) -> None:
    """Adds the options that every workload has."""
    parser.add_argument(
        "--job-dir", metavar="DIR", help="folder for model/, checkpoints/ and logs/; gs:// on Vertex AI"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (%(default)s)")
    parser.add_argument(
        "--checkpoint-every",
        type=whole,
        default=checkpoint_every,
        metavar="N",
        help="steps between checkpoints (%(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="start over and ignore existing checkpoints")
    parser.add_argument("--on-bad-record", choices=("fail", "skip"), default="fail", help="(%(default)s)")


# Options that do not change the weights. Those that name data do, but there the content is compared instead.
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
    """Parses the options. A tuning may name a parameter learning_rate and pass `--learning_rate=0.1`."""
    return parser.parse_args([re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv])


def options_for_runs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before `--`, and those after it, which a command passes on to the runs that it starts."""
    end = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end + 1 :])


def whole(text: str) -> int:
    """Returns a whole number of at least 1, for argparse. A tuning may write 64 as 64.0."""
    if not float(text).is_integer() or float(text) < 1:
        raise ValueError
    return int(float(text))


def fraction(text: str) -> float:
    """Returns a number of at least 0 and below 1, for argparse."""
    if not 0 <= float(text) < 1:
        raise ValueError
    return float(text)


def positive(text: str) -> float:
    """Returns a finite number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def seed_for(*numbers: int) -> int:
    """Returns a seed of 32 bits that depends on all the numbers; torch's CPU generator uses no more bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batch_at(step: int, batch: int, records: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns the indices of the records of one step, shape [batch].

    Each epoch is a permutation of all records, and a batch may span two epochs. The result depends on the step and the
    seed alone, so that a resumed run needs no history.
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
    """Returns the learning rate: it rises to the peak over a twentieth of the steps and then falls linearly to zero."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def data_sha256(arrays: Iterable[Tensor]) -> str:
    """Returns the SHA-256 over the bytes of tensors, by which a resumed run recognises its data."""
    digest = hashlib.sha256()
    for one in arrays:
        digest.update(one.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass
class BadRecords:
    """Collects the broken records of a run's files with file and line. policy: fail or skip."""

    policy: str
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, file: Path, line: int, why: str) -> None:
        """line: counted from 1; in a file of fixed-size records, the number of the record."""
        self.count += 1
        if len(self.shown) < SHOWN_BAD_RECORDS:
            self.shown.append(f"{file}:{line}: {why}")

    def close(self, run: Run) -> None:
        """Logs the broken records if they are skipped, else raises UsageError."""
        more = [f"… and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        if self.count and self.policy == "fail":
            remedy = "repair them, or use --on-bad-record skip"
            raise UsageError("\n".join([f"broken records: {self.count}; {remedy}:", *self.shown, *more]))
        for line in self.shown + more:
            run.say(f"skipped {line}", severity="WARNING")


class Run:
    """One process of a training run: its device, its share of each batch, its log and its checkpoints.

    `torchrun` starts several processes. Each has a copy of the model and takes a share of each batch; only the first,
    the chief, writes files and logs. A GPU is used if there is one and HEADCOUNT_ACCELERATOR is not "cpu".
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folders = Folders.choose(arguments.job_dir)
        self.seed, self.fresh = int(arguments.seed), bool(arguments.fresh)
        self.identity = {name: repr(value) for name, value in vars(arguments).items() if name not in NOT_RESULTS}
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        gpu = torch.cuda.is_available() and os.environ.get("HEADCOUNT_ACCELERATOR") != "cpu"
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        if self.processes > 1:
            torch.distributed.init_process_group("nccl" if gpu else "gloo")
        # On a GPU some of torch's operations have no deterministic form; torch warns of those.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_deterministic_debug_mode("warn" if gpu else "error")
        torch.manual_seed(seed_for(self.seed))
        self.terminal = sys.stdout.isatty()
        self._bar: tqdm[int] | None = None
        self._writer: SummaryWriter | None = None

    @property
    def is_chief(self) -> bool:
        return self.rank == 0

    def share(self, batch: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns this process's share of a batch. All shares have the same size, so that gradients average rightly."""
        if len(batch) % self.processes:
            raise UsageError(f"--train-batch-size {len(batch)} must be a multiple of {self.processes} processes")
        return batch[self.rank :: self.processes]

    def parallel(self, model: nn.Module) -> nn.Module:
        """Returns the model, wrapped so that its gradients are averaged over all processes."""
        return DistributedDataParallel(model) if self.processes > 1 else model

    def agree(self, value: float) -> float:
        """Returns the chief's value in every process."""
        if self.processes > 1:
            told = torch.tensor([value], dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(told, 0)
            return float(told)
        return value

    def steps(self, first: int, last: int) -> Iterator[int]:
        """Yields the remaining steps and shows a progress bar on a terminal.

        Random numbers that torch draws in a step depend on the seed, the step and the process, and not on earlier
        steps.
        """
        if first:
            self.say(f"resumed after step {first} of {last}", {"step": first})
        with tqdm(total=last, initial=first, disable=not (self.terminal and self.is_chief), leave=False) as self._bar:
            for step in range(first, last):
                torch.manual_seed(seed_for(self.seed, step, self.rank))
                yield step
                self._bar.update()
        self._bar = None

    def say(self, message: str, values: Mapping[str, object] | None = None, severity: str = "INFO") -> None:
        """Prints the message on a terminal, and elsewhere a line of JSON with the values, as Cloud Logging reads it."""
        if not self.is_chief:
            return
        if self.terminal:
            tqdm.write(message, file=sys.stdout)
        else:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            print(json.dumps({"time": now, "severity": severity, "message": message, **(values or {})}), flush=True)

    def report(self, step: int, **values: float) -> None:
        """Writes the figures after a step into the log and for TensorBoard. Raises UsageError if the loss diverged."""
        if not math.isfinite(values.get("loss", 0)):
            raise UsageError(f"the loss is {values['loss']} at step {step}; use a lower --learning-rate")
        if not self.is_chief:
            return
        for name, value in values.items():
            self._events(step).add_scalar(name, value, step)
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        if self._bar is not None and not self._bar.disable and set(values) == {"loss"}:
            self._bar.set_postfix_str(text)
        else:
            self.say(f"step {step}: {text}", {"step": step, **values})

    def show(self, step: int, name: str, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Writes a grey picture [height, width] for TensorBoard, and as `samples/NAME-STEP.png` beside its files."""
        from PIL import Image

        if not self.is_chief:
            return
        self._events(step).add_image(name, picture, step, dataformats="HW")
        folder = self.folders.logs / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{name}-{step:06}.png")

    def _events(self, step: int) -> SummaryWriter:
        """Returns TensorBoard's writer, which hides what a killed run wrote after its last checkpoint."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folders.logs), purge_step=step)
        return self._writer

    def say_result(self, metrics: Mapping[str, float], skipped: int) -> None:
        """Prints the last line of a run: its figures, the number of skipped records, and the folder of the model."""
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        values = {**metrics, "skipped": skipped, "model": str(self.folders.model)}
        self.say(f"{text}; broken records skipped: {skipped}; the model is in {self.folders.model}", values)

    def report_trial(self, step: int, **values: float) -> None:
        """Reports the figures to the tuning if this run is one of its trials."""
        if self.is_chief and {"CLOUD_ML_TRIAL_ID", "CLOUD_ML_HP_METRIC_FILE"} & set(os.environ):
            import hypertune

            for name, value in values.items():
                hypertune.HyperTune().report_hyperparameter_tuning_metric(name, value, step)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the state after `step` steps. A kill at any moment leaves the one before intact."""
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
        """Returns the number of steps done and the state of the newest readable checkpoint, or 0 and {}.

        data: values that decide the result besides the options, such as the SHA-256 of the training data. Raises
        UsageError if the checkpoint belongs to a run with other options or data.
        """
        self.identity |= data
        files = [] if self.fresh else sorted(self.folders.checkpoints.glob("step-*.pt"), reverse=True)
        for file in files:
            try:
                saved = torch.load(file, map_location=self.device, weights_only=True)
                step, identity, state = int(saved["step"]), saved["identity"], dict(saved["state"])
            except (RuntimeError, EOFError, OSError, KeyError, TypeError, pickle.UnpicklingError) as error:
                self.say(f"{file} cannot be read and is ignored: {error}", severity="WARNING")
                continue
            if identity != self.identity:
                names = sorted({*identity, *self.identity})
                both = [(name, identity.get(name, "absent"), self.identity.get(name, "absent")) for name in names]
                other = ", ".join(f"{name} {was} is now {now}" for name, was, now in both if was != now)
                raise UsageError(
                    f"{file} belongs to a run with other settings ({other}); give another --job-dir, or --fresh to "
                    "start over in this one"
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
    """Runs a workload as a command. The exit code is 2 after an error that the user can repair, 130 after Ctrl-C."""
    try:
        main(sys.argv[1:])
    except UsageError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{Path(sys.argv[0]).stem}: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
