"""Measures how close the digits that a GAN draws are to real ones, in the eyes of a network that recognises digits.

    python -m training.gan_evaluation runs/gan/model runs/dcgan/model --classifier runs/gan-classifier

A folder is an exported generator of training/gan.py. The classifier is a run of training/digits.py, which is trained
first if its folder has none; figures of two classifiers cannot be compared. The table has for each folder, and for as
many digits of the training set, which is the best that a generator can reach:

- the Fréchet distance between the features of samples and of the test set, after Heusel et al., 2017,
  https://arxiv.org/abs/1706.08500, with the classifier's last hidden layer instead of Inception's: 0 for the same
  distribution;
- the share of samples that the classifier recognises as some digit, with a probability above 0.9;
- the mean entropy of the classes that the classifier sees in one sample: near 0 if each sample is surely some digit;
- the entropy of the classes of all samples together: log 10 = 2.303 nats if all digits are equally frequent. The
  exponential of the difference of these two is the score of Salimans et al., 2016, https://arxiv.org/abs/1606.03498.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from serving.exported.model_contract import PROGRAM, Contract, ContractError, Number, Values
from serving.exported.program import Program, ProgramError
from training import common, digits
from training.gan import scaled

BATCH = 500  # pictures at once
SURE = 0.9  # the probability above which a digit counts as recognised
REAL = "real digits"  # the row of the training set
CLASSIFIER_OPTIONS = ("--model", "cnn", "--batch-norm", "--train-steps", "600")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The figures of one set of pictures. recognised: a share. entropy, class_entropy: in nats."""

    frechet_distance: float
    recognised: float
    entropy: float
    class_entropy: float


def frechet_distance(one: Array, other: Array) -> float:
    """Returns the squared Fréchet distance between the normal distributions with the means and covariances of two sets.

    one, other: features, shape [n, features]. |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), where the eigenvalues of C1 C2
    are those of the symmetric C1^½ C2 C1^½, so that no root of a general matrix is needed.
    """
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (one, other)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ covariances[1] @ root)
    means = np.square(one.mean(0) - other.mean(0)).sum()
    return float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(mixed.clip(0)).sum())


def entropies(probabilities: Array) -> tuple[float, float]:
    """Returns the mean entropy of the rows, and the entropy of their mean, in nats. probabilities: [n, classes]."""

    def entropy(rows: Array) -> Array:
        found: Array = -(rows * np.log(rows.clip(1e-30))).sum(-1)
        return found

    return float(entropy(probabilities).mean()), float(entropy(probabilities.mean(0)))


class Classifier:
    """The network of a run of training/digits.py, which trains first if the folder has no model."""

    def __init__(self, folder: Path, data_dir: str | None) -> None:
        """Raises UsageError if the folder has a run of another network than the CNN for all ten digits."""
        if not (folder / "model" / "contract.json").exists():
            data = ["--data-dir", data_dir] if data_dir else []
            digits.main(["--job-dir", str(folder), *CLASSIFIER_OPTIONS, *data])
        try:
            newest = max((folder / "checkpoints").glob("step-*.pt"))
            options = torch.load(newest, weights_only=True)["identity"]
            names = ("model", "classes", "batch_norm", "dprob", "nfil1", "nfil2")
            arguments = argparse.Namespace(**{name: ast.literal_eval(options[name]) for name in names})
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise common.UsageError(f"{folder} has no checkpoint of a digits run: {error}") from None
        if arguments.model != "cnn" or len(arguments.classes) != 10:
            raise common.UsageError(f"{folder} has another network than the CNN for ten digits; give another folder")
        self.network = digits.build(arguments)
        digits.take_weights(self.network, folder)
        self.network.eval()

    def __call__(self, pictures: Tensor) -> tuple[Array, Array]:
        """Returns the last hidden layer [n, units] and the probabilities [n, 10] for pictures [n, 28, 28] uint8."""
        cnn = self.network.inner
        assert isinstance(cnn, digits.Cnn)
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for some in pictures.split(BATCH):
                hidden = cnn.dense(cnn.features(some.float()[:, None] / 255))
                found.append((hidden, cnn.head(hidden).softmax(1)))
        hidden, probabilities = (torch.cat(each).double().numpy() for each in zip(*found, strict=True))
        return hidden, probabilities


