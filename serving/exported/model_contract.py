"""The contract of a served model: which JSON instances it takes, how they become tensors, and what it answers.

A model is a folder with `model.pt2`, an exported program (serving/exported/program.py), and `contract.json`, which this module
writes and reads. README.md describes the format. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
CONTRACT, PROGRAM = "contract.json", "model.pt2"
MISSING = ("", "?")  # texts that mean a category is not known, as null does
MAX_PIXELS = 50_000_000  # of a picture in an instance
DTYPES = ("float32", "int64", "uint8")

Instance = Mapping[str, Any]
Prediction = dict[str, Any]
Array = NDArray[Any]


class ContractError(Exception):
    """A contract cannot be used; the message names the field."""


class InstanceError(Exception):
    """An instance is refused; the message names the column and says what it must be."""


@dataclass(frozen=True)
class Number:
    """A column of numbers: a number for shape [], else a nested list of that shape, or a flat one of its size.

    minimum, maximum: bounds of each number, both included.
    """

    name: str
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    kind: Literal["number"] = "number"

    def read(self, value: Any) -> Array:
        if not self.shape and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InstanceError(f"{self.name} is {_short(value)}; it must be a number")
        try:
            numbers = np.asarray(value)
            if numbers.dtype.kind not in "iuf":
                raise ValueError
        except (ValueError, OverflowError):
            raise InstanceError(f"{self.name} is {_short(value)}; it must be {self._wanted()}") from None
        if numbers.shape != self.shape and numbers.shape != (math.prod(self.shape),):
            shape = "×".join(map(str, numbers.shape)) or "one number"
            raise InstanceError(f"{self.name} has the shape {shape}; it must be {self._wanted()}")
        low, high = self._bounds()
        if not np.all((numbers >= low) & (numbers <= high)):  # false for NaN too
            raise InstanceError(f"{self.name} must be {self._wanted()}, each from {low:g} to {high:g}")
        if self.dtype != "float32" and not np.all(numbers == np.floor(numbers)):
            raise InstanceError(f"{self.name} must be {self._wanted()}, each a whole number")
        return numbers.reshape(self.shape).astype(self.dtype)

    def _bounds(self) -> tuple[float, float]:
        low, high = {"float32": (-3.4e38, 3.4e38), "uint8": (0.0, 255.0), "int64": (-(2.0**53), 2.0**53)}[self.dtype]
        return max(low, low if self.minimum is None else self.minimum), min(
            high, high if self.maximum is None else self.maximum
        )

    def _wanted(self) -> str:
        size = f" or {math.prod(self.shape)} numbers in one list" if len(self.shape) > 1 else ""
        return f"{'×'.join(map(str, self.shape))} numbers{size}" if self.shape else "a number"


@dataclass(frozen=True)
class Category:
    """A column of texts. The program gets 1 + the place in the vocabulary; 0 for any other text, null, "" and "?".

    Space around a text does not count.
    """

    name: str
    vocabulary: tuple[str, ...]
    kind: Literal["category"] = "category"
    dtype: str = "int64"
    shape: tuple[int, ...] = ()

    def read(self, value: Any) -> Array:
        if value is not None and not isinstance(value, str):
            raise InstanceError(f"{self.name} is {_short(value)}; it must be a text, or null where it is not known")
        return np.asarray(self.index(value or ""), np.int64)

    def index(self, text: str) -> int:
        return self._places.get(text.strip(), 0)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.vocabulary, 1) if text not in MISSING}


@dataclass(frozen=True)
class Picture:
    """A picture: {"b64": "…"} with a JPEG, PNG or other file, or its pixels as numbers from 0 to 255.

    shape: (height, width) for the mode "L" (grey), (height, width, 3) for "RGB". A file of another size or mode is
    converted; EXIF orientation is applied.
    """

    name: str
    shape: tuple[int, ...]
    mode: Literal["L", "RGB"] = "L"
    kind: Literal["picture"] = "picture"
    dtype: str = "uint8"

    def read(self, value: Any) -> Array:
        if not isinstance(value, Mapping):
            return Number(self.name, "uint8", self.shape).read(value)
        from PIL import Image, ImageOps

        if set(value) != {"b64"} or not isinstance(value["b64"], str):
            raise InstanceError(
                f'{self.name} must be {{"b64": "…"}} with a picture in base64, or numbers from 0 to 255'
            )
        try:
            with Image.open(io.BytesIO(base64.b64decode(value["b64"], validate=True))) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise InstanceError(f"{self.name} has more than {MAX_PIXELS:,} pixels; send a smaller picture")
                upright = ImageOps.exif_transpose(picture).convert(self.mode)
        except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
            raise InstanceError(f"{self.name} is no picture in base64; send the bytes of a JPEG or PNG file") from None
        height, width = self.shape[:2]
        if upright.size != (width, height):
            upright = upright.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(upright, np.uint8)


Input = Number | Category | Picture


@dataclass(frozen=True)
class Values:
    """An output that is a tensor of the program, as a list of numbers of that shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Literal["values"] = "values"


