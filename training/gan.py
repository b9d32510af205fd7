"""Draws handwritten digits with a light-weight GAN (Liu et al., 2021), or with a plain DCGAN for comparison.

    python -m training.gan --job-dir output --image-size 32 --steps 3000

Every --eval-every steps a sheet of samples goes to TensorBoard and into `samples/` beside its files. The exported model
takes a latent and returns a picture; training/gan_evaluation.py measures how close such pictures are to real ones. The
networks are in training/gan_networks.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from serving.exported.model_contract import Contract, Number, Values
from training import common, digits, gan_networks
from training.export import export

SHEET = 8  # rows and columns of a sheet of samples
STRIPS, FRAMES = 6, 12  # interpolations on a picture, and pictures of each
COMPARED = 200  # samples whose distances make the diversity
# The defaults of the options that the two models differ in. DCGAN's learning rate is its paper's, and a plain DCGAN has
# neither augmentation nor averaging.
DEFAULTS: dict[str, dict[str, object]] = {
    "light": {"learning_rate": 0.0005, "augment": sorted(gan_networks.AUGMENTATIONS), "ema_decay": 0.998},
    "dcgan": {"learning_rate": 0.0002, "augment": [], "ema_decay": 0.0},
}


def scaled(pictures: Tensor, size: int) -> Tensor:
    """Pictures [n, 28, 28] uint8 → [n, 1, size, size] from -1 to 1: padded to 32 pixels, and then enlarged."""
    padded = F.pad(pictures.float()[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return padded if size == 32 else F.interpolate(padded, size=size, mode="bilinear", antialias=True)


def slerp(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Interpolates between two latents [latent] on a great circle (spherically), because normal latents are near a
    sphere and the points of a straight line between two of them are not.

    share: [n], 0 for the first latent and 1 for the other. Returns [n, latent].
    """
    cosine = F.cosine_similarity(one, other, dim=0).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-4:
        return torch.lerp(one, other, share[:, None])
    ways = torch.sin((1 - share) * angle)[:, None] * one + torch.sin(share * angle)[:, None] * other
    return ways / angle.sin()


def tiled(pictures: Tensor, columns: int) -> Tensor:
    """Pictures [n, 1, size, size] from -1 to 1 → one picture [height, width] uint8, row by row."""
    count, _, size, _ = pictures.shape
    rows = pictures.reshape(count // columns, columns, size, size).transpose(1, 2)
    grey = (rows.reshape(-1, columns * size).clamp(-1, 1) + 1) * 127.5
    return grey.round().to(torch.uint8).cpu()


def samples(generator: nn.Module, latents: Tensor) -> Tensor:
    """Returns the pictures of latents [n, latent], by the generator's averages of the batches that it has seen."""
    was = generator.training
    generator.eval()
    with torch.no_grad():
        pictures = torch.cat([generator(some) for some in latents.split(SHEET**2)])
    generator.train(was)
    return pictures


def fixed_latents(count: int, latent: int, seed: int) -> Tensor:
    """Returns latents [count, latent] that are the same at every step."""
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(common.seed_for(seed, 6)))


def discriminator_loss(real: Tensor, fake: Tensor, hinge: bool) -> Tensor:
    """hinge: the light GAN's loss; else DCGAN's cross-entropy. real, fake: logits."""
    if hinge:
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, hinge: bool) -> Tensor:
    return -fake.mean() if hinge else F.softplus(-fake).mean()


