"""The contract of a served model: which JSON instances it takes, how they become tensors, and what it answers.

A model is a folder with `model.pt2`, an exported program (serving/exported/program.py), and `contract.json`, which
this module writes and reads. serving/README.md describes the format. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.contract import Limits

FORMAT = 1
CONTRACT, PROGRAM = "contract.json", "model.pt2"
MISSING = ("", "?")  # texts that mean a category is not known, as null does
DTYPES = ("float32", "int64", "uint8")
MAX_CONTRACT_BYTES = 16_000_000
MAX_SIZE = 10_000_000  # numbers of one input or output
# It stands in paths, and in names of resources that Google limits.
NAME = r"[a-z][a-z0-9_-]{0,38}[a-z0-9]"

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

    def read(self, value: Any, max_pixels: int = Limits.max_pixels) -> Array:
        if not self.shape and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InstanceError(f"{self.name} is {_short(value)}; it must be a number")
        try:
            numbers = np.asarray(value)
            if numbers.dtype.kind not in "iuf":
                raise ValueError
        except (ValueError, OverflowError, RecursionError):
            raise InstanceError(f"{self.name} is {_short(value)}; it must be {self._wanted()}") from None
        if numbers.shape != self.shape and numbers.shape != (math.prod(self.shape),):
            shape = "×".join(map(str, numbers.shape)) or "one number"
            raise InstanceError(f"{self.name} has the shape {shape}; it must be {self._wanted()}")
        low, high = self.bounds()
        if not np.all((numbers >= low) & (numbers <= high)):  # false for NaN too
            raise InstanceError(f"{self.name} must be {self._wanted()}, each from {low:g} to {high:g}")
        if self.dtype != "float32" and not np.all(numbers == np.floor(numbers)):
            raise InstanceError(f"{self.name} must be {self._wanted()}, each a whole number")
        return numbers.reshape(self.shape).astype(self.dtype)

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number that is taken."""
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

    def read(self, value: Any, max_pixels: int = Limits.max_pixels) -> Array:
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
    converted; EXIF orientation is applied. max_pixels: width × height of a file, at most.
    """

    name: str
    shape: tuple[int, ...]
    mode: Literal["L", "RGB"] = "L"
    kind: Literal["picture"] = "picture"
    dtype: str = "uint8"

    def read(self, value: Any, max_pixels: int = Limits.max_pixels) -> Array:
        if not isinstance(value, Mapping):
            return Number(self.name, "uint8", self.shape).read(value)
        from PIL import Image

        from serving.pictures import PictureError, upright

        if set(value) != {"b64"} or not isinstance(value["b64"], str):
            raise InstanceError(
                f'{self.name} must be {{"b64": "…"}} with a picture in base64, or numbers from 0 to 255'
            )
        try:
            pixels = upright(base64.b64decode(value["b64"], validate=True), max_pixels)
        except PictureError as error:
            raise InstanceError(f"{self.name}: {error}") from None
        except ValueError:
            raise InstanceError(f"{self.name}.b64 is not base64; encode the file's bytes (RFC 4648)") from None
        picture = Image.fromarray(pixels).convert(self.mode)
        height, width = self.shape[:2]
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture, np.uint8)


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
# The dtypes of each kind that has them.
_DTYPES_OF = {"category": ("int64",), "picture": ("uint8",)}


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
    def version(self) -> str:
        return self.sha256[:12]

    @property
    def values(self) -> list[Values]:
        return [one for one in self.outputs if isinstance(one, Values)]

    def read(self, instance: Any, max_pixels: int = Limits.max_pixels) -> list[Array]:
        """The program's inputs for one instance, each without the batch's dimension. Raises InstanceError."""
        if not isinstance(instance, Mapping):
            raise InstanceError(f"it is {_short(instance)}; it must be an object of columns and values")
        names = [one.name for one in self.inputs]
        if unknown := [name for name in instance if name not in names and name not in self.ignored]:
            raise InstanceError(f"it has the unknown column {unknown[0]!r}; there are {', '.join(names)}")
        if absent := [name for name in names if name not in instance]:
            raise InstanceError(f"it lacks the column {absent[0]!r}")
        return [one.read(instance[one.name], max_pixels) for one in self.inputs]

    def write(self, outputs: Sequence[Array]) -> Prediction:
        """A prediction from the program's outputs for one instance, each without the batch's dimension.

        Raises InstanceError where the outputs cannot be written as JSON, or are none of the contract's labels.
        """
        found = {one.name: array for one, array in zip(self.values, outputs, strict=True)}
        if wrong := [name for name, array in found.items() if not np.all(np.isfinite(array))]:
            raise InstanceError(f"the model answers with a {wrong[0]} that is not a finite number")
        return {
            one.name: found[one.name].tolist() if isinstance(one, Values) else _labels(one, found[one.of])
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
        contract._check()
        return contract

    def _check(self) -> None:
        """Raises ContractError where the parts do not fit each other."""
        if not re.fullmatch(NAME, self.name):
            raise ContractError(f"name is {_short(self.name)}; it must be 2 to 40 of a-z, 0-9, - and _, a letter first")
        if not self.examples:
            raise ContractError("examples: there must be at least one, which a server tries before it is ready")
        for where, parts, more in (("inputs", self.inputs, self.ignored), ("outputs", self.outputs, ())):
            names = [*(one.name for one in parts), *more]
            if not parts or len(set(names)) != len(names):
                raise ContractError(f"{where}: there must be at least one, each with a name of its own")
        if any(one.name == "error" for one in self.outputs):
            raise ContractError("outputs: 'error' is the name of a refused instance's answer; choose another")
        whole = {one.name for one in self.values if one.dtype != "float32"}
        if wrong := [one.name for one in self.outputs if isinstance(one, Labels) and one.of not in whole]:
            raise ContractError(f"outputs: {wrong[0]!r} must be of an output of whole numbers")

    @classmethod
    def load(cls, folder: Path) -> Contract:
        """Raises ContractError, also if the program is not the one that the contract was written for."""
        file = folder / CONTRACT
        try:
            if file.stat().st_size > MAX_CONTRACT_BYTES:
                raise ContractError(f"it is larger than {MAX_CONTRACT_BYTES / 1e6:g} MB")
            contract = cls.from_json(json.loads(file.read_bytes()))
            with (folder / PROGRAM).open("rb") as program:
                found = hashlib.file_digest(program, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise ContractError(
                f"{error.filename} is absent; a model is a folder with {PROGRAM} and {CONTRACT}"
            ) from None
        except OSError as error:
            raise ContractError(f"{error.filename} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ContractError(f"{file} is not JSON: {error}") from None
        except ContractError as error:
            raise ContractError(f"{file}: {error}") from None
        if found != contract.sha256:
            raise ContractError(
                f"{folder / PROGRAM} is not the program of {file} (SHA-256 {found[:12]}…, not {contract.sha256[:12]}…)"
            )
        return contract


def _part(given: Any, kinds: Mapping[str, Any], where: str) -> Any:
    """An input or output from JSON. Raises ContractError, KeyError and TypeError."""
    if given["kind"] not in kinds:
        raise ContractError(
            f"{where}: the kind of {given['name']!r} is {given['kind']!r}; there are {', '.join(kinds)}"
        )
    kind = kinds[given["kind"]]
    if unknown := set(given) - set(kind.__dataclass_fields__):
        raise ContractError(f"{where}: {given['name']!r} has the unknown field {min(unknown)!r}")
    for name, value in given.items():
        if why := _wrong(name, value, given["kind"]):
            raise ContractError(f"{where}: the {name} of {given['name']!r} is {_short(value)}; it must be {why}")
    part = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    if isinstance(part, Picture) and part.shape[2:] != {"L": (), "RGB": (3,)}[part.mode]:
        raise ContractError(f"{where}: {part.name!r} has the mode {part.mode!r} and the shape {part.shape}")
    return part


def _wrong(name: str, value: Any, kind: str) -> str:
    """What the value of a field of an input or output must be, if it is not."""
    if name == "dtype":
        allowed = _DTYPES_OF.get(kind, DTYPES)
        return "" if value in allowed else " or ".join(allowed)
    if name == "mode":
        return "" if value in ("L", "RGB") else "L or RGB"
    if name == "shape":
        sizes = isinstance(value, list) and len(value) <= 8 and all(type(one) is int and one >= 1 for one in value)
        least = 2 if kind == "picture" else 0
        good = sizes and len(value) >= least and math.prod(value) <= MAX_SIZE and (kind != "category" or not value)
        return "" if good else f"a list of sizes for at most {MAX_SIZE:,} numbers"
    if name in ("minimum", "maximum"):
        return "" if value is None or (type(value) in (int, float) and math.isfinite(value)) else "a number"
    if name == "vocabulary":
        good = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        return "" if good and len(set(value)) == len(value) else "a list of different texts"
    return "" if isinstance(value, str) and value else "a text"


def _labels(label: Labels, numbers: Array) -> list[str]:
    places = [int(number) for number in numbers.flat]
    if wrong := [place for place in places if not 0 <= place < len(label.vocabulary)]:
        raise InstanceError(f"the model answers with {label.of} {wrong[0]}, for which {label.name} has no text")
    return [label.vocabulary[place] for place in places]


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        text = "nested deeply"
    return text if len(text) <= 40 else f"{text[:37]}…"