@dataclass(frozen=True)
class Labels:
    """An output that is the text for each number of another output: vocabulary[number]."""

    name: str
    of: str
    vocabulary: tuple[str, ...]
    kind: Literal["labels"] = "labels"


Output = Values | Labels
_INPUTS: dict[str, Any] = {"number": Number, "category": Category, "picture": Picture}
_OUTPUTS: dict[str, Any] = {"values": Values, "labels": Labels}


@dataclass(frozen=True)
class Example:
    """An instance, and what the model answered to it when it was exported: a server tries it before it is ready."""

    instance: Instance
    prediction: Prediction


@dataclass(frozen=True)
class Contract:
    """What a model takes and answers.

    name: of the model. sha256: of the program. inputs: in the order of the program's inputs. outputs: in the order in
    which a prediction has them; those of kind `values` are the program's outputs in order. ignored: columns that an
    instance may have besides. metrics: measured when it was trained. origin: how it was trained.
    """

    name: str
    sha256: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    examples: tuple[Example, ...]
    ignored: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[Values]:
        return [one for one in self.outputs if isinstance(one, Values)]

    def read(self, instance: Any) -> list[Array]:
        """The program's inputs for one instance, each without the batch's dimension. Raises InstanceError."""
        if not isinstance(instance, Mapping):
            raise InstanceError(f"it is {_short(instance)}; it must be an object of columns and values")
        names = [one.name for one in self.inputs]
        if unknown := [name for name in instance if name not in names and name not in self.ignored]:
            raise InstanceError(f"it has the unknown column {unknown[0]!r}; there are {', '.join(names)}")
        if absent := [name for name in names if name not in instance]:
            raise InstanceError(f"it lacks the column {absent[0]!r}")
        return [one.read(instance[one.name]) for one in self.inputs]

    def write(self, outputs: Sequence[Array]) -> Prediction:
        """A prediction from the program's outputs for one instance, each without the batch's dimension."""
        found = {one.name: array for one, array in zip(self.values, outputs, strict=True)}
        return {
            one.name: (
                found[one.name].tolist()
                if isinstance(one, Values)
                else [one.vocabulary[int(number)] for number in found[one.of].flat]
            )
            for one in self.outputs
        }

    def as_json(self) -> dict[str, Any]:
        def plain(one: Any) -> dict[str, Any]:
            given = {name: getattr(one, name) for name in one.__dataclass_fields__}
            first = {"name": given.pop("name"), "kind": given.pop("kind")}
            return first | {name: value for name, value in given.items() if value is not None}

        return {
            "format": FORMAT,
            "name": self.name,
            "program": {"file": PROGRAM, "sha256": self.sha256},
            "inputs": [plain(one) for one in self.inputs],
            "ignored": list(self.ignored),
            "outputs": [plain(one) for one in self.outputs],
            "examples": [{"instance": one.instance, "prediction": one.prediction} for one in self.examples],
            "metrics": dict(self.metrics),
            "origin": dict(self.origin),
        }

    @classmethod
    def from_json(cls, given: Any) -> Contract:
        """Raises ContractError."""
        try:
            if given["format"] != FORMAT:
                raise ContractError(f"format is {given['format']!r}; this reads {FORMAT}: export the model again")
            if given["program"]["file"] != PROGRAM:
                raise ContractError(f"program.file is {given['program']['file']!r}; it must be {PROGRAM!r}")
            contract = cls(
                name=str(given["name"]),
                sha256=str(given["program"]["sha256"]),
                inputs=tuple(_part(one, _INPUTS, "inputs") for one in given["inputs"]),
                outputs=tuple(_part(one, _OUTPUTS, "outputs") for one in given["outputs"]),
                examples=tuple(Example(dict(one["instance"]), dict(one["prediction"])) for one in given["examples"]),
                ignored=tuple(map(str, given.get("ignored", ()))),
                metrics=dict(given.get("metrics", {})),
                origin=dict(given.get("origin", {})),
            )
        except KeyError as error:
            raise ContractError(f"the field {error} is absent") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ContractError(str(error)) from None
        names = [one.name for one in contract.inputs]
        for where, many in (("inputs", names), ("outputs", [one.name for one in contract.outputs])):
            if not many or len(set(many)) != len(many):
                raise ContractError(f"{where}: there must be at least one, each with a name of its own")
        whole = {one.name for one in contract.values if one.dtype != "float32"}
        if wrong := [one.name for one in contract.outputs if isinstance(one, Labels) and one.of not in whole]:
            raise ContractError(f"outputs: {wrong[0]!r} must be of an output of whole numbers")
        return contract

    @classmethod
    def load(cls, folder: Path) -> Contract:
        """Raises ContractError, also if the program is not the one that the contract was written for."""
        file = folder / CONTRACT
        try:
            contract = cls.from_json(json.loads(file.read_bytes()))
            with (folder / PROGRAM).open("rb") as program:
                found = hashlib.file_digest(program, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise ContractError(
                f"{error.filename} is absent; a model is a folder with {PROGRAM} and {CONTRACT}"
            ) from None
        except OSError as error:
            raise ContractError(f"{error.filename} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ContractError(f"{file} is no JSON: {error}") from None
        except ContractError as error:
            raise ContractError(f"{file}: {error}") from None
        if found != contract.sha256:
            raise ContractError(
                f"{folder / PROGRAM} is not the program of {file} (SHA-256 {found[:12]}…, not {contract.sha256[:12]}…)"
            )
        return contract


def _part(given: Any, kinds: Mapping[str, Any], where: str) -> Any:
    if given["kind"] not in kinds:
        raise ContractError(
            f"{where}: the kind of {given['name']!r} is {given['kind']!r}; there are {', '.join(kinds)}"
        )
    kind = kinds[given["kind"]]
    if unknown := set(given) - set(kind.__dataclass_fields__):
        raise ContractError(f"{where}: {given['name']!r} has the unknown field {min(unknown)!r}")
    part = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    if getattr(part, "dtype", "float32") not in DTYPES:
        raise ContractError(f"{where}: the dtype of {part.name!r} is {part.dtype!r}; there are {', '.join(DTYPES)}")
    for size in getattr(part, "shape", ()):
        if not isinstance(size, int) or size < 1:
            raise ContractError(f"{where}: the shape of {part.name!r} is {part.shape}; it must be of whole numbers")
    if isinstance(part, Picture) and part.shape[2:] != {"L": (), "RGB": (3,)}.get(part.mode):
        raise ContractError(f"{where}: {part.name!r} has the mode {part.mode!r} and the shape {part.shape}")
    return part


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}…"
