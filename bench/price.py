"""The cost of 1,000 pictures on the machine that a stack deploys on by default."""

from __future__ import annotations

from review.prices import COMPUTE, PREDICTION, cost_per_thousand, load

REGIONS = ("us-central1", "europe-west4")
# No public record of a C3 in online prediction was found. Where both prices of a machine are on record, Vertex AI asks
# 1.15 times as much as Compute Engine (n1-standard-4 in training: 0.21849885 and 0.19 USD).
VERTEX_AI_PAGE = "https://cloud.google.com/vertex-ai/pricing"


def cost_lines(machine_type: str, rates: dict[str, float], node_hour: float | None) -> list[str]:
    """What 1,000 pictures cost, in words. rates: pictures a second by picture. node_hour: USD, if the user knows it."""

    def costs(usd: float) -> str:
        return ", ".join(f"{title} {cost_per_thousand(usd, rate):.5f} USD" for title, rate in rates.items())

    def lines(service: str, name: str) -> list[str]:
        found = []
        for region in REGIONS:
            parts = prices.machine_parts(service, machine_type, region)
            if parts:
                usd = sum((price.usd or 0) * quantity for price, quantity in parts)
                said = f"{name}, {usd:.7g} USD an hour ({region}, {parts[0][0].day}, {parts[0][0].source})"
                found.append(f"  {said}: {costs(usd)}")
        return found

    prices = load()
    known = lines(PREDICTION, "Vertex AI")
    if node_hour is not None:
        known += [f"  {node_hour} USD an hour (--node-hour): {costs(node_hour)}"]
    elif not known:
        known += [f"  Vertex AI: unknown; look for {machine_type} at {VERTEX_AI_PAGE}, then BENCH='--node-hour USD'"]
    known += lines(COMPUTE, "Compute Engine, which asks less")
    return [f"1,000 pictures on a {machine_type} that is never idle and counts as fast as this machine does:", *known]
