"""The parts of the workloads: options, folders, records, batches, checkpoints, augmentation and the controller."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_data import adult_line, idx, write_digits

from training import census, common, digits, experiments, search
from training.common import BadRecords, Folders, Run, UsageError


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """Starts runs of census in tmp_path, with options."""
    for name in ("RANK", "WORLD_SIZE", "CLOUD_ML_TRIAL_ID", "CLOUD_ML_HP_METRIC_FILE"):
        monkeypatch.delenv(name, raising=False)
    runs = []

    def started(*options: str) -> Run:
        runs.append(Run(census.parse(["--job-dir", str(tmp_path), *options])))
        return runs[-1]

    yield started
    for run in runs:
        run.close()
    torch.set_deterministic_debug_mode("default")


def test_a_bucket_is_read_where_vertex_ai_mounts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.files.GCS", tmp_path)
    assert common.local_path("gs://bucket/a/b") == tmp_path / "bucket" / "a" / "b"
    assert common.local_path("/gcs/bucket/a") == Path("/gcs/bucket/a")
    monkeypatch.setattr("training.files.GCS", tmp_path / "absent")
    with pytest.raises(UsageError, match="gcloud storage cp -r gs://bucket/a"):
        common.local_path("gs://bucket/a")


def test_the_folders_of_vertex_ai_come_before_the_job_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.files.GCS", tmp_path)
    assert Folders.choose("job", {}) == Folders(Path("job/model"), Path("job/checkpoints"), Path("job/logs"))
    trial = {"AIP_MODEL_DIR": "gs://b/7/model/", "AIP_CHECKPOINT_DIR": "/gcs/b/7/checkpoints"}
    chosen = Folders.choose("gs://b/job", trial)
    assert chosen.model == tmp_path / "b" / "7" / "model"
    assert chosen.checkpoints == Path("/gcs/b/7/checkpoints")
    assert chosen.logs == tmp_path / "b" / "job" / "logs"
    with pytest.raises(UsageError, match="--job-dir"):
        Folders.choose(None, trial)


def test_options_may_be_written_as_a_tuning_writes_them() -> None:
    given_ = digits.parse(["--train_batch_size=64.0", "--learning_rate=0.05", "--nfil1", "7", "--data-dir", "a_b"])
    assert (given_.train_batch_size, given_.learning_rate, given_.nfil1, given_.data_dir) == (64, 0.05, 7, "a_b")


@pytest.mark.parametrize(
    "wrong",
    ["--train-steps=0", "--train-steps=1.5", "--train-steps=inf", "--learning-rate=-1", "--learning-rate=nan",
     "--dprob=1", "--classes=3", "--augment=blur", "--checkpoint-every=0"],
)  # fmt: skip
def test_impossible_options_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        digits.parse([wrong])
    assert end.value.code == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_the_learning_curves_have_each_network_of_the_guide() -> None:
    networks = [digits.parse(options) for options in experiments.NETWORKS.values()]
    assert {one.model for one in networks} == set(digits.MODELS) - {"resnet18"}
    assert any(one.batch_norm for one in networks)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
def test_each_epoch_has_each_record_once(records: int, batch: int, seed: int) -> None:
    steps = 3 * records // batch + 1
    drawn = np.concatenate([common.batch_at(step, batch, records, seed) for step in range(steps)])
    for epoch in range(len(drawn) // records):
        assert sorted(drawn[epoch * records : (epoch + 1) * records]) == list(range(records))


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [common.learning_rate_at(step, 100, 0.5) for step in range(100)]
    assert max(rates) == 0.5
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", ""),
        ("|1x3 Cross validator", ""),
        (adult_line(">50K."), ""),
        (adult_line(workclass="?"), ""),
        (adult_line("much"), "income_bracket is 'much', not one of <=50K, >50K"),
        (adult_line(age="nan"), "age is 'nan', not a number of at least 0"),
        (adult_line(capital_gain="-1"), "capital_gain is '-1', not a number of at least 0"),
        (adult_line() + ", 1", "it has 16 fields, not 15"),
        (adult_line(race="\udcff"), "race is not UTF-8"),
        (adult_line(race='"White'), "unexpected end of data"),
    ],
)
def test_a_broken_record_is_named_with_its_file_and_line(line: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "adult.data"
    file.write_text("\n".join([adult_line(), line, adult_line(">50K")]), errors="surrogateescape")
    bad = BadRecords("skip")
    records = census.read_records([str(file)], bad)
    assert bad.shown == ([f"{file}:2: {why}"] if why else [])
    found = [one["income_bracket"] for one in records]
    if why or not line or line.startswith("|"):
        assert found == ["<=50K", ">50K"]
    else:
        assert found == ["<=50K", ">50K" if ">" in line else "<=50K", ">50K"]


def test_many_broken_records_are_counted_and_some_are_shown(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    stop, skip = BadRecords("fail"), BadRecords("skip")
    for bad, line in itertools.product((stop, skip), range(1, 14)):
        bad.add(Path("f"), line, "broken")
    with pytest.raises(
        UsageError, match=r"broken records: 13; .*--on-bad-record skip:\nf:1: broken\n(.*\n)*… and 3 more"
    ):
        stop.close(start())
    skip.close(start())
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["severity"] for line in said] == ["WARNING"] * 11
    assert said[0]["message"] == "skipped f:1: broken"


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2))
def test_the_auc_is_the_chance_that_a_positive_record_scores_higher(records: list[tuple[int, bool]]) -> None:
    positive = [score for score, label in records if label]
    negative = [score for score, label in records if not label]
    found = census.auc(np.array([score for score, _ in records]), np.array([label for _, label in records]))
    if positive and negative:
        pairs = [(one > other) + (one == other) / 2 for one in positive for other in negative]
        assert found == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert np.isnan(found)


def test_digits_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    folder = write_digits(tmp_path, train=50, test=20)
    read = digits.read_digits(folder, "train", BadRecords("fail"))
    for name, shape in zip(digits.FILES["train"], ((28, 28), ()), strict=True):
        array = digits.read_idx(folder / name, shape)
        (folder / name).write_bytes(idx(np.ascontiguousarray(array[::-1])))  # not gzipped either
    again = digits.read_digits(folder, "train", BadRecords("fail"))
    assert torch.equal(read.pictures, again.pictures)
    assert torch.equal(read.labels, again.labels)
    assert read.labels.tolist() == sorted(np.arange(50) % 10)


def test_broken_digits_are_named_with_file_and_number(tmp_path: Path) -> None:
    folder = write_digits(tmp_path, train=20, test=20)
    pictures, labels = (folder / name for name in digits.FILES["train"])
    changed = digits.read_idx(labels, ()).copy()
    changed[4] = 11
    labels.write_bytes(idx(changed[:18]))
    bad = BadRecords("skip")
    assert len(digits.read_digits(folder, "train", bad)) == 17
    assert bad.shown == [
        f"{labels}:19: the record is missing",
        f"{labels}:20: the record is missing",
        f"{labels}:5: the label is 11, not a digit",
    ]
    for content in (gzip.compress(b"x" * 50)[:-9], b"\x1f\x8bnonsense", b"a text"):
        pictures.write_bytes(content)
        with pytest.raises(UsageError, match=str(pictures)):
            digits.read_digits(folder, "train", bad)


def test_few_labels_and_some_classes_are_chosen(tmp_path: Path) -> None:
    everything = digits.read_digits(write_digits(tmp_path, train=200), "train", BadRecords("fail"))
    odd = digits.of_classes(everything, [1, 3, 5])
    few = digits.few_of_each(odd, 4, seed=0)
    assert few.labels.bincount().tolist() == [4, 4, 4]
    for picture in few.pictures:
        assert (odd.pictures == picture).flatten(1).all(1).any()
    rest, held = digits.split(everything, 50, seed=0)
    both = torch.cat([rest.pictures, held.pictures]).flatten(1).float().sum(1).sort().values
    assert torch.equal(both, everything.pictures.flatten(1).float().sum(1).sort().values)


@pytest.mark.parametrize("name", digits.AUGMENTATIONS)
def test_augmentation_changes_each_picture_in_its_own_way(name: str) -> None:
    picture = torch.zeros(28, 28, dtype=torch.uint8)
    picture[5:12, 10:20], picture[12:20, 5:9] = 200, 90
    pictures, labels = picture.repeat(40, 1, 1), torch.tensor([0, 3] * 20)
    change = digits.augmentation([name], list(range(10)))
    torch.manual_seed(1)
    changed = change(pictures, labels)
    assert changed.shape == pictures.shape
    assert changed.dtype == torch.uint8
    zeros, threes = changed[::2], changed[1::2]
    assert len(zeros.unique(dim=0)) > 2
    if name == "flip":
        assert torch.equal(threes, pictures[1::2])  # a mirrored 3 is not a digit
        assert len(zeros.unique(dim=0)) == 4
    torch.manual_seed(1)
    assert torch.equal(change(pictures, labels), changed)


@pytest.mark.parametrize("model", ["linear", "dnn", "dnn_dropout", "cnn"])
@pytest.mark.parametrize("norm", [[], ["--batch-norm"]])
def test_each_network_learns_and_has_its_options(model: str, norm: list[str]) -> None:
    options = digits.parse(["--model", model, "--nfil1", "3", "--dprob", "0.3", *norm])
    torch.manual_seed(0)
    network = digits.build(options)
    kinds = [type(one).__name__ for one in network.modules()]
    assert ("BatchNorm1d" in kinds) == (bool(norm) and model != "linear")
    assert [one.p for one in network.modules() if isinstance(one, torch.nn.Dropout) and one.p] == (
        [0.3] if model in ("cnn", "dnn_dropout") else []
    )
    pictures, labels = torch.zeros(20, 28, 28, dtype=torch.uint8), torch.arange(20) % 10
    pictures[torch.arange(20), 5 + labels] = 255
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_weights_for_resnet18_that_cannot_be_fetched_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"no route.*put https://\S+\.pth into .*checkpoints"):
        digits.build(digits.parse(["--model", "resnet18"]))


def test_a_damaged_checkpoint_is_passed_over(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    run.restore(data="same")
    for step in (10, 20, 30):
        run.save(step, {"model": step})
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in files] == ["step-000000020.pt", "step-000000030.pt"]
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    assert start().restore(data="same") == (20, {"model": 20})
    with pytest.raises(UsageError, match=r"data same is now other.*--fresh"):
        start().restore(data="other")
    assert start("--fresh").restore(data="other") == (0, {})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_ends_the_run(start: Callable[..., Run]) -> None:
    with pytest.raises(UsageError, match=r"nan at step 5.*--learning-rate"):
        start().report(5, loss=float("nan"))


def test_a_batch_is_shared_by_the_processes(start: Callable[..., Run]) -> None:
    run = start()
    shares = []
    for run.rank, run.processes in ((0, 2), (1, 2)):
        shares.append(run.share(np.arange(6)).tolist())
    run.rank, run.processes = 0, 4
    with pytest.raises(UsageError, match="--train-batch-size 6 must be a multiple of 4"):
        run.share(np.arange(6))
    run.rank = run.processes = 1
    assert sorted(itertools.chain(*shares)) == list(range(6))


def reward(indices: list[int]) -> float:
    """Returns the share of choices that are the last of their options."""
    return float(np.mean([index == size - 1 for index, size in zip(indices, search.SIZES, strict=True)]))


def mean_reward_of_the_last(proposer: search.Proposer) -> float:
    tried: list[tuple[list[int], float]] = []
    for trial in range(120):
        indices = proposer.propose(trial, tried)
        tried.append((indices, reward(indices)))
        proposer.learn(indices, tried[-1][1])
    return float(np.mean([one for _, one in tried[-20:]]))


def test_the_controller_learns_which_choices_are_rewarded() -> None:
    learned, drawn = mean_reward_of_the_last(search.Controller(0)), mean_reward_of_the_last(search.Random(0))
    assert learned > drawn + 0.2


@pytest.mark.parametrize("method", search.METHODS)
def test_a_resumed_search_proposes_the_same(method: str) -> None:
    whole: search.Proposer = search.METHODS[method](3)
    tried: list[tuple[list[int], float]] = []
    for trial in range(14):
        if trial == 12:
            state = whole.state()
        tried.append((whole.propose(trial, tried), trial / 14))
        whole.learn(*tried[-1])
    resumed: search.Proposer = search.METHODS[method](3)
    resumed.restore(state)
    again = tried[:12]
    for trial in (12, 13):
        again.append((resumed.propose(trial, again), trial / 14))
        resumed.learn(*again[-1])
    assert again == tried