def averaged(decay: float) -> Callable[..., None]:
    """Returns a function that updates the moving average of weights, for AveragedModel.

    The decay grows from 0.1 to `decay`, because the first weights are random and a slow average keeps them long.
    """

    def update(average: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        done = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(average, weights, updates)

    return update


class Gan:
    """A generator and a discriminator with their optimisers, and the moving average of the generator."""

    def __init__(self, arguments: argparse.Namespace, run: common.Run) -> None:
        generator, discriminator = gan_networks.build(
            arguments.model, arguments.image_size, arguments.latent, arguments.width
        )
        self.run, self.augment, self.latent = run, arguments.augment, int(arguments.latent)
        self.light = arguments.model == "light"
        self.bfloat16 = run.device.type == "cuda"
        # In this order of the numbers in memory convolutions are a quarter faster, on a CPU too.
        self.generator, self.discriminator = (
            one.to(memory_format=torch.channels_last).to(run.device) for one in (generator, discriminator)
        )
        self.average = AveragedModel(self.generator, multi_avg_fn=averaged(arguments.ema_decay), use_buffers=True)
        betas = (0.5, 0.999)  # of both papers
        self.optimizers = [
            torch.optim.Adam(network.parameters(), betas=betas) for network in (self.generator, self.discriminator)
        ]

    @property
    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "model": self.generator, "discriminator": self.discriminator, "average": self.average,
            "optimizer": self.optimizers[0], "discriminator_optimizer": self.optimizers[1],
        }  # fmt: skip

    def step(self, real: Tensor, rate: float) -> dict[str, Tensor]:
        """Trains both networks with real pictures [n, 1, size, size]. Returns the losses."""
        for optimizer in self.optimizers:
            common.set_learning_rate(optimizer, rate)
        latents = torch.randn(len(real), self.latent).to(self.run.device)
        with self._precision():
            fake = self.generator(latents)
            reconstruction = torch.zeros((), device=self.run.device)
            changed = gan_networks.augment(real, self.augment)
            if isinstance(self.discriminator, gan_networks.LightDiscriminator):
                judged, reconstruction = self.discriminator.judged_and_reconstructed(changed)
            else:
                judged = self.discriminator(changed)
            judged_fake = self.discriminator(gan_networks.augment(fake.detach(), self.augment))
            judging = discriminator_loss(judged.float(), judged_fake.float(), self.light)
        self._learn(1, judging + reconstruction)
        self.discriminator.requires_grad_(False)  # saves the gradients of its weights
        with self._precision():
            fooling = generator_loss(self.discriminator(gan_networks.augment(fake, self.augment)).float(), self.light)
        self._learn(0, fooling)
        self.discriminator.requires_grad_(True)
        self.average.update_parameters(self.generator)
        return {"loss": judging + reconstruction, "generator_loss": fooling, "reconstruction": reconstruction}

    def _precision(self) -> torch.autocast:
        """Returns the context of a forward pass."""
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _learn(self, number: int, loss: Tensor) -> None:
        optimizer = self.optimizers[number]
        optimizer.zero_grad()
        loss.backward()
        if self.run.processes > 1:
            for group in optimizer.param_groups:
                for one in group["params"]:
                    torch.distributed.all_reduce(one.grad)
                    one.grad /= self.run.processes
        optimizer.step()

    def draw(self, step: int) -> None:
        """Shows a sheet of samples."""
        sheet = samples(self.average, fixed_latents(SHEET**2, self.latent, self.run.seed).to(self.run.device))
        self.run.show(step, "samples", tiled(sheet, SHEET).numpy())

    def draw_interpolations(self, step: int) -> None:
        """Shows strips of pictures between two latents."""
        ends = fixed_latents(SHEET**2, self.latent, self.run.seed)[: 2 * STRIPS]
        shares = torch.linspace(0, 1, FRAMES)
        between = torch.cat([slerp(one, other, shares) for one, other in zip(ends[::2], ends[1::2], strict=True)])
        pictures = samples(self.average, between.to(self.run.device))
        self.run.show(step, "interpolation", tiled(pictures, FRAMES).numpy())

    def diversity(self, real: Tensor, size: int) -> float:
        """Returns the mean distance between two samples, divided by that between two real pictures [n, 28, 28] uint8.

        A generator that draws the same picture again and again has 0.
        """
        some = torch.from_numpy(common.batch_at(0, COMPARED, len(real), self.run.seed))
        drawn = samples(self.average, fixed_latents(COMPARED, self.latent, self.run.seed).to(self.run.device))
        distances = [torch.pdist(one.flatten(1)).mean() for one in (drawn.cpu(), scaled(real[some], size))]
        return float(distances[0] / distances[1])


