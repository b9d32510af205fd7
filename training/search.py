"""Searches for an architecture of the digits CNN with a controller that learns from the trials' accuracy.

    python -m training.search --job-dir output --method controller --trials 40

After Zoph and Le (https://arxiv.org/abs/1611.01578): an LSTM makes the choices of an architecture one after the other,
the network is trained for a short time, and REINFORCE raises the probability of choices that led to more accuracy than
the average. For comparison, `--method random` draws uniformly and `--method tpe` asks Optuna's sampler. The best
architecture is then trained for longer and exported. The file goes from choices over proposers and trial to search.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training import common, digits

# The choices in order. filters3 = 0 means that there is no third layer.
CHOICES: dict[str, tuple[float, ...]] = {
    "filters1": (4, 8, 16, 24), "kernel1": (3, 5, 7), "filters2": (8, 16, 24, 32), "kernel2": (3, 5, 7),
    "filters3": (0, 16, 32), "dense": (32, 64, 128, 256), "batch_norm": (0, 1), "dropout": (0.0, 0.25, 0.5),
}  # fmt: skip
SIZES = [len(options) for options in CHOICES.values()]
Indices = list[int]  # an architecture: for each choice the index of its option


class Proposer(Protocol):
    def propose(self, trial: int, tried: Sequence[tuple[Indices, float]]) -> Indices: ...
    def learn(self, indices: Indices, reward: float) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Random:
    """Draws every choice uniformly and learns nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(self, trial: int, tried: Sequence[tuple[Indices, float]]) -> Indices:
        generator = np.random.default_rng([self.seed, trial])
        return [int(generator.integers(size)) for size in SIZES]

    def learn(self, indices: Indices, reward: float) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Tpe(Random):
    """Optuna's tree-structured Parzen estimator. It is created for each trial, so that a resumed run draws the same."""

    def propose(self, trial: int, tried: Sequence[tuple[Indices, float]]) -> Indices:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {
            name: optuna.distributions.CategoricalDistribution(range(len(options))) for name, options in CHOICES.items()
        }
        sampler = optuna.samplers.TPESampler(seed=common.seed_for(self.seed, trial))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for indices, accuracy in tried:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(zip(CHOICES, indices, strict=True)), distributions=dict(space), value=accuracy
                )
            )
        found = study.ask(dict(space)).params
        return [int(found[name]) for name in CHOICES]


class Controller(nn.Module):
    """An LSTM that makes one choice in each step and gets the one before as its input."""

    def __init__(self, seed: int, hidden: int = 32, learning_rate: float = 0.02, entropy: float = 0.005) -> None:
        """entropy: weight of the entropy bonus, which keeps the controller from settling too early."""
        super().__init__()
        torch.manual_seed(common.seed_for(seed, 3))
        self.seed, self.entropy = seed, entropy
        self.hidden, self.baseline = hidden, 0.0
        self.begin = nn.Parameter(torch.zeros(1, hidden))
        self.cell = nn.LSTMCell(hidden, hidden)
        self.embeddings = nn.ModuleList(nn.Embedding(size, hidden) for size in SIZES)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in SIZES)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.rewarded = 0

    def choose(self, pick: Callable[[int, Tensor], int]) -> tuple[Indices, list[Tensor]]:
        """Makes the choices one after the other; `pick` gets the number and the logits of each.

        Returns the picked indices and the logits.
        """
        state = (torch.zeros(1, self.hidden), torch.zeros(1, self.hidden))
        input_: Tensor = self.begin
        indices: Indices = []
        logits: list[Tensor] = []
        for step, (head, embedding) in enumerate(zip(self.heads, self.embeddings, strict=True)):
            state = self.cell(input_, state)
            logits.append(head(state[0])[0])
            indices.append(pick(step, logits[-1]))
            input_ = embedding(torch.tensor(indices[-1:]))
        return indices, logits

    def propose(self, trial: int, tried: Sequence[tuple[Indices, float]]) -> Indices:
        generator = torch.Generator().manual_seed(common.seed_for(self.seed, trial))
        with torch.no_grad():
            return self.choose(lambda _, logits: int(torch.multinomial(logits.softmax(0), 1, generator=generator)))[0]

    def learn(self, indices: Indices, reward: float) -> None:
        """Takes a step of REINFORCE. The baseline is the moving average of earlier rewards."""
        advantage = reward - self.baseline if self.rewarded else 0.0
        logs = [logits.log_softmax(0) for logits in self.choose(lambda step, _: indices[step])[1]]
        log_probability = torch.stack([log[index] for log, index in zip(logs, indices, strict=True)]).sum()
        entropy_of_choices = torch.stack([-(log.exp() * log).sum() for log in logs]).sum()
        self.optimizer.zero_grad()
        (-advantage * log_probability - self.entropy * entropy_of_choices).backward()
        self.optimizer.step()
        self.baseline = 0.8 * self.baseline + 0.2 * reward if self.rewarded else reward
        self.rewarded += 1

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.state_dict(), "optimizer": self.optimizer.state_dict(), "baseline": self.baseline,
            "rewarded": self.rewarded,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline, self.rewarded = float(state["baseline"]), int(state["rewarded"])


