"""Recognises handwritten digits (MNIST) with a linear model, a deep one, a CNN, or a backbone of torchvision.

    python -m training.digits --job-dir output --model cnn --batch-norm --train-steps 2000

Options for experiments: few labels (--labels-per-class), augmentation (--augment), and transfer from a network that was
trained on other classes (--classes, --init-from). The file goes from records over networks and augmentation to training
and export.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from serving.exported.model_contract import Contract, Labels, Picture, Values
from training import common
from training.export import export

SIDE = 28
FILES = {  # as MNIST is published
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
MODELS = ("linear", "dnn", "dnn_dropout", "cnn", "resnet18")
AUGMENTATIONS = ("crop", "flip", "brightness", "contrast")
SYMMETRIC = (0, 1, 8)  # the mirror images of other digits are not digits


@dataclass
class Digits:
    """Pictures [n, 28, 28] uint8 and their labels [n] int64, which are indices of the list of classes."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, indices: np.ndarray[Any, Any]) -> Digits:
        return Digits(self.pictures[indices], self.labels[indices])


def read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Returns the complete records of a file of bytes in the idx format (http://yann.lecun.com/exdb/mnist/).

    file: gzipped or not; if it is truncated, the last records are missing. shape: of one record. Raises UsageError.
    """
    content = file.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise common.UsageError(f"{file} is truncated or damaged; fetch it again") from None
    header = np.frombuffer(content[: 4 * (2 + len(shape))].ljust(4 * (2 + len(shape)), b"\0"), ">i4")
    if header[:1] != 0x800 + 1 + len(shape) or tuple(header[2:]) != shape:
        raise common.UsageError(f"{file} is not an idx file of bytes with records of the shape {list(shape)}")
    size = int(np.prod(shape))
    body = np.frombuffer(content, np.uint8, offset=header.nbytes)
    return body[: min(int(header[1]), len(body) // size) * size].reshape(-1, *shape)


def read_digits(folder: Path | None, kind: str, bad: common.BadRecords) -> Digits:
    """Returns the digits of a folder with the four published files, or of fetched files, sorted by content.

    MNIST is published in several orders; sorting makes runs on all of them equal. A record is broken if its label is
    not a digit, or if only one of the two files has it.
    """
    files = [folder / name if folder else common.published(name) for name in FILES[kind]]
    pictures, labels = read_idx(files[0], (SIDE, SIDE)), read_idx(files[1], ())
    whole = min(len(pictures), len(labels))
    for absent in range(whole, max(len(pictures), len(labels))):
        bad.add(files[int(len(labels) <= absent)], absent + 1, "the record is missing")
    pictures, labels = pictures[:whole], labels[:whole]
    for record in np.flatnonzero(labels > 9):
        bad.add(files[1], int(record) + 1, f"the label is {labels[record]}, not a digit")
    pictures, labels = pictures[labels <= 9], labels[labels <= 9]
    rows = np.ascontiguousarray(np.concatenate([labels[:, None], pictures.reshape(len(pictures), -1)], 1))
    order = np.argsort(rows.view(f"S{rows.shape[1]}")[:, 0], kind="stable")
    return Digits(torch.from_numpy(pictures[order]), torch.from_numpy(labels[order].astype(np.int64)))


def of_classes(digits: Digits, classes: Sequence[int]) -> Digits:
    """Returns the digits of some classes; their labels are indices of `classes`."""
    index = torch.full((10,), -1)
    index[classes] = torch.arange(len(classes))
    labels = index[digits.labels]
    return Digits(digits.pictures[labels >= 0], labels[labels >= 0])


def few_of_each(digits: Digits, count: int, seed: int) -> Digits:
    """Returns `count` digits of each class, chosen at random."""
    order = np.random.default_rng([seed, 1]).permutation(len(digits))
    labels = digits.labels.numpy()[order]
    return digits.chosen(np.concatenate([order[labels == label][:count] for label in np.unique(labels)]))


def split(digits: Digits, count: int, seed: int) -> tuple[Digits, Digits]:
    """Returns all digits but `count`, and those `count`, chosen at random."""
    order = np.random.default_rng([seed, 2]).permutation(len(digits))
    return digits.chosen(order[count:]), digits.chosen(order[:count])


class Cnn(nn.Module):
    """Convolutions and a dense layer: pictures [n, 1, 28, 28] → logits. The first two convolutions are pooled."""

    def __init__(
        self, layers: Sequence[tuple[int, int]], dense: int, batch_norm: bool, dropout: float, classes: int
    ) -> None:
        """layers: number of filters and kernel size of each convolution. dense: units of the dense layer."""
        super().__init__()
        features: list[nn.Module] = []
        channels, side = 1, SIDE
        for number, (filters, kernel) in enumerate(layers):
            features.append(nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=not batch_norm))
            features += [nn.BatchNorm2d(filters)] if batch_norm else []
            features.append(nn.ReLU())
            if number < 2:
                features.append(nn.MaxPool2d(2))
                side //= 2
            channels = filters
        self.features = nn.Sequential(*features)
        norm: list[nn.Module] = [nn.BatchNorm1d(dense)] if batch_norm else []
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * side * side, dense, bias=not batch_norm), *norm, nn.ReLU(),
            nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(dense, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dense(self.features(pictures)))
        return logits


def dnn(units: Sequence[int], batch_norm: bool, dropout: float, classes: int) -> nn.Sequential:
    """Dense layers: pictures [n, 1, 28, 28] → logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = SIDE * SIDE
    for one in units:
        layers += [
            nn.Linear(width, one, bias=not batch_norm),
            *([nn.BatchNorm1d(one)] if batch_norm else []),
            nn.ReLU(),
        ]
        width = one
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, classes))


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with its ImageNet weights and a new last layer."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, classes: int) -> None:
        """Fetches the weights if they are absent. Raises UsageError if that fails."""
        super().__init__()
        from torchvision.models import ResNet18_Weights, resnet18

        weights = ResNet18_Weights.IMAGENET1K_V1
        try:
            self.network = resnet18(weights=weights, progress=False)
        except (OSError, RuntimeError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise common.UsageError(
                f"the weights of --model resnet18 cannot be fetched ({error}); put {weights.url} into {file}, or use "
                "--model cnn"
            ) from None
        self.network.fc = nn.Linear(self.network.fc.in_features, classes)
        preprocess = weights.transforms()
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(preprocess.std)[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        # Twice the size, because the network halves the sides five times.
        colour = F.interpolate(pictures, scale_factor=2.0, mode="bilinear").expand(-1, 3, -1, -1)
        logits: Tensor = self.network((colour - self.mean) / self.deviation)
        return logits


class Network(nn.Module):
    """Pictures [n, 28, 28] uint8 → logits [n, classes]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.inner(pictures.float().unsqueeze(1) / 255)
        return logits


def build(arguments: argparse.Namespace) -> Network:
    """Returns the network that the options describe, with random weights."""
    classes, norm = len(arguments.classes), arguments.batch_norm
    if arguments.model == "linear":
        return Network(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes)))
    if arguments.model == "cnn":
        layers = [(arguments.nfil1, 5), (arguments.nfil2, 5)]
        return Network(Cnn(layers, 300, norm, arguments.dprob, classes))
    if arguments.model == "resnet18":
        return Network(ResNet18(classes))
    dropout = arguments.dprob if arguments.model == "dnn_dropout" else 0.0
    return Network(dnn([300, 100, 30], norm, dropout, classes))


def take_weights(model: nn.Module, folder: Path) -> str:
    """Loads the weights of a run's newest checkpoint, except those of the last layer if the classes differ in number.

    Returns the SHA-256 of the checkpoint. Raises UsageError.
    """
    try:
        file = max((folder / "checkpoints").glob("step-*.pt"))
        state = torch.load(file, map_location="cpu", weights_only=True)["state"]["model"]
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise common.UsageError(f"{folder} has no checkpoint of a digits run: {error}") from None
    own = model.state_dict()
    fitting = {name: one for name, one in state.items() if name in own and own[name].shape == one.shape}
    if len(fitting) < len(own) - 2:
        raise common.UsageError(
            f"{file} belongs to another network; use the same --model, --batch-norm, --nfil1 and --nfil2"
        )
    model.load_state_dict(own | fitting)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def augmentation(names: Sequence[str], classes: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function that takes pictures [n, 28, 28] uint8 and labels [n] and changes each picture at random."""
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    if "crop" in names:
        steps += [v2.Resize(SIDE + 4, antialias=True), v2.RandomCrop(SIDE)]
    if "brightness" in names or "contrast" in names:
        steps.append(
            v2.ColorJitter(brightness=0.4 if "brightness" in names else 0, contrast=0.4 if "contrast" in names else 0)
        )
    change = v2.Compose(steps) if steps else nn.Identity()
    flip = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])

    def augment(pictures: Tensor, labels: Tensor) -> Tensor:
        # One by one, because a transform draws one set of random parameters for all pictures that it gets.
        changed = []
        for picture, label in zip(pictures.unsqueeze(1), labels.tolist(), strict=True):
            one = change(picture)
            changed.append(flip(one) if "flip" in names and classes[label] in SYMMETRIC else one)
        return torch.cat(changed)

    return augment


