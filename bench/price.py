"""The cost of 1,000 pictures on the machine that a stack deploys on by default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Price:
    """USD for an hour of one machine, as a public record had it on a day."""

    usd: float
    region: str
    day: str
    source: str


# Compute Engine's list prices, on demand, from the Cloud Billing catalogue.
_CALCULATOR = "github.com/Cyclenerd/google-cloud-pricing-cost-calculator, pricing.yml at commit 0166a59e"
COMPUTE_ENGINE = {
    "c3-highcpu-4": [
        Price(0.170104, "us-central1", "2025-03-06", _CALCULATOR),
        Price(0.1786092, "europe-west4", "2025-03-06", _CALCULATOR),
    ]
}
# No public record of a C3 in online prediction was found. Where both prices of a machine are on record, Vertex AI asks
# 1.15 times as much as Compute Engine (n1-standard-4 in training: 0.21849885 and 0.19 USD).
VERTEX_AI: dict[str, list[Price]] = {}
VERTEX_AI_PAGE = "https://cloud.google.com/vertex-ai/pricing"


def cost_per_thousand(usd_per_hour: float, rate: float) -> float:
    """USD for 1,000 pictures on a machine that counts rate pictures a second and is never idle."""
    return usd_per_hour / 3600 / rate * 1000


def cost_lines(machine_type: str, rates: dict[str, float], node_hour: float | None) -> list[str]:
    """What 1,000 pictures cost, in words. rates: pictures a second by picture. node_hour: USD, if the user knows it."""

    def costs(usd: float) -> str:
        return ", ".join(f"{title} {cost_per_thousand(usd, rate):.5f} USD" for title, rate in rates.items())

    known = VERTEX_AI.get(machine_type, [])
    lines = [f"  Vertex AI, {p.usd} USD an hour ({p.region}, {p.day}, {p.source}): {costs(p.usd)}" for p in known]
    if node_hour is not None:
        lines += [f"  {node_hour} USD an hour (--node-hour): {costs(node_hour)}"]
    elif not known:
        lines += [f"  Vertex AI: unknown; look for {machine_type} at {VERTEX_AI_PAGE}, then BENCH='--node-hour USD'"]
    lines += [
        f"  Compute Engine, which asks less, {p.usd} USD an hour ({p.region}, {p.day}, {p.source}): {costs(p.usd)}"
        for p in COMPUTE_ENGINE.get(machine_type, [])
    ]
    return [f"1,000 pictures on a {machine_type} that is never idle and counts as fast as this machine does:", *lines]
