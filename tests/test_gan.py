"""The GAN: its networks, augmentation, figures, resumption and exported generator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from training_data import write_digits

from serving.exported.model import ExportedModel
from serving.exported.model_contract import Contract
from training import common, gan, gan_evaluation, gan_networks
from training.gan_networks import AUGMENTATIONS, LightDiscriminator, LightGenerator, augment

TINY = ["--width", "1", "--latent", "6", "--batch-size", "4", "--checkpoint-every", "2", "--eval-every", "3"]


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    """Runs in this process, on the CPU, with one thread and without the variables of Vertex AI."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR", "AIP_TENSORBOARD_LOG_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("HEADCOUNT_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("mnist"), train=60, test=40)


def run(job_dir: Path, data: Path, *options: str) -> None:
    gan.main(["--job-dir", str(job_dir), "--data-dir", str(data), *TINY, *options])


@pytest.fixture(scope="module")
def trained(data: Path, one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("gan")
    run(folder, data, "--steps", "4")
    return folder


def state(job_dir: Path) -> dict[str, dict[str, Tensor]]:
    """The state of a run's newest checkpoint."""
    newest = max((job_dir / "checkpoints").glob("step-*.pt"))
    return dict(torch.load(newest, weights_only=True)["state"])


@pytest.mark.parametrize("size", gan_networks.SIZES)
@pytest.mark.parametrize("model", gan.DEFAULTS)
def test_the_networks_fit_each_size_and_learn(size: int, model: str) -> None:
    torch.manual_seed(0)
    generator, discriminator = gan_networks.build(model, size, latent=5, width=1)
    pictures = generator(torch.randn(2, 5))
    assert pictures.shape == (2, 1, size, size)
    assert pictures.abs().max() <= 1
    loss = discriminator(pictures).mean()
    if isinstance(discriminator, LightDiscriminator):
        logits, reconstruction = discriminator.judged_and_reconstructed(pictures)
        assert logits.ndim == 1
        loss = loss + logits.mean() + reconstruction
    loss.backward()
    for network in (generator, discriminator):
        assert all(one.grad is not None and one.grad.isfinite().all() for one in network.parameters())


@pytest.mark.parametrize("size", gan_networks.SIZES)
def test_the_two_models_are_equally_large(size: int) -> None:
    for light, dcgan in zip(*(gan_networks.build(model, size, 64, 8) for model in ("light", "dcgan")), strict=True):
        assert gan_networks.parameters(dcgan) == pytest.approx(gan_networks.parameters(light), rel=0.05)


@pytest.mark.parametrize(
    ("size", "pairs"),
    [(32, {16: 4, 32: 8}), (64, {32: 4, 64: 8}), (128, {64: 4, 128: 8}), (256, {64: 4, 128: 8, 256: 16})],
)
def test_the_largest_maps_are_excited_by_small_ones(size: int, pairs: dict[int, int]) -> None:
    generator = LightGenerator(size, latent=3, width=2).eval()
    seen: dict[int, int] = {}
    for excitation in generator.excitations.values():
        excitation.register_forward_hook(
            lambda _, given_, excited: seen.update({given_[1].shape[-1]: given_[0].shape[-1]})
        )
    generator(torch.randn(1, 3))
    assert seen == pairs


def test_an_excitation_scales_whole_channels() -> None:
    excitation = gan_networks.SkipLayerExcitation(3, 5)
    small, large = torch.randn(2, 3, 8, 8), torch.rand(2, 5, 32, 32) + 0.1
    factors = excitation(small, large) / large
    assert factors.shape == (2, 5, 32, 32)
    assert ((factors > 0) & (factors < 1)).all()
    assert torch.allclose(factors, factors[:, :, :1, :1].expand_as(factors), atol=1e-6)
    assert not torch.allclose(excitation(-small, large), excitation(small, large))


def test_the_discriminator_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    network = LightDiscriminator(32, width=1)
    pictures = torch.full((8, 1, 32, 32), -1.0)
    for number, picture in enumerate(pictures):
        picture[0, 3 * number : 3 * number + 6, 4:20] = 1
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for _ in range(15):
        _, loss = network.judged_and_reconstructed(pictures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(one.grad is not None for one in network.down.parameters())  # the features learn from it


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_changes_pictures_and_passes_gradients(name: str) -> None:
    pictures = torch.rand(6, 1, 16, 16, dtype=torch.float64) - 0.3

    def again(given_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return augment(given_, [name])

    changed = again(pictures)
    assert torch.equal(again(pictures), changed)
    assert changed.shape == pictures.shape
    assert changed.dtype == pictures.dtype
    assert len(again(pictures[:1].repeat(6, 1, 1, 1)).unique(dim=0)) > 3  # each in its own way
    assert torch.autograd.gradcheck(again, pictures[:2, :, :8, :8].clone().requires_grad_())


def test_augmentation_shifts_and_cuts_out_as_it_says() -> None:
    torch.manual_seed(1)
    picture = torch.zeros(1, 1, 32, 32)
    picture[0, 0, 16, 16] = 1
    shifted = augment(picture.repeat(200, 1, 1, 1), ["translation"]).nonzero()
    assert len(shifted) == 200
    assert shifted[:, 2:].min() == 12
    assert shifted[:, 2:].max() == 20
    cut = augment(torch.ones(200, 1, 32, 32), ["cutout"])[:, 0] == 0
    areas = cut.sum((1, 2))
    assert 0 < areas.min() < areas.max() <= 16 * 16
    boxes = cut.any(1).sum(1) * cut.any(2).sum(1)
    assert torch.equal(areas, boxes)
    assert torch.equal(augment(picture, []), picture)


@pytest.mark.parametrize("size", [32, 64])
def test_real_digits_are_enlarged_and_come_back(size: int) -> None:
    pictures = torch.zeros(3, 28, 28, dtype=torch.uint8)
    pictures[:, 6:22, 8:18] = 200
    enlarged = gan.scaled(pictures, size)
    assert enlarged.shape == (3, 1, size, size)
    assert enlarged.min() == -1
    back = gan_evaluation.reduced((enlarged[:, 0] + 1) / 2)
    assert (back.int() - pictures.int()).abs().float().mean() < (0.01 if size == 32 else 12)


def test_the_losses_are_those_of_the_papers() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert float(gan.discriminator_loss(real, fake, hinge=True)) == pytest.approx(0.25 + 0.5)
    assert float(gan.generator_loss(fake, hinge=True)) == pytest.approx(1.5)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones(2)) + entropy(fake, torch.zeros(2))
    assert float(gan.discriminator_loss(real, fake, hinge=False)) == pytest.approx(float(expected))
    assert float(gan.generator_loss(fake, hinge=False)) == pytest.approx(float(entropy(fake, torch.ones(2))))


def test_interpolation_keeps_to_the_sphere() -> None:
    one, other = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    between = gan.slerp(one, other, torch.linspace(0, 1, 5))
    assert torch.allclose(between.norm(dim=1), torch.full((5,), 3.0))
    assert torch.allclose(between[[0, -1]], torch.stack([one, other]), atol=1e-6)
    assert torch.allclose(between[2], torch.tensor([1.0, 1.0, 0.0]) * 3 / 2**0.5)
    assert torch.allclose(gan.slerp(one, 2 * one, torch.tensor([0.5])), 1.5 * one)


def test_the_average_forgets_its_random_beginning_soon() -> None:
    network = torch.nn.Linear(1, 1)
    average = AveragedModel(network, multi_avg_fn=gan.averaged(0.99))
    for weight in (5.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        torch.nn.init.constant_(network.weight, weight)
        average.update_parameters(network)
    expected = 5.0
    for done in range(1, 6):
        decay = (1 + done) / (10 + done)
        expected = decay * expected + 1 - decay
    assert float(average.get_parameter("module.weight").detach()) == pytest.approx(expected)
    assert expected < 1.1


def test_the_average_follows_the_generator(tmp_path: Path) -> None:
    arguments = gan.parse(["--job-dir", str(tmp_path), *TINY, "--ema-decay", "0.1"])
    with common.run_of(arguments) as one:
        trained = gan.Gan(arguments, one)
        states = []
        for _ in range(3):
            trained.step(torch.rand(4, 1, 32, 32), 0.01)
            states.append({name: one.clone() for name, one in trained.generator.state_dict().items()})
    averaged = trained.average.module.state_dict()
    for name in ("last.0.weight", "first.1.running_mean"):
        first, second, third = (one[name] for one in states)
        assert torch.allclose(averaged[name], 0.1 * (0.1 * first + 0.9 * second) + 0.9 * third, atol=1e-6), name
        assert not torch.allclose(first, third, atol=1e-4)


@pytest.mark.parametrize("model", gan.DEFAULTS)
def test_a_resumed_run_ends_with_the_same_weights(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported: list[Contract] = []
    monkeypatch.setattr(gan, "export", lambda _, draft, *__: exported.append(draft))  # which takes the longest
    options = ["--model", model, "--steps", "5"]
    run(tmp_path / "whole", data, *options)
    step, calls = gan.Gan.step, iter(range(3))

    def ended(*arguments: object) -> dict[str, Tensor]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(gan.Gan, "step", ended)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ended", data, *options)
    capsys.readouterr()
    run(tmp_path / "ended", data, *options)
    assert "resumed after step 2 of 5" in capsys.readouterr().out
    whole, resumed = state(tmp_path / "whole"), state(tmp_path / "ended")
    for part in ("model", "discriminator", "average"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part]), part
    assert exported[0] == exported[1]
    with pytest.raises(common.UsageError, match="latent 6 is now 7"):
        run(tmp_path / "ended", data, *options, "--latent", "7")


def test_a_run_shows_samples_and_exports_its_average(trained: Path) -> None:
    sheets = {}
    for file in (trained / "logs" / "samples").iterdir():
        with Image.open(file) as sheet:
            sheets[file.name] = sheet.size
    assert sheets == {
        "samples-000003.png": (256, 256), "samples-000004.png": (256, 256), "interpolation-000004.png": (384, 192),
    }  # fmt: skip
    events = EventAccumulator(str(trained / "logs")).Reload()
    assert [one.step for one in events.Images("samples")] == [3, 4]
    model = ExportedModel(trained / "model")
    assert model.contract.metrics == {"diversity": pytest.approx(events.Scalars("diversity")[-1].value)}
    generator, _ = gan_networks.build("light", 32, latent=6, width=1)
    average = state(trained)["average"]
    generator.load_state_dict({name.removeprefix("module."): one for name, one in average.items() if "." in name})
    latents = torch.randn(2, 6)
    expected = (gan.samples(generator, latents)[:, 0] + 1) / 2
    for prediction, picture in zip(model.predict([{"latent": one.tolist()} for one in latents]), expected, strict=True):
        assert isinstance(prediction, dict)
        assert np.allclose(prediction["picture"], picture, atol=1e-5)
    (refused,) = model.predict([{"latent": [1.0, 2.0]}])
    assert "it must be 6 numbers" in str(refused)


@pytest.mark.parametrize("model", gan.DEFAULTS)
def test_a_step_in_bfloat16_learns_in_float32(model: str, tmp_path: Path) -> None:
    """It is how a GPU trains; here the CPU does it."""
    arguments = gan.parse(["--job-dir", str(tmp_path), *TINY, "--model", model])
    with common.run_of(arguments) as one:
        torch.manual_seed(1)
        trained = gan.Gan(arguments, one)
        trained.bfloat16 = True
        losses = trained.step(torch.rand(4, 1, 32, 32), 0.01)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert {one.dtype for one in trained.generator.parameters()} == {torch.float32}


def test_the_diversity_of_equal_pictures_is_none(tmp_path: Path) -> None:
    arguments = gan.parse(["--job-dir", str(tmp_path), *TINY])
    pictures = torch.randint(256, (300, 28, 28), dtype=torch.uint8)
    with common.run_of(arguments) as one:
        trained = gan.Gan(arguments, one)
        assert trained.diversity(pictures, 32) > 0
        for weight in trained.average.parameters():
            torch.nn.init.zeros_(weight)
        assert trained.diversity(pictures, 32) == 0


@pytest.mark.parametrize("wrong", ["--image-size=48", "--steps=0", "--augment=hue", "--ema-decay=1", "--width=0"])
def test_impossible_options_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gan.parse([wrong])
    assert end.value.code == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_the_models_differ_in_their_defaults() -> None:
    light, dcgan = gan.parse([]), gan.parse(["--model", "dcgan"])
    assert (light.augment, light.ema_decay) == (sorted(AUGMENTATIONS), 0.998)
    assert (dcgan.augment, dcgan.ema_decay) == ([], 0)
    assert gan.parse(["--augment", "", "--ema-decay", "0"]).augment == []


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 100))
def test_the_frechet_distance_of_normal_distributions_is_the_closed_form(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    means, scales = random.normal(size=(2, size)), random.uniform(0.2, 3, size=(2, size))
    turn = np.linalg.qr(random.normal(size=(size, size)))[0]
    # Sets with exactly these means and covariances, whose axes are the same.
    axes = np.concatenate([np.eye(size), -np.eye(size)]) * np.sqrt((2 * size - 1) / 2)
    one, other = (mean + axes * scale @ turn.T for mean, scale in zip(means, scales, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(scales[0] - scales[1]).sum()
    assert gan_evaluation.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert gan_evaluation.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_other_axes_is_that_of_the_matrix_root() -> None:
    random = np.random.default_rng(0)
    one, other = (random.normal(size=(50, 4)) @ random.normal(size=(4, 4)) for _ in range(2))
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(sum(covariances)) - 2 * root
    assert gan_evaluation.frechet_distance(one, other) == pytest.approx(expected)


def test_entropies_tell_sure_from_even() -> None:
    sure, even = np.eye(10), np.full((5, 10), 0.1)
    assert gan_evaluation.entropies(sure) == pytest.approx((0, np.log(10)))
    assert gan_evaluation.entropies(even) == pytest.approx((np.log(10), np.log(10)))
    assert gan_evaluation.entropies(sure[:1]) == pytest.approx((0, 0))


def test_the_evaluation_is_a_table_of_generators_and_real_digits(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--model", "cnn", "--train-steps", "20", "--train-batch-size", "20", "--nfil1", "3", "--nfil2", "4")
    monkeypatch.setattr(gan_evaluation, "CLASSIFIER_OPTIONS", small)
    model, classifier, out = str(trained / "model"), tmp_path / "classifier", tmp_path / "scores.json"
    options = ["--classifier", str(classifier), "--data-dir", str(data), "--samples", "30"]
    gan_evaluation.main([model, *options, "--out", str(out)])
    scores = json.loads(out.read_text())
    assert list(scores) == [gan_evaluation.REAL, model]
    assert 0 < 3 * scores[gan_evaluation.REAL]["frechet_distance"] < scores[model]["frechet_distance"]
    assert all(0 <= one["recognised"] <= 1 and one["entropy"] <= one["class_entropy"] + 1e-6 for one in scores.values())
    printed = capsys.readouterr().out
    assert f"| {model} | {scores[model]['frechet_distance']:.2f} |" in printed
    gan_evaluation.main([model, *options])  # the classifier is there
    assert capsys.readouterr().out == printed[printed.index("| pictures |") :]
    with pytest.raises(common.UsageError, match="classifier/model has no generator: it must take a latent"):
        gan_evaluation.main([str(classifier / "model"), *options])
    with pytest.raises(common.UsageError, match=r"contract\.json is absent"):
        gan_evaluation.main([str(tmp_path), *options])
    newest = max((classifier / "checkpoints").glob("step-*.pt"))
    saved = torch.load(newest, weights_only=True)
    torch.save(saved | {"identity": saved["identity"] | {"model": "'linear'"}}, newest)
    with pytest.raises(common.UsageError, match="another network than the CNN"):
        gan_evaluation.main([model, *options])
    newest.unlink()
    with pytest.raises(common.UsageError, match="no checkpoint of a digits run"):
        gan_evaluation.main([model, *options])
