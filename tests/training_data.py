"""Small tables and digits that the tests of the workloads learn from in seconds."""

from __future__ import annotations

import gzip
import shlex
import subprocess
from pathlib import Path

import numpy as np
from helpers import ROOT

from training.census import COLUMNS
from training.digits import FILES, SIDE


def typed_by_make(*words: str) -> list[str]:
    """Returns the module and the arguments that a verb of the Makefile runs Python with."""
    printed = subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    _, python, option, *rest = shlex.split(printed.splitlines()[-1])
    assert (python, option) == (".venv/bin/python", "-m")
    return rest


def adult_line(income: str = "<=50K", **changed: str) -> str:
    """Returns a record of the UCI Adult table."""
    record = {
        "age": "39", "workclass": "State-gov", "fnlwgt": "77516", "education": "Bachelors", "education_num": "13",
        "marital_status": "Never-married", "occupation": "Adm-clerical", "relationship": "Not-in-family",
        "race": "White", "gender": "Male", "capital_gain": "2174", "capital_loss": "0", "hours_per_week": "40",
        "native_country": "United-States", "income_bracket": income,
    } | changed  # fmt: skip
    return ", ".join(record[name] for name in COLUMNS)


def write_adult(file: Path, records: int, seed: int) -> Path:
    """Writes records in which education and hours decide the income, as far as a network can tell."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(records):
        educated, hours = bool(random.integers(2)), int(random.integers(20, 60))
        lines.append(
            adult_line(
                ">50K" if educated and hours > 40 else "<=50K",
                age=str(random.integers(18, 80)),
                education="Masters" if educated else "HS-grad",
                hours_per_week=str(hours),
                occupation=["Sales", "?", "Exec-managerial"][random.integers(3)],
            )
        )
    file.write_text("\n".join(lines) + "\n")
    return file


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """Returns an array of bytes in the idx format."""
    header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    return header + array.tobytes()


def write_digits(folder: Path, train: int = 400, test: int = 100, seed: int = 0) -> Path:
    """Writes the four files of MNIST with noisy pictures: each digit is a bright bar in a place of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for kind, count in (("train", train), ("test", test)):
        labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
        pictures = random.integers(0, 120, (count, SIDE, SIDE)).astype(np.uint8)
        for picture, label in zip(pictures, labels, strict=True):
            picture[2 + 2 * label : 5 + 2 * label, 4:24] = 220
        for name, array in zip(FILES[kind], (pictures, labels), strict=True):
            (folder / name).write_bytes(gzip.compress(idx(array), 1))
    return folder
