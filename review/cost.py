"""What a stack costs an hour: the machines that its rollout keeps, from the price table.

Unknown stays unknown: a sum with an unknown part is a lower bound, and names the part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from .prices import COMPUTE, PREDICTION, Price, Prices

HOURS_PER_MONTH: Final = 730  # as Google's calculator has it


@dataclass(frozen=True)
class Machines:
    """The replicas of one release: the machine of each, and the least and the most of them that run."""

    release: str
    machine_type: str
    least: int
    most: int
    accelerator: str = ""
    accelerators: int = 0
    spot: bool = False

    @property
    def machine(self) -> str:
        """The machine in words.

        >>> Machines("main", "g2-standard-4", 1, 1, "NVIDIA_L4", 1).machine
        'g2-standard-4 with 1 NVIDIA_L4'
        """
        extra = f" with {self.accelerators} {self.accelerator}" if self.accelerator else ""
        return f"{self.machine_type}{extra}{', spot' if self.spot else ''}"

    @property
    def count(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"

    def __str__(self) -> str:
        return f"{self.count} × {self.machine}"


@dataclass(frozen=True)
class Unknown:
    """A machine whose price is not known.

    why: `spot`, because such prices change; `fee`, because only Compute Engine's lower price is known; or `price`.
    """

    machine: str
    region: str
    why: Literal["spot", "fee", "price"]


@dataclass(frozen=True)
class Cost:
    """USD an hour with the least and with the most replicas; lower bounds where something is unknown.

    unknown: the machines of which not everything is in it. sources: the prices that are in it.
    """

    least: float = 0.0
    most: float = 0.0
    unknown: tuple[Unknown, ...] = ()
    sources: tuple[Price, ...] = ()

    @property
    def exact(self) -> bool:
        return not self.unknown

    @property
    def least_month(self) -> float:
        return self.least * HOURS_PER_MONTH

    @property
    def most_month(self) -> float:
        return self.most * HOURS_PER_MONTH

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.least + other.least,
            self.most + other.most,
            tuple(dict.fromkeys((*self.unknown, *other.unknown))),
            tuple(dict.fromkeys((*self.sources, *other.sources))),
        )


def cost(machines: Iterable[Machines], region: str, prices: Prices) -> Cost:
    """The cost of the replicas that serve."""
    return sum((_cost(one, region, prices) for one in machines), Cost())


def _cost(machines: Machines, region: str, prices: Prices) -> Cost:
    wanted = (machines.machine_type, region, machines.accelerator, machines.accelerators)
    if machines.spot:
        return Cost(unknown=(Unknown(machines.machine, region, "spot"),))
    unknown: tuple[Unknown, ...] = ()
    parts = prices.machine_parts(PREDICTION, *wanted)
    if parts is None:
        parts = prices.machine_parts(COMPUTE, *wanted) or []
        unknown = (Unknown(machines.machine, region, "fee" if parts else "price"),)
    hour = sum((price.usd or 0) * quantity for price, quantity in parts)
    return Cost(hour * machines.least, hour * machines.most, unknown, tuple(price for price, _ in parts))
