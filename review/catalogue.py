"""`make prices`: fills the price table from Google's Cloud Billing catalogue, with the caller's credentials.

https://cloud.google.com/billing/docs/reference/rest/v1/services.skus/list
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from .prices import ANYWHERE, COMPUTE, PREDICTION, TABLE, TRAINING, VISION, Price, Prices, load, save

CATALOGUE: Final = "https://cloudbilling.googleapis.com"
SCOPE: Final = "https://www.googleapis.com/auth/cloud-billing.readonly"
# The services by the names that the catalogue has for them.
NAMES: Final[Mapping[str, str]] = {
    COMPUTE: "Compute Engine",
    PREDICTION: "Vertex AI",
    TRAINING: "Vertex AI",
    "storage": "Cloud Storage",
    "registry": "Artifact Registry",
    "logging": "Cloud Logging",
    VISION: "Cloud Vision API",
}
# How the descriptions of a service's machines begin.
_MACHINES: Final = {
    COMPUTE: r"^",
    PREDICTION: r"^Vertex AI: Online/Batch Prediction ",
    TRAINING: r"^Vertex AI: Training/Pipelines on ",
}
# The other items: the description, and the unit of the price.
_ITEMS: Final = {
    ("storage", "standard"): (r"^Standard Storage ", "GiBy.mo"),
    ("registry", "storage"): (r"^Artifact Registry Storage", "GiBy.mo"),
    ("logging", "storage"): (r"^Log Storage cost", "GiBy"),
    (VISION, "OBJECT_LOCALIZATION"): (r"^Object Localization", "count"),
}


class Session(Protocol):
    """What asks the catalogue: google.auth's AuthorizedSession, or requests'."""

    def get(self, url: str, *, params: Mapping[str, str], timeout: float) -> Any: ...


def pattern(service: str, item: str) -> tuple[str, str]:
    """The description of an item's SKU, as a regular expression, and the unit of its price in the catalogue."""
    if (service, item) in _ITEMS:
        return _ITEMS[service, item]
    start = _MACHINES[service]
    if match := re.fullmatch(r"([A-Z]\d[A-Z]?) (vCPU|GB)", item):
        part, unit = ("Core", "h") if match[2] == "vCPU" else ("Ram", "GiBy.h")
        return rf"{start}{match[1]} (Predefined )?Instance {part} running in ", unit
    model = item.removeprefix("NVIDIA_").replace("TESLA_", "Tesla ").replace("_", " ")
    return rf"(?i){start}Nvidia {re.escape(model)} GPU (attached|running) ", "h"


def refresh(prices: Prices, skus: Mapping[str, Iterable[Mapping[str, Any]]], today: str) -> tuple[Prices, list[str]]:
    """The table with the prices of the catalogue, and a line on each price that it does not have.

    skus: by service name, as the catalogue lists them. A price that is not found stays as it is.
    """
    listed = {name: list(found) for name, found in skus.items()}
    new, missing = [], []
    for price in prices.by_key.values():
        found = [_priced(sku) for sku in listed.get(NAMES[price.service], ()) if _is(sku, price)]
        known = {usd: sku for usd, sku in found if usd is not None}
        if len(known) == 1:
            ((usd, name),) = known.items()
            new.append(replace(price, usd=usd, day=today, source=f"{CATALOGUE}/v1/{name}"))
        else:
            new.append(price)
            why = "no SKU" if not known else f"{len(known)} SKUs with different prices"
            missing.append(f"{price.service}, {price.item}, {price.region}: {why}; the price stays as it is")
    return Prices(new), missing


def with_region(prices: Prices, region: str) -> Prices:
    """The table with an unknown price of each regional item in one more region."""
    regional = {(p.service, p.item): p for p in prices.by_key.values() if p.region != ANYWHERE}
    more = (
        Price(service, item, region, p.unit, None, "", "")
        for (service, item), p in regional.items()
        if (service, item, region) not in prices.by_key
    )
    return Prices([*prices.by_key.values(), *more])


def _is(sku: Mapping[str, Any], price: Price) -> bool:
    description, unit = pattern(price.service, price.item)
    return (
        re.search(description, sku.get("description", "")) is not None
        and sku.get("category", {}).get("usageType") == "OnDemand"
        and (price.region == ANYWHERE or price.region in sku.get("serviceRegions", ()))
        and _expression(sku).get("usageUnit") == unit
    )


def _expression(sku: Mapping[str, Any]) -> Mapping[str, Any]:
    """The newest pricing expression; the list is in chronological order."""
    timeline = sku.get("pricingInfo") or [{}]
    found: Mapping[str, Any] = timeline[-1].get("pricingExpression", {})
    return found


def _priced(sku: Mapping[str, Any]) -> tuple[float | None, str]:
    """USD for a unit after the free tier, and the SKU's name."""
    for tier in _expression(sku).get("tieredRates", ()):
        money = tier.get("unitPrice", {})
        usd = int(money.get("units", 0)) + int(money.get("nanos", 0)) / 1e9
        if usd > 0:
            return usd, str(sku["name"])
    return None, ""


def listed(session: Session, url: str, key: str) -> Iterator[dict[str, Any]]:
    """All items of a list of the catalogue. Raises SystemExit with Google's message."""
    page = ""
    while True:
        answer = session.get(url, params={"pageSize": "5000", **({"pageToken": page} if page else {})}, timeout=60)
        if answer.status_code != 200:
            raise SystemExit(f"{url} answers {answer.status_code}: {answer.text[:500]}")
        body = answer.json()
        yield from body.get(key, ())
        page = body.get("nextPageToken", "")
        if not page:
            return


def fetch(session: Session, base: str = CATALOGUE) -> dict[str, list[dict[str, Any]]]:
    """The SKUs of the services in the table, by the service's name."""
    wanted = set(NAMES.values())
    services = {s["displayName"]: s["name"] for s in listed(session, f"{base}/v1/services", "services")}
    return {
        name: list(listed(session, f"{base}/v1/{services[name]}/skus", "skus")) for name in wanted if name in services
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make prices", description=__doc__)
    parser.add_argument("--region", help="add the prices of this region")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--catalogue", default=CATALOGUE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    prices = load(options.table)
    if options.region:
        prices = with_region(prices, options.region)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    new, missing = refresh(prices, fetch(_session(), options.catalogue), today)
    save(new, options.table)
    for line in missing:
        print(line, file=sys.stderr)


def _session() -> Session:
    import google.auth
    import google.auth.exceptions
    from google.auth.transport.requests import AuthorizedSession

    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
    except google.auth.exceptions.DefaultCredentialsError:
        raise SystemExit("There are no Google credentials: run `gcloud auth application-default login`.") from None
    session: Session = AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
    return session


if __name__ == "__main__":
    main()
