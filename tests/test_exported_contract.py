"""Contracts of exported models: instances become tensors or a sentence, and a model that does not fit is refused."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import exported_models
import numpy as np
import pytest
from exported_models import change_contract, predicted
from helpers import encode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serving.exported.model import ExportedModel
from serving.exported.model_contract import Category, Contract, ContractError, InstanceError, Number, Picture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.weather(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(scope="module")
def weather(whole: Path) -> ExportedModel:
    return ExportedModel(whole)


# Predictions


@given(
    st.lists(
        st.fixed_dictionaries(
            {"a": st.integers(-1000, 1000), "b": st.integers(-100, 1000)},
            optional={"key": st.text()},
        ),
        max_size=5,
    )
)
def test_predictions_are_those_of_the_formula(weather: ExportedModel, instances: list[dict[str, Any]]) -> None:
    found = weather.predict([one | {"day": " tue "} for one in instances])
    assert found == [predicted(one["a"], one["b"], 20) for one in instances]


def test_a_bad_instance_among_good_ones_has_an_error_in_its_place(weather: ExportedModel) -> None:
    good = {"a": 1, "b": 2, "day": "mon"}
    first, second, third = weather.predict([good, good | {"b": "two"}, good | {"a": 5}])
    assert (first, third) == (predicted(1, 2, 10), predicted(5, 2, 10))
    assert str(second) == 'b is "two"; it must be a number'


@pytest.mark.parametrize(
    ("instance", "says"),
    [
        ([1, 2], "it is [1, 2]; it must be an object of columns and values"),
        ({"a": 1, "b": 2}, "it lacks the column 'day'"),
        ({"a": 1, "b": 2, "day": "mon", "c": 3}, "it has the unknown column 'c'; there are a, b, day"),
        ({"a": True, "b": 2, "day": "mon"}, "a is true; it must be a number"),
        ({"a": [1], "b": 2, "day": "mon"}, "a is [1]; it must be a number"),
        ({"a": float("nan"), "b": 2, "day": "mon"}, "a must be a number, each from"),
        ({"a": 1e39, "b": 2, "day": "mon"}, "a must be a number, each from"),
        ({"a": 1, "b": -101, "day": "mon"}, "b must be a number, each from -100 to 1e+30"),
        ({"a": 1, "b": 2, "day": 3}, "day is 3; it must be a text, or null where it is not known"),
        ({"a": 3e38, "b": -100, "day": "mon"}, "the model answers with a score that is not a finite number"),
    ],
)
def test_an_instance_that_does_not_fit_is_refused_in_a_sentence(
    weather: ExportedModel, instance: Any, says: str
) -> None:
    (found,) = weather.predict([instance])
    assert isinstance(found, InstanceError)
    assert says in str(found)


@pytest.mark.parametrize("value", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]])
def test_a_shape_takes_nested_lists_or_one_list(value: Any) -> None:
    assert Number("x", "int64", (2, 3)).read(value).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("value", [[1, 2], [[1, 2], [3]], "1", None, {}, [["a"] * 3] * 2, [[True] * 3] * 2, [1.5] * 6])
def test_values_that_do_not_fit_a_shape_are_refused(value: Any) -> None:
    with pytest.raises(InstanceError, match=r"^x .*must be 2×3 numbers or 6 numbers in one list"):
        Number("x", "int64", (2, 3)).read(value)


@pytest.mark.parametrize(
    ("text", "place"), [("mon", 1), (" tue", 2), ("wed", 0), ("?", 0), ("", 0), (None, 0), ("Mon", 0)]
)
def test_categories(text: str | None, place: int) -> None:
    assert int(Category("day", ("mon", "tue", "?")).read(text)) == place


def test_a_picture_is_a_file_in_base64_or_pixels() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    column = Picture("image", (3, 4))
    file = {"b64": base64.b64encode(encode(Image.fromarray(grey))).decode()}
    for value in (grey.tolist(), grey.flatten().tolist(), file):
        assert np.array_equal(column.read(value), grey)
    coloured = {"b64": base64.b64encode(encode(Image.new("RGB", (40, 30), (255, 0, 0)), "JPEG", quality=100)).decode()}
    assert np.abs(column.read(coloured).astype(int) - 76).max() <= 1  # ITU-R 601-2 luma of red
    assert Picture("image", (3, 4, 3), "RGB").read(coloured)[0, 0].tolist() == [254, 0, 0]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"b64": "?"}, "image.b64 is not base64"),
        ({"b64": "bm8gcGljdHVyZQ=="}, "image: this is not a picture that can be read"),
        ({"uri": "gs://a/b"}, 'image must be {"b64": "…"} with a picture in base64'),
        ([[256]], "each from 0 to 255"),
        ({"b64": base64.b64encode(encode(Image.new("L", (20, 20)))).decode()}, "at most 0.0003 megapixels"),
    ],
)
def test_pictures_that_are_refused(value: Any, says: str) -> None:
    with pytest.raises(InstanceError) as caught:
        Picture("image", (1, 1)).read(value, max_pixels=300)
    assert says in str(caught.value)


# Contracts


def test_a_contract_is_the_same_after_it_was_written_and_read() -> None:
    drafted = exported_models.contract(
        sha256="1" * 64, metrics={"accuracy": 0.9}, origin={"seed": 1},
        examples=Contract.from_json(_document()).examples,
    )  # fmt: skip
    assert Contract.from_json(json.loads(json.dumps(drafted.as_json()))) == drafted


def _document() -> dict[str, Any]:
    example = {"instance": {"a": 1, "b": 2, "day": None}, "prediction": predicted(1, 2)}
    written = exported_models.contract(sha256="1" * 64).as_json() | {"examples": [example]}
    document: dict[str, Any] = json.loads(json.dumps(written))
    return document


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format is 2; this reads 1"),
        ({"name": "../weather"}, "name is"),
        ({"name": "W"}, "name is"),
        ({"program": {"file": "../model.pt2", "sha256": ""}}, "program.file is '../model.pt2'"),
        ({"examples": []}, "examples: there must be at least one"),
        ({"inputs": []}, "inputs: there must be at least one"),
        ({"inputs": 3}, "not iterable"),
        ({"inputs": [{"name": "a"}]}, "the field 'kind' is absent"),
        ({"inputs": [{"name": "a", "kind": "number"}] * 2}, "each with a name of its own"),
        ({"ignored": ["a"]}, "each with a name of its own"),
        ({"inputs": [{"name": "a", "kind": "tensor"}]}, "the kind of 'a' is 'tensor'; there are number, category, pic"),
        ({"inputs": [{"name": "a", "kind": "number", "code": "x"}]}, "'a' has the unknown field 'code'"),
        ({"inputs": [{"name": "a", "kind": "number", "dtype": "object"}]}, 'the dtype of \'a\' is "object"; it must'),
        ({"inputs": [{"name": "a", "kind": "number", "shape": [0]}]}, "the shape of 'a' is [0]"),
        ({"inputs": [{"name": "a", "kind": "number", "shape": [10**9]}]}, "at most 10,000,000 numbers"),
        ({"inputs": [{"name": "a", "kind": "number", "minimum": "0"}]}, "the minimum of 'a'"),
        ({"inputs": [{"name": "a", "kind": "category"}]}, "vocabulary"),
        ({"inputs": [{"name": "a", "kind": "category", "vocabulary": ["x", 1]}]}, "a list of different texts"),
        ({"inputs": [{"name": "a", "kind": "picture", "shape": [2]}]}, "the shape of 'a'"),
        ({"inputs": [{"name": "a", "kind": "picture", "shape": [2, 2], "mode": "RGB"}]}, "has the mode 'RGB'"),
        ({"outputs": [{"name": "error", "kind": "values", "shape": [1]}]}, "'error' is the name of a refused instance"),
        ({"outputs": [{"name": "a", "kind": "labels", "of": "b", "vocabulary": ["x"]}]}, "an output of whole number"),
    ],
)  # fmt: skip
def test_a_contract_that_is_wrong_is_refused_in_a_sentence(change: dict[str, Any], says: str) -> None:
    Contract.from_json(_document())
    with pytest.raises(ContractError) as caught:
        Contract.from_json(_document() | change)
    assert says in str(caught.value)


# Folders


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ContractError) as caught:
        ExportedModel(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["model.pt2", "contract.json"])
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"{name} is absent; a model is a folder with model.pt2 and contract.json")


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "contract")])
def test_a_contract_that_is_damaged_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "contract.json").write_text(text)
    refused(folder, says)


def test_another_program_is_refused(folder: Path) -> None:
    with (folder / "model.pt2").open("ab") as file:
        file.write(b"x")
    refused(folder, "is not the program of")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"inputs": [{"name": "a", "kind": "number"}]}, "it has the unknown column 'b'"),
        ({"outputs": [{"name": "score", "kind": "values", "shape": [1]}]}, "it has 2 outputs; the contract has 1"),
        (
            {"outputs": [{"name": name, "kind": "values", "dtype": "int64", "shape": [1]} for name in ("id", "score")]},
            "score is float32 of the shape [1]",
        ),
        ({"examples": [{"instance": exported_models.INSTANCES[0], "prediction": predicted(0, 0)}]}, "is predicted as"),
        (
            {
                "examples": [
                    {
                        "instance": exported_models.INSTANCES[0],
                        "prediction": predicted(1, 2, 10) | {"classes": ["wind"]},
                    }
                ]
            },
            "is predicted as",
        ),
    ],
)
def test_a_contract_that_does_not_fit_its_program_is_refused(folder: Path, fields: dict[str, Any], says: str) -> None:
    change_contract(folder, fields)
    refused(folder, says)


def test_an_index_beyond_an_embedding_is_the_error_of_its_instance_alone(folder: Path) -> None:
    contract = json.loads((folder / "contract.json").read_text())
    contract["inputs"][2]["vocabulary"].append("wed")  # the program's embedding has no row for it
    change_contract(folder, contract)
    good = {"a": 1, "b": 2, "day": "mon"}
    first, second, third = ExportedModel(folder).predict([good, good | {"day": "wed"}, good])
    assert first == third == predicted(1, 2, 10)
    assert "the model cannot compute it: index out of range" in str(second)


def test_a_number_without_a_label_is_an_error(folder: Path) -> None:
    contract = json.loads((folder / "contract.json").read_text())
    contract["outputs"][1]["vocabulary"] = ["dry"]
    contract["examples"] = [{"instance": {"a": -9, "b": 0, "day": None}, "prediction": predicted(-9, 0)}]
    change_contract(folder, contract)
    (found,) = ExportedModel(folder).predict([{"a": 9, "b": 0, "day": None}])
    assert str(found) == "the model answers with class_ids 1, for which classes has no text"