METHODS = {"controller": Controller, "random": Random, "tpe": Tpe}


def architecture(indices: Indices) -> dict[str, float]:
    return {name: options[index] for (name, options), index in zip(CHOICES.items(), indices, strict=True)}


def build(chosen: dict[str, float]) -> digits.Network:
    layers = [(int(chosen[f"filters{one}"]), int(chosen[f"kernel{one}"])) for one in (1, 2)]
    layers += [(int(chosen["filters3"]), 3)] if chosen["filters3"] else []
    return digits.Network(
        digits.Cnn(layers, int(chosen["dense"]), bool(chosen["batch_norm"]), chosen["dropout"], classes=10)
    )


def fit(run: common.Run, indices: Indices, data: digits.Digits, steps: int, arguments: argparse.Namespace) -> nn.Module:
    """Trains the network of an architecture. Its random weights depend on the run's seed alone."""
    torch.manual_seed(common.seed_for(run.seed, 4))
    model = build(architecture(indices)).to(run.device)
    optimizer, parallel = torch.optim.Adam(model.parameters()), run.parallel(model)
    for step in range(steps):
        torch.manual_seed(common.seed_for(run.seed, 5, step, run.rank))
        common.set_learning_rate(optimizer, common.learning_rate_at(step, steps, arguments.learning_rate))
        batch = run.share(common.batch_at(step, arguments.train_batch_size, len(data), run.seed))
        loss = F.cross_entropy(parallel(data.pictures[batch].to(run.device)), data.labels[batch].to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="search", description=__doc__.partition("\n")[0])
    common.add_arguments(parser, checkpoint_every=1)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's four files (fetched where absent)")
    parser.add_argument("--method", choices=tuple(METHODS), default="controller", help="(%(default)s)")
    parser.add_argument("--trials", type=common.whole, default=40, help="architectures to try (%(default)s)")
    parser.add_argument("--trial-digits", type=common.whole, default=2000, help="to train each with (%(default)s)")
    parser.add_argument("--trial-steps", type=common.whole, default=100, help="batches of each (%(default)s)")
    parser.add_argument(
        "--holdout", type=common.whole, default=5000, help="training digits to judge with (%(default)s)"
    )
    parser.add_argument("--train-steps", type=common.whole, default=1000, help="of the best in the end (%(default)s)")
    parser.add_argument("--train-batch-size", type=common.whole, default=64, help="digits a step (%(default)s)")
    parser.add_argument("--learning-rate", type=common.positive, default=0.003, help="at its peak (%(default)s)")
    return common.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with common.run_of(arguments) as run:
        search(arguments, run)


def search(arguments: argparse.Namespace, run: common.Run) -> None:
    bad = common.BadRecords(arguments.on_bad_record)
    folder = common.local_path(arguments.data_dir) if arguments.data_dir else None
    everything, test = digits.read_digits(folder, "train", bad), digits.read_digits(folder, "test", bad)
    bad.close(run)
    # All seeds and methods are judged by the same digits.
    rest, judges = digits.split(everything, arguments.holdout, seed=0)
    few, _ = digits.split(rest, len(rest) - arguments.trial_digits, seed=0)

    proposer: Proposer = METHODS[arguments.method](run.seed)
    done, state = run.restore(data=common.data_sha256([everything.pictures, everything.labels]))
    tried: list[tuple[Indices, float]] = [(list(one), float(two)) for one, two in state.get("tried", [])]
    if state:
        proposer.restore(state["proposer"])
    for trial in run.steps(done, arguments.trials):
        indices = proposer.propose(trial, tried)
        model = fit(run, indices, few, arguments.trial_steps, arguments)
        accuracy = run.agree(digits.accuracy(model, judges, run.device))
        proposer.learn(indices, -float(np.log(max(1 - accuracy, 1 / len(judges)))))
        tried.append((indices, accuracy))
        done = trial + 1
        run.report(done, accuracy=accuracy, best=max(one for _, one in tried))
        if done % arguments.checkpoint_every == 0 or done == arguments.trials:
            run.save(done, {"tried": tried, "proposer": proposer.state()})

    best, judged = max(tried, key=lambda one: one[1])
    chosen = architecture(best)
    run.say(f"best of {len(tried)}: {judged:.4f} with {chosen}", {"best": judged, "architecture": chosen})
    model = fit(run, best, everything, arguments.train_steps, arguments)
    if run.is_chief:
        metrics = {"accuracy": digits.accuracy(model, test, run.device), "best_trial_accuracy": judged}
        run.report_trial(done, **metrics)
        origin = {
            "workload": "search", "architecture": chosen, "skipped": bad.count, "options": run.identity,
            "trial_accuracies": [one for _, one in tried],
        }  # fmt: skip
        digits.export_digits(model, test, range(10), metrics, origin, run.folders.model)
        run.say_result(metrics, bad.count)


if __name__ == "__main__":
    common.command(main)
