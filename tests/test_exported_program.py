"""Exported programs: they compute what the eager module computes, and nothing in a file is run as code."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._export.serde.schema import ScalarType

from serving.exported import program as module
from serving.exported.program import Program, ProgramError, core_operator, save

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # nn.LSTM's own


class First(nn.Module):
    """A module whose answer is a tuple, as an exported model's must be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        found = self.inner(x)
        return (found[0] if isinstance(found, tuple) else found,)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x, x, x)[0],)


class Sizes(nn.Module):
    """Sizes that depend on the batch, a list of tensors, and an output of whole numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.reshape(x.shape[0] * 2, -1).chunk(2, 1)
        return (left * right).reshape(x.shape[0], -1), x.argmax(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Dropout(),
        nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5), nn.Softmax(1),
    )  # fmt: skip


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: First(nn.Linear(2, 1)), (2,)),
    "convolutions": (lambda: First(convolutions()), (3, 8, 8)),
    "lstm": (lambda: First(nn.LSTM(4, 5, batch_first=True)), (6, 4)),
    "attention": (Attention, (5, 8)),
    "transformer": (lambda: First(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), (5, 8)),
    "sizes": (Sizes, (4,)),
}


@pytest.fixture(scope="module", params=MODULES)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Program, tuple[int, ...]]:
    make, shape = MODULES[request.param]
    torch.manual_seed(0)
    eager, file = make().eval(), tmp_path_factory.mktemp("program") / "model.pt2"
    save(eager, [torch.randn(3, *shape)], file)
    return eager, Program(file), shape


@given(batch=st.integers(1, 7), seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 1.0, 5.0]))
def test_a_program_computes_as_the_eager_module_does(
    exported: tuple[nn.Module, Program, tuple[int, ...]], batch: int, seed: int, scale: float
) -> None:
    eager, program, shape = exported
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)) * scale
    with torch.inference_mode():
        expected = eager(x)
    found = program(x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_values_that_nothing_reads_any_more_are_freed(tmp_path: Path) -> None:
    """Of 30 layers in a row few activations are in memory together."""
    deep = First(nn.Sequential(*(one for _ in range(30) for one in (nn.Linear(64, 64), nn.ReLU())))).eval()
    save(deep, [torch.randn(2, 64)], tmp_path / "model.pt2")
    program, together = Program(tmp_path / "model.pt2"), 0
    for node in program._nodes:
        together += len(node.outputs) - len(node.last_used)
        assert together <= 3
    program(torch.randn(2, 64))
    program(torch.randn(2, 64))  # the weights are still there


def test_the_same_weights_make_the_same_file_without_paths_of_this_machine(tmp_path: Path) -> None:
    for name in ("one", "two"):
        exported_models.weather(tmp_path / name)
    first, second = ((tmp_path / name / "model.pt2").read_bytes() for name in ("one", "two"))
    assert first == second
    assert str(Path(__file__).parent).encode() not in first


def test_dtypes_are_those_of_the_format() -> None:
    names = {"BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
             "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool", "BFLOAT16": "bfloat16"}  # fmt: skip
    assert {ScalarType(number).name: str(dtype) for number, dtype in module._DTYPES.items()} == {
        name: f"torch.{dtype}" for name, dtype in names.items()
    }


# Refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.weather(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ProgramError, match=says) as caught:
        Program(folder / "model.pt2")
    assert str(folder / "model.pt2") in str(caught.value)


def in_json(ending: str, change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """Changes the one member of the archive whose name ends so."""

    def changed(name: str, content: bytes) -> bytes:
        if not name.endswith(ending):
            return content
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return changed


def in_graph(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    return in_json("models/model.json", lambda document: change(document["graph_module"]["graph"]))


class _Evil:
    """Its pickle touches a file when it is loaded."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.touched,)


def test_a_pickled_tensor_is_refused_and_not_loaded(folder: Path) -> None:
    def pickled(document: Any) -> None:
        for entry in document["config"].values():
            entry["use_pickle"] = True

    change, touched = in_json("model_weights_config.json", pickled), folder / "touched"
    evil = pickle.dumps(_Evil(touched))
    exported_models.rewrite(folder, lambda n, c: evil if "data/weights/weight" in n else change(n, c))
    refused(folder, "pickled, and unpickling could run code")
    assert not touched.exists()
    pickle.loads(evil)
    assert touched.exists(), "the pickle would have run"