class Served(nn.Module):
    """The served generator: latents [n, latent] → pictures [n, size, size] from 0 (black) to 1 (white)."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator.to(memory_format=torch.contiguous_format)

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return ((self.generator(latents).squeeze(1) + 1) / 2,)


def contract(size: int, latent: int, metrics: dict[str, float], origin: dict[str, object]) -> Contract:
    """Returns the contract, to which `export` adds the program's SHA-256 and the examples.

    The picture is a list of numbers, and not of whole ones, because a server compares its examples with those of the
    machine that exported the model, where the last digits may differ.
    """
    return Contract(
        name="gan",
        sha256="",
        inputs=(Number("latent", shape=(latent,)),),
        outputs=(Values("picture", (size, size)),),
        examples=(),
        metrics=metrics,
        origin=origin,
    )


def some_augmentations(text: str) -> list[str]:
    """Returns ["brightness", "cutout"] for "cutout,brightness", for argparse."""
    names = sorted({one for one in text.split(",") if one})
    if set(names) - set(gan_networks.AUGMENTATIONS):
        raise ValueError
    return names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gan", description=__doc__.partition("\n")[0])
    common.add_arguments(parser, checkpoint_every=200)
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's four files (fetched)")
    parser.add_argument("--model", choices=tuple(DEFAULTS), default="light", help="(%(default)s)")
    parser.add_argument(
        "--image-size", type=int, choices=gan_networks.SIZES, default=32, help="sides in pixels (%(default)s)"
    )
    parser.add_argument(
        "--steps", "--train-steps", type=common.whole, default=3000, help="batches to train (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", "--train-batch-size", type=common.whole, default=32, help="digits a step (%(default)s)"
    )
    parser.add_argument(
        "--eval-every", type=common.whole, default=500, metavar="N", help="steps between sheets (%(default)s)"
    )
    parser.add_argument("--learning-rate", type=common.positive, help="at its peak (light: 0.0005; dcgan: 0.0002)")
    parser.add_argument("--latent", type=common.whole, default=64, help="numbers of a latent (%(default)s)")
    parser.add_argument(
        "--width", type=common.whole, default=8, help="filters of the light networks, in proportion (%(default)s)"
    )
    parser.add_argument(
        "--augment", type=some_augmentations, metavar="LIST",
        help=f"what the discriminator sees is changed: some of {','.join(gan_networks.AUGMENTATIONS)} "
        "(light: all; dcgan: none)",
    )  # fmt: skip
    parser.add_argument(
        "--ema-decay", type=common.fraction,
        help="decay of the generator's moving average, which is exported; 0: none (light: 0.998; dcgan: 0)",
    )  # fmt: skip
    arguments = common.parse(parser, argv)
    for name, value in DEFAULTS[arguments.model].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with common.run_of(arguments) as run:
        train(arguments, run)


def train(arguments: argparse.Namespace, run: common.Run) -> None:
    bad = common.BadRecords(arguments.on_bad_record)
    folder = common.local_path(arguments.data_dir) if arguments.data_dir else None
    pictures = digits.read_digits(folder, "train", bad).pictures
    bad.close(run)
    if len(pictures) < 2:
        raise common.UsageError(f"{len(pictures)} digits to train with: too few")

    gan = Gan(arguments, run)
    done, state = run.restore(data=common.data_sha256([pictures]))
    for name, part in gan.parts.items() if state else ():
        part.load_state_dict(state[name])

    last = arguments.steps
    for step in run.steps(done, last):
        batch = run.share(common.batch_at(step, arguments.batch_size, len(pictures), run.seed))
        real = scaled(pictures[batch].to(run.device), arguments.image_size)
        losses = gan.step(real, common.learning_rate_at(step, last, arguments.learning_rate))
        done = step + 1
        if done % 100 == 0:
            run.report(done, **{name: loss.item() for name, loss in losses.items()})
        if (done % arguments.eval_every == 0 or done == last) and run.is_chief:
            gan.draw(done)
        if done % arguments.checkpoint_every == 0 or done == last:
            run.save(done, {name: part.state_dict() for name, part in gan.parts.items()})

    if run.is_chief:
        gan.draw_interpolations(done)
        metrics = {"diversity": gan.diversity(pictures, arguments.image_size)}
        run.report(done, **metrics)
        run.report_trial(done, **metrics)
        origin = {
            "workload": "gan", "records": len(pictures), "skipped": bad.count, "options": run.identity,
            "parameters": {
                "generator": gan_networks.parameters(gan.generator),
                "discriminator": gan_networks.parameters(gan.discriminator),
            },
        }  # fmt: skip
        instances = [{"latent": one.tolist()} for one in fixed_latents(2, arguments.latent, run.seed)]
        draft = contract(arguments.image_size, arguments.latent, metrics, origin)
        export(Served(gan.average.module), draft, instances, run.folders.model)
        run.say_result(metrics, bad.count)


if __name__ == "__main__":
    common.command(main)
