"""The decisions of a batch on Vertex AI: machines, hours and USD, the size of requests, regions. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

from headcount.ledger import BatchError
from review.cost import Cost, Machines, cost
from review.prices import Prices
from serving.contract import Parameters

# Pictures a second for each vCPU of a machine, with room to spare: `make bench` measured 58 a second for pictures of
# 810×1080 pixels and 39 for 12 megapixels with `fast`, on a machine that is taken for a c3-highcpu-4 (bench/README.md).
# `auto` and `full` depend on the pictures; these are for photographs of up to 12 megapixels.
RATE: Final = {"fast": 10.0, "auto": 7.0, "full": 0.4}
# Pictures of a request. The closer looks of a request share a budget, which must suffice for each picture as if it were
# alone: HEADCOUNT_MAX_LOOKS (256) over the 64 of `auto`, and the 212 of `full`.
TOGETHER: Final = {"fast": 64, "auto": 4, "full": 1}
# Bytes of the pictures that the container is sent at once, in base64 and well below HEADCOUNT_MAX_REQUEST_BYTES.
REQUEST_BYTES: Final = 12_000_000
# "You are billed per replica node hour, which includes the approximately 5 minutes it takes for each replica to start
# up": https://docs.cloud.google.com/vertex-ai/docs/predictions/get-batch-predictions
STARTUP_HOURS: Final = 5 / 60
HOURS: Final = 1.0  # the wanted time if none is given
# https://cloud.google.com/storage/docs/locations: what a location that is no region contains.
_WIDE: Final = {
    "US": r"us-.*",
    "EU": r"europe-(?!west2$|west6$).*",
    "ASIA": r"asia-.*",
    "NAM4": "us-central1|us-east1",
    "EUR4": "europe-north1|europe-west4",
    "EUR5": "europe-west1|europe-west2",
    "EUR7": "europe-west2|europe-west3",
    "EUR8": "europe-west3|europe-west6",
    "ASIA1": "asia-northeast1|asia-northeast2",
}


@dataclass(frozen=True)
class Wish:
    """What the user asked for. out: a gs:// folder, "" for the stack's. machines, hours, usd: None where not given."""

    source: str
    out: str
    parameters: Parameters
    machines: int | None = None
    machine_type: str = ""
    hours: float = HOURS
    usd: float | None = None


@dataclass(frozen=True)
class Plan:
    """A job before it starts. hour: the cost of a machine. usd: a lower bound where `hour` is one; None if unknown."""

    pictures: int
    machines: int
    machine_type: str
    hours: float
    hour: Cost

    @property
    def usd(self) -> float | None:
        return self.at(self.hours * self.machines)

    def at(self, machine_hours: float) -> float | None:
        """USD for so many hours of one machine."""
        return self.hour.least * machine_hours if self.hour.least else None

    def money(self, machine_hours: float) -> str:
        """The same in words."""
        usd = self.at(machine_hours)
        if usd is None:
            return "at an unknown price"
        return f"{'' if self.hour.exact else 'at least '}{usd:,.2f} USD"

    @property
    def source(self) -> str:
        """Where the price comes from, in words."""
        days = sorted({price.day for price in self.hour.sources if price.day})
        if not self.hour.sources:
            return "review/prices.csv has no price of this machine"
        what = (
            "Vertex AI's price"
            if self.hour.exact
            else "Compute Engine's price; Vertex AI's own is not known and higher"
        )
        return f"{what}{f', of {days[0]}' if days else ''}"

    def __str__(self) -> str:
        return (
            f"{self.pictures:,} pictures on {self.machines} × {self.machine_type}: about {self.hours:.1f} hours, "
            f"{self.money(self.hours * self.machines)} ({self.source})"
        )


def plan(
    pictures: int,
    detail: str,
    machine: dict[str, Any],
    region: str,
    prices: Prices,
    *,
    hours: float = HOURS,
    limit: float | None = None,
    machines: int | None = None,
) -> Plan:
    """Chooses the number of machines by the wanted hours and the limit in USD. Raises BatchError.

    machine: a MachineSpec. machines: decides instead of the hours.
    """
    kind, count = str(machine["machineType"]), int(machine.get("acceleratorCount", 0))
    hour = cost([Machines("batch", kind, 1, 1, str(machine.get("acceleratorType", "")), count)], region, prices)
    work = pictures / (RATE[detail] * vcpus(kind)) / 3600  # hours of one machine
    most = max(1, math.ceil(work / max(hours - STARTUP_HOURS, STARTUP_HOURS)))

    def planned(number: int) -> Plan:
        return Plan(pictures, number, kind, work / number + STARTUP_HOURS, hour)

    if limit is not None and not hour.least:
        raise BatchError(f"The limit of {limit:g} USD cannot be kept: {planned(1).source}. Leave --limit-usd out.")
    chosen = planned(machines or most)
    if limit is None or (chosen.usd or 0) <= limit:
        return chosen
    # Each machine more costs its start.
    affordable = 0 if machines else math.floor((limit / hour.least - work) / STARTUP_HOURS)
    if affordable < 1:
        raise BatchError(
            f"{chosen if machines else planned(1)}. That is more than the limit of {limit:g} USD: raise --limit-usd, "
            "or look less closely with --detail fast."
        )
    return planned(affordable)


def vcpus(machine_type: str) -> int:
    """The number at the end of a machine type's name; 1 where there is none."""
    match = re.search(r"-(\d+)\w?$", machine_type)
    return int(match[1]) if match else 1


def request_size(detail: str, sent_bytes: int = 0) -> int:
    """Pictures of a request. sent_bytes: of a picture, where the pictures themselves are sent."""
    return max(1, min(TOGETHER[detail], REQUEST_BYTES // sent_bytes if sent_bytes else TOGETHER[detail]))


def in_region(bucket: dict[str, Any], region: str) -> bool:
    """Whether a bucket, as Cloud Storage describes it, is in a region or in a larger place that contains it."""
    location = str(bucket.get("location", "")).upper()
    regions = [str(one).lower() for one in (bucket.get("customPlacementConfig") or {}).get("dataLocations", [])]
    return region in (location.lower(), *regions) or bool(re.fullmatch(_WIDE.get(location, ""), region))


def split(uri: str) -> tuple[str, str]:
    """Bucket and prefix of a gs:// address. Raises BatchError."""
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", uri)
    if not match:
        raise BatchError(f"{uri} is no address of a bucket: write gs://BUCKET/PREFIX.")
    return match[1], match[2] or ""
