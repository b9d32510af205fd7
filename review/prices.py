"""What Google charges, as prices.csv has it: each price with its region, its day and its source, or marked unknown."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TABLE: Final = Path(__file__).parent / "prices.csv"
ANYWHERE: Final = "*"  # the region of a price that is the same in all regions
PREDICTION: Final = "prediction"  # Vertex AI, online
TRAINING: Final = "training"  # Vertex AI, jobs
COMPUTE: Final = "compute"  # Compute Engine: a lower bound of what Vertex AI asks for the same machine
VISION: Final = "vision"  # Cloud Vision, whose items are the features of its API
# Memory of a machine for each vCPU, in GB: https://cloud.google.com/compute/docs/general-purpose-machines
GB_PER_VCPU: Final[Mapping[tuple[str, str], float]] = {
    ("c3", "highcpu"): 2,
    ("c3", "standard"): 4,
    ("c3", "highmem"): 8,
    ("e2", "highcpu"): 1,
    ("e2", "standard"): 4,
    ("e2", "highmem"): 8,
    ("g2", "standard"): 4,
    ("n1", "highcpu"): 0.9,
    ("n1", "standard"): 3.75,
    ("n1", "highmem"): 6.5,
    ("n2", "highcpu"): 1,
    ("n2", "standard"): 4,
    ("n2", "highmem"): 8,
}


@dataclass(frozen=True)
class Price:
    """USD for one unit of an item; None where no public record of it was found.

    item: such as `C3 vCPU`, `C3 GB`, `NVIDIA_L4`, `standard`. unit: such as hour or GB a month. day: of the record,
    empty where it has none.
    """

    service: str
    item: str
    region: str
    unit: str
    usd: float | None
    day: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.service, self.item, self.region


class Prices:
    """The prices by service, item and region."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self.by_key = {price.key: price for price in prices}

    def find(self, service: str, item: str, region: str) -> Price | None:
        """The price in a region, else the one that holds everywhere. None where it is unknown."""
        found = self.by_key.get((service, item, region)) or self.by_key.get((service, item, ANYWHERE))
        return found if found and found.usd is not None else None

    def machine_parts(
        self, service: str, machine_type: str, region: str, accelerator: str = "", accelerators: int = 0
    ) -> list[tuple[Price, float]] | None:
        """The prices that make up the hour of a machine, each with its quantity. None where one of them is unknown."""
        parts = [(item, quantity) for item, quantity in shape(machine_type)]
        if accelerator:
            parts.append((accelerator, accelerators))
        found = [(self.find(service, item, region), quantity) for item, quantity in parts]
        known = [(price, quantity) for price, quantity in found if price]
        return known if parts and len(known) == len(parts) else None

    def machine(
        self, service: str, machine_type: str, region: str, accelerator: str = "", accelerators: int = 0
    ) -> float | None:
        """USD for an hour of a machine with its accelerators. None where a part's price is unknown."""
        parts = self.machine_parts(service, machine_type, region, accelerator, accelerators)
        return None if parts is None else sum((price.usd or 0) * quantity for price, quantity in parts)


def shape(machine_type: str) -> list[tuple[str, float]]:
    """The items of a machine type and their quantities; none where its memory is not known here.

    >>> shape("c3-highcpu-4")
    [('C3 vCPU', 4), ('C3 GB', 8)]
    """
    match = re.fullmatch(r"([a-z]\d[a-z]?)-(\w+)-(\d+)", machine_type)
    if not match or (match[1], match[2]) not in GB_PER_VCPU:
        return []
    family, vcpus = match[1].upper(), int(match[3])
    return [(f"{family} vCPU", vcpus), (f"{family} GB", vcpus * GB_PER_VCPU[match[1], match[2]])]


def cost_per_thousand(usd_per_hour: float, rate: float) -> float:
    """USD for 1,000 pictures on a machine that counts rate pictures a second and is never idle."""
    return usd_per_hour / 3600 / rate * 1000


def load(path: Path = TABLE) -> Prices:
    """The price table of a file."""
    with path.open(newline="") as file:
        return Prices(
            Price(**{**row, "usd": float(row["usd"]) if row["usd"] else None})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        )


def save(prices: Prices, path: Path = TABLE) -> None:
    """Writes a price table, in the order of its services, items and regions."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["service", "item", "region", "unit", "usd", "day", "source"])
        for price in sorted(prices.by_key.values(), key=lambda p: p.key):
            usd = "" if price.usd is None else f"{price.usd:.9f}".rstrip("0").rstrip(".")
            writer.writerow([*price.key, price.unit, usd, price.day, price.source])