def test_pickles_beside_the_program_are_not_looked_at(folder: Path) -> None:
    """Example inputs are such a part of an archive."""
    touched = folder / "touched"
    evil = pickle.dumps(_Evil(touched))
    changed = []

    def replace(name: str, content: bytes) -> bytes:
        changed.append(name.endswith("data/sample_inputs/model.pt"))
        return evil if changed[-1] else content

    exported_models.rewrite(folder, replace)
    assert any(changed)
    Program(folder / "model.pt2")
    assert not touched.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "torch.ops.aten.relu_.default", "torch.ops.prim.Print.default", "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.__init__", "torch.ops.aten.relu.__class__", "torch.ops.aten.relu", "_operator.pow",
        "_operator.attrgetter", "torch.ops.aten.nothing.default", "torch.ops.aten.relu.default\n",
        "torch.ops.aten.empty.memory_format", "torch.ops.aten.atan2.out", "torch.ops.aten.convolution_backward.default",
        "torch.ops.aten._native_batch_norm_legit.default", "torch.ops.higher_order.cond", "torch.load", "eval",
    ],
)  # fmt: skip
def test_operators_that_are_not_of_core_aten_are_refused(folder: Path, target: str) -> None:
    def call(graph: Any) -> None:
        graph["nodes"][0]["target"] = target

    exported_models.rewrite(folder, in_graph(call))
    refused(folder, "it calls")


def test_no_operator_that_is_taken_changes_its_arguments() -> None:
    for packet in dir(torch.ops.aten):
        overloads: list[str] = getattr(getattr(torch.ops.aten, packet), "overloads", list)()
        for overload in overloads:
            try:
                found: Any = core_operator(f"torch.ops.aten.{packet}.{overload}")
            except ProgramError:
                continue
            assert not found._schema.is_mutable


def test_a_compressed_archive_is_refused_before_it_is_unpacked(folder: Path) -> None:
    exported_models.rewrite(folder, lambda _, content: content + bytes(1 << 24), zipfile.ZIP_DEFLATED)
    refused(folder, "larger than the file")


def test_a_graph_that_is_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRAPH_BYTES", 1 << 20)
    exported_models.rewrite(folder, lambda n, c: c + b" " * (1 << 20) if n.endswith("model.json") else c)
    refused(folder, "larger than 1 MiB")


def test_a_weight_that_is_larger_than_its_bytes_is_refused(folder: Path) -> None:
    def enlarge(document: Any) -> None:
        for entry in document["config"].values():
            entry["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]
            entry["tensor_meta"]["strides"] = [{"as_int": 1}]

    exported_models.rewrite(folder, in_json("model_weights_config.json", enlarge))
    refused(folder, "out of bounds")


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "/etc/passwd", "absent"])
def test_a_weight_is_read_from_the_archive_alone(folder: Path, path: str) -> None:
    def point(document: Any) -> None:
        for entry in document["config"].values():
            entry["path_name"] = path

    exported_models.rewrite(folder, in_json("model_weights_config.json", point))
    refused(folder, "no item named")


def test_sizes_that_grow_without_end_are_an_error(folder: Path) -> None:
    multiply = module._function("_operator.mul")
    assert multiply(3, 4) == 12
    with pytest.raises(ValueError, match="a size is"):
        multiply(1 << 40, 1 << 40)


def test_another_format_says_how_to_repair_it(folder: Path) -> None:
    def later(document: Any) -> None:
        document["schema_version"]["major"] = module.SCHEMA + 1

    exported_models.rewrite(folder, in_json("models/model.json", later))
    refused(folder, rf"its format is {module.SCHEMA + 1}, of torch .*; export it with torch {torch.__version__[:3]}")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_refused(folder: Path, kept: float) -> None:
    file = folder / "model.pt2"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    refused(folder, "no exported program, or is damaged")


def test_a_damaged_weight_is_refused(folder: Path) -> None:
    file = folder / "model.pt2"
    with zipfile.ZipFile(file) as archive:
        content = archive.read(next(name for name in archive.namelist() if "data/weights/weight" in name))
    file.write_bytes(file.read_bytes().replace(content, bytes(len(content))))
    refused(folder, "Bad CRC-32")


@given(data=st.data())
def test_damage_anywhere_is_a_program_error_or_none(whole: Path, data: st.DataObject) -> None:
    """Bytes of the graph and of the archive's own structure are changed, and the checksums are made to fit."""
    with zipfile.ZipFile(whole / "model.pt2") as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    name = data.draw(st.sampled_from([one for one in members if one.endswith(".json")]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(members[name]) - 1))
        members[name][place] = data.draw(st.integers(0, 255))
    damaged = whole / "damaged.pt2"
    with zipfile.ZipFile(damaged, "w") as archive:
        for one, content in members.items():
            archive.writestr(one, bytes(content))
    raw = bytearray(damaged.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        damaged.write_bytes(raw)
    with contextlib.suppress(ProgramError):
        Program(damaged)