def reduced(pictures: Tensor) -> Tensor:
    """Pictures [n, size, size] from 0 to 1 → [n, 28, 28] uint8, as the classifier knows them."""
    small = F.adaptive_avg_pool2d(pictures[:, None], 32)[:, 0, 2:30, 2:30]
    return (small.clamp(0, 1) * 255).round().to(torch.uint8)


class Generator:
    """An exported generator. size: the sides of its pictures."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if the folder has none."""
        try:
            contract = Contract.load(folder)
            self._program = Program(folder / PROGRAM)
        except (ContractError, ProgramError) as error:
            raise common.UsageError(str(error)) from None
        match contract.inputs, contract.outputs:
            case (Number(shape=(latent,)),), (Values(shape=(height, width)),) if height == width >= 32:
                self.size, self._latent = height, latent
            case _:
                raise common.UsageError(f"{folder} has no generator: it must take a latent and return a picture")

    def __call__(self, count: int, seed: int) -> Tensor:
        """Returns `count` pictures [n, 28, 28] uint8."""
        random = torch.Generator().manual_seed(common.seed_for(seed, 7))
        latents = torch.randn(count, self._latent, generator=random)
        return torch.cat([reduced(self._program(some)[0]) for some in latents.split(BATCH)])


def evaluate(
    folders: Sequence[Path], classifier: Classifier, train: Tensor, test: Tensor, count: int, seed: int
) -> dict[str, Scores]:
    """Returns the scores of each generator and of real digits.

    train, test: pictures [n, 28, 28] uint8. count: samples of each. The test set is enlarged and reduced again as the
    digits were from which a generator learned, so that only the generator makes a difference.
    """
    references: dict[int, Array] = {}

    def scores(pictures: Tensor, size: int) -> Scores:
        if size not in references:
            seen = [reduced((scaled(some, size)[:, 0] + 1) / 2) for some in test.split(BATCH)]
            references[size] = classifier(torch.cat(seen))[0]
        features, probabilities = classifier(pictures)
        recognised = float((probabilities.max(1) > SURE).mean())
        return Scores(frechet_distance(features, references[size]), recognised, *entropies(probabilities))

    chosen = np.random.default_rng([seed, 8]).permutation(len(train))[:count]
    found = {REAL: scores(train[chosen], 32)}
    for folder in folders:
        generator = Generator(folder)
        found[str(folder)] = scores(generator(count, seed), generator.size)
    return found


def table(found: dict[str, Scores]) -> str:
    """Returns the scores as a Markdown table."""
    rows = ["| pictures | Fréchet distance | recognised | entropy of one | entropy of all |", "|---" * 5 + "|"]
    for name, one in found.items():
        figures = f"{one.frechet_distance:.2f} | {one.recognised:.1%} | {one.entropy:.3f} | {one.class_entropy:.3f}"
        rows.append(f"| {name} | {figures} |")
    return "\n".join(rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="gan_evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL", help="folders of exported generators")
    parser.add_argument(
        "--classifier", type=Path, required=True, metavar="DIR",
        help="folder of a digits run; it is trained there if it is absent",
    )  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's four files (fetched)")
    parser.add_argument("--samples", type=common.whole, default=10000, help="of each generator (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON, too")
    arguments = parser.parse_args(argv)
    folder = common.local_path(arguments.data_dir) if arguments.data_dir else None
    bad = common.BadRecords("skip")
    train, test = (digits.read_digits(folder, kind, bad).pictures for kind in ("train", "test"))
    if min(arguments.samples, len(test)) < 2:
        raise common.UsageError("at least two samples and two digits are needed")
    classifier = Classifier(arguments.classifier, arguments.data_dir)
    found = evaluate(arguments.folders, classifier, train, test, arguments.samples, arguments.seed)
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    common.command(main)