def accuracy(model: nn.Module, digits: Digits, device: torch.device) -> float:
    """Returns the fraction of digits that are recognised."""
    model.eval()
    right = 0
    with torch.no_grad():
        for pictures, labels in zip(digits.pictures.split(1000), digits.labels.split(1000), strict=True):
            right += int((model(pictures.to(device)).argmax(1).cpu() == labels).sum())
    model.train()
    return right / len(digits)


class Served(nn.Module):
    """The served network: pictures [n, 28, 28] uint8 → class ids [n, 1], logits and probabilities [n, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(pictures)
        return logits.argmax(1, keepdim=True), logits, logits.softmax(1)


def contract(classes: Sequence[int], metrics: dict[str, float], origin: dict[str, object]) -> Contract:
    """Returns the contract, to which `export` adds the program's SHA-256 and the examples."""
    return Contract(
        name="digits",
        sha256="",
        inputs=(Picture("image", (SIDE, SIDE)),),
        outputs=(
            Values("class_ids", (1,), "int64"),
            Labels("classes", "class_ids", tuple(map(str, classes))),
            Values("logits", (len(classes),)),
            Values("probabilities", (len(classes),)),
        ),
        examples=(),
        metrics=metrics,
        origin=origin,
    )


def export_digits(
    model: nn.Module, digits: Digits, classes: Sequence[int], metrics: dict[str, float], origin: dict[str, object],
    folder: Path,
) -> None:  # fmt: skip
    """Exports the network; two of the digits become examples of the contract."""
    instances = [{"image": picture.tolist()} for picture in digits.pictures[:: max(1, len(digits) // 2)][:2]]
    export(Served(model), contract(classes, metrics, origin), instances, folder)


def some_classes(text: str) -> list[int]:
    """Returns [0, 1, 2, 3, 4] for "01234", for argparse."""
    classes = sorted({int(one) for one in text})
    if len(classes) < 2:
        raise ValueError
    return classes


def some_augmentations(text: str) -> list[str]:
    """Returns ["contrast", "crop"] for "crop,contrast", for argparse."""
    names = sorted({one for one in text.split(",") if one})
    if set(names) - set(AUGMENTATIONS):
        raise ValueError
    return names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="digits", description=__doc__.partition("\n")[0])
    common.add_arguments(parser, checkpoint_every=200)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's four files (fetched)")
    parser.add_argument("--model", choices=MODELS, default="cnn", help="(%(default)s)")
    parser.add_argument("--batch-norm", action="store_true", help="normalise after each layer except the last")
    parser.add_argument("--train-steps", type=common.whole, default=2000, help="batches to train (%(default)s)")
    parser.add_argument("--eval-every", type=common.whole, default=500, help="steps between evaluations (%(default)s)")
    parser.add_argument("--train-batch-size", type=common.whole, default=128, help="digits a step (%(default)s)")
    parser.add_argument("--learning-rate", type=common.positive, default=0.003, help="at its peak (%(default)s)")
    parser.add_argument("--nfil1", type=common.whole, default=10, help="filters of the first layer (%(default)s)")
    parser.add_argument("--nfil2", type=common.whole, default=20, help="filters of the second layer (%(default)s)")
    parser.add_argument("--dprob", type=common.fraction, default=0.25, help="dropout (%(default)s)")
    parser.add_argument(
        "--augment", type=some_augmentations, default=[], metavar="LIST", help=f"some of {','.join(AUGMENTATIONS)}"
    )
    parser.add_argument("--classes", type=some_classes, default=list(range(10)), metavar="0123456789", help="digits")
    parser.add_argument(
        "--labels-per-class", type=common.whole, metavar="N", help="digits of each class to train with (all)"
    )
    parser.add_argument(
        "--holdout", type=common.whole, metavar="N", help="evaluate on N training digits instead of the test set"
    )
    parser.add_argument("--init-from", metavar="DIR", help="start from the weights of the run with this --job-dir")
    return common.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with common.run_of(arguments) as run:
        train(arguments, run)


def train(arguments: argparse.Namespace, run: common.Run) -> None:
    bad = common.BadRecords(arguments.on_bad_record)
    folder = common.local_path(arguments.data_dir) if arguments.data_dir else None
    digits = of_classes(read_digits(folder, "train", bad), arguments.classes)
    if arguments.holdout:
        digits, eval_digits = split(digits, arguments.holdout, seed=0)
    else:
        eval_digits = of_classes(read_digits(folder, "test", bad), arguments.classes)
    bad.close(run)
    if arguments.labels_per_class:
        digits = few_of_each(digits, arguments.labels_per_class, run.seed)
    if len(digits) < 2 or len(eval_digits) < 2:
        raise common.UsageError(f"{len(digits)} digits to train with and {len(eval_digits)} to evaluate: too few")

    model = build(arguments)
    initial = take_weights(model, common.local_path(arguments.init_from)) if arguments.init_from else ""
    model.to(run.device)
    augment = augmentation(arguments.augment, arguments.classes) if arguments.augment else None
    optimizer = torch.optim.Adam(model.parameters())
    done, state = run.restore(data=common.data_sha256([digits.pictures, digits.labels]), initial=initial)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    last, parallel = arguments.train_steps, run.parallel(model)
    for step in run.steps(done, last):
        common.set_learning_rate(optimizer, common.learning_rate_at(step, last, arguments.learning_rate))
        batch = run.share(common.batch_at(step, arguments.train_batch_size, len(digits), run.seed))
        pictures, labels = digits.pictures[batch], digits.labels[batch]
        if augment:
            pictures = augment(pictures, labels)
        loss = F.cross_entropy(parallel(pictures.to(run.device)), labels.to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % 100 == 0:
            run.report(done, loss=loss.item())
        if done % arguments.eval_every == 0 and done < last and run.is_chief:
            run.report(done, accuracy=accuracy(model, eval_digits, run.device))
        if done % arguments.checkpoint_every == 0 or done == last:
            run.save(done, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    if run.is_chief:
        metrics = {"accuracy": accuracy(model, eval_digits, run.device)}
        run.report(done, **metrics)
        run.report_trial(done, **metrics)
        origin = {"workload": "digits", "records": len(digits), "skipped": bad.count, "options": run.identity}
        export_digits(model, eval_digits, arguments.classes, metrics, origin, run.folders.model)
        run.say_result(metrics, bad.count)


if __name__ == "__main__":
    common.command(main)
