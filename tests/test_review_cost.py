"""What a stack costs: by hand, with unknown prices, and as the Cloud Billing catalogue has it."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import requests
from googleapiclient import discovery_cache
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from review_previews import a_change
from werkzeug import Request, Response

from infra.settings import Settings
from review import catalogue, events, markdown, page, prices, words
from review.cost import HOURS_PER_MONTH, Cost, Machines, Unknown, cost
from review.prices import COMPUTE, PREDICTION, TRAINING, Price, Prices
from review.summary import as_json, review

REGION = "europe-west4"


def price(service: str, item: str, usd: float | None, region: str = REGION, unit: str = "hour") -> Price:
    return Price(service, item, region, unit, usd, "2026-11-21", "https://example.com")


KNOWN = Prices(
    [
        price(PREDICTION, "G2 vCPU", 0.03),
        price(PREDICTION, "G2 GB", 0.004),
        price(PREDICTION, "NVIDIA_L4", 0.5),
        price(COMPUTE, "C3 vCPU", 0.04),
        price(COMPUTE, "C3 GB", 0.005),
        price(TRAINING, "N1 vCPU", 0.05),
        price(TRAINING, "N1 GB", 0.01),
    ]
)


def test_the_cost_is_that_of_cores_memory_and_accelerators() -> None:
    found = cost([Machines("main", "g2-standard-8", 1, 3, "NVIDIA_L4", 1)], REGION, KNOWN)
    assert found.least == pytest.approx(8 * 0.03 + 32 * 0.004 + 0.5)
    assert found.most == pytest.approx(3 * found.least)
    assert found.exact
    assert {p.item for p in found.sources} == {"G2 vCPU", "G2 GB", "NVIDIA_L4"}


def test_without_a_price_of_vertex_ai_the_cost_is_a_lower_bound() -> None:
    found = cost([Machines("main", "c3-highcpu-4", 1, 1)], REGION, KNOWN)
    assert found.least == pytest.approx(4 * 0.04 + 8 * 0.005)
    assert found.unknown == (Unknown("c3-highcpu-4", REGION, "fee"),)


@pytest.mark.parametrize(
    ("machines", "region", "why"),
    [
        (Machines("main", "z9-mega-4", 1, 1), REGION, "price"),
        (Machines("main", "c3-highcpu-4", 1, 1), "mars-east1", "price"),
        (Machines("main", "g2-standard-8", 1, 1, "NVIDIA_NEW", 1), REGION, "price"),
        (Machines("main", "g2-standard-8", 1, 1, spot=True), REGION, "spot"),
    ],
)
def test_an_unknown_price_stays_unknown(machines: Machines, region: str, why: str) -> None:
    found = cost([machines, Machines("other", "g2-standard-4", 1, 1)], region, KNOWN)
    assert (machines.machine, region, why) in [(u.machine, u.region, u.why) for u in found.unknown]
    assert not found.exact


def test_scale_to_zero_costs_nothing_at_least() -> None:
    found = cost([Machines("main", "g2-standard-4", 0, 2)], REGION, KNOWN)
    assert found.least == 0 < found.most


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4))
def test_sums_add_up(replicas: list[tuple[int, int]]) -> None:
    each = [Machines(str(n), "g2-standard-4", a, a + b) for n, (a, b) in enumerate(replicas)]
    whole = cost(each, REGION, KNOWN)
    hour = 4 * 0.03 + 16 * 0.004
    assert whole.least == pytest.approx(hour * sum(a for a, _ in replicas))
    assert whole.most_month == pytest.approx(hour * sum(a + b for a, b in replicas) * HOURS_PER_MONTH)
    assert sum((cost([one], REGION, KNOWN) for one in each), Cost()) == whole


def test_the_cost_of_pictures_is_the_price_of_the_time() -> None:
    assert prices.cost_per_thousand(usd_per_hour=3.6, rate=10) == pytest.approx(0.1)


def test_the_table_has_each_price_with_its_source_or_marked_unknown(tmp_path: Path) -> None:
    table = prices.load()
    lines = prices.TABLE.read_text().splitlines()
    assert len(table.by_key) == len(lines) - 1, "no price twice"
    for one in table.by_key.values():
        assert one.service in catalogue.NAMES
        if one.usd is None:
            assert not one.day
            assert not one.source
        else:
            assert one.source.startswith("https://")
            assert not one.day or date.fromisoformat(one.day) < date(2100, 1, 1)
    prices.save(table, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == prices.TABLE.read_text()


def test_the_default_machine_has_at_least_a_lower_bound() -> None:
    machine = Settings.model_fields["machine_type"].default
    assert cost([Machines("main", machine, 1, 1)], REGION, prices.load()).least == pytest.approx(0.1786092)


def test_the_machines_of_the_record_from_which_the_c3_prices_are_come_out_as_it_has_them() -> None:
    """The record has machines, the table their parts."""
    table = prices.load()
    for machine, region, usd in (
        ("c3-highcpu-4", "us-central1", 0.170104),
        ("c3-highmem-88", "us-central1", 5.821552),
        ("c3-standard-176", REGION, 9.3142896),  # not used to find the parts
    ):
        assert table.machine(COMPUTE, machine, region) == pytest.approx(usd, rel=1e-6)


def test_a_job_has_a_price_an_hour_and_no_sum() -> None:
    inputs = {"machineType": "n1-standard-4", "replicas": 2, "timeoutSeconds": 7200}
    for type_, more, count in (("CustomJob", {}, 2), ("TuningJob", {"parallelTrials": 3}, 6)):
        new = {"inputs": {**inputs, **more}}
        metadata = {"op": "create", "urn": "urn::x::train", "type": f"vertex:index:{type_}", "new": new}
        log = [
            {"preludeEvent": {"config": {"gcp:region": REGION}}},
            {"resourcePreEvent": {"metadata": metadata}},
            {"summaryEvent": {"result": "succeeded"}},
        ]
        found = review(events.read("dev", map(json.dumps, log)), KNOWN)
        assert found.jobs[0].hour == pytest.approx(count * (4 * 0.05 + 15 * 0.01))
        assert found.cost_after.most == 0
        said = " ".join(words.cost_remarks(found))
        assert f"runs once on {count} × n1-standard-4: {count * 0.35:.2f} USD an hour" in said
        assert "not known, at most 2 hours" in said
        unknown = review(events.read("dev", map(json.dumps, log)), Prices([]))
        assert "an unknown price an hour" in " ".join(words.cost_remarks(unknown))


def test_runs_of_a_pipeline_are_named_with_their_times_and_without_a_price() -> None:
    nightly = {"cron": "0 3 * * *", "timeZone": "Europe/Amsterdam"}
    for type_, inputs, said in (
        ("PipelineJob", {}, "The pipeline job `train` runs once and costs the machines of its steps"),
        ("Schedule", nightly, "starts a run at 03:00 every day (Europe/Amsterdam). Each run costs the machines of its"),
        ("Schedule", nightly | {"paused": True}, "is paused; resumed, it would start a run at 03:00 every day"),
    ):
        urn = f"urn:pulumi:dev::headcount::vertex:index:{type_}::train"
        found = review(a_change(None, inputs, urn=urn, type=f"vertex:index:{type_}"), KNOWN)
        assert said in markdown.render(found)
        assert "whose price is not known" in page.render(found) or "resumed" in said
        assert as_json(found)["runs"][0]["name"] == "train"


# ------------------------------------------------------------------------------------------------ the catalogue

DOCUMENT = json.loads(
    (Path(discovery_cache.__file__).parent / "documents" / "cloudbilling.v1.json").read_text()
)  # Google's own description of the catalogue
SERVICES = {"Compute Engine": "6F81", "Vertex AI": "C7E2", "Cloud Storage": "95FF", "Artifact Registry": "149C"}


def sku(number: int, description: str, unit: str, *rates: tuple[int, int], regions: list[str], usage: str = "OnDemand"):  # type: ignore[no-untyped-def]
    """A SKU in the form of the discovery document. rates: (units, nanos) of each tier, from the first amount on."""
    tiers = [
        {"startUsageAmount": float(n), "unitPrice": {"currencyCode": "USD", "units": str(units), "nanos": nanos}}
        for n, (units, nanos) in enumerate(rates)
    ]
    return {
        "name": f"services/X/skus/{number}",
        "skuId": str(number),
        "description": description,
        "category": {
            "serviceDisplayName": "X",
            "resourceFamily": "Compute",
            "resourceGroup": "CPU",
            "usageType": usage,
        },
        "serviceRegions": regions,
        "pricingInfo": [
            {"summary": "old", "pricingExpression": {"usageUnit": unit, "tieredRates": []}},
            {"summary": "", "pricingExpression": {"usageUnit": unit, "tieredRates": tiers}},
        ],
        "serviceProviderName": "Google",
    }


ONLINE = "Vertex AI: Online/Batch Prediction"
LISTED: dict[str, list[dict[str, Any]]] = {
    "Compute Engine": [
        sku(1, "C3 Instance Core running in Netherlands", "h", (0, 36_382_500), regions=[REGION]),
        sku(2, "Spot Preemptible C3 Instance Core running in Netherlands", "h", (0, 1), regions=[REGION]),
        sku(3, "C3 Instance Ram running in Netherlands", "GiBy.h", (0, 4_134_900), regions=[REGION]),
        sku(4, "C3 Instance Core running in Iowa", "h", (1, 500_000_000), regions=["us-central1"]),
        sku(5, "Commitment v1: C3 Cpu in Netherlands", "h", (0, 2), regions=[REGION], usage="Commit1Yr"),
        sku(14, "C3 Instance Core running in Netherlands", "h", (0, 7), regions=[REGION], usage="Preemptible"),
        sku(6, "C3 Instance Ram running in Iowa", "h", (9, 0), regions=["us-central1"]),  # another unit
    ],
    "Vertex AI": [
        sku(7, f"{ONLINE} C3 Instance Core running in Netherlands", "h", (0, 41_000_000), regions=[REGION]),
        sku(8, f"{ONLINE} C3 Instance Ram running in Netherlands", "GiBy.h", (0, 4_700_000), regions=[REGION]),
        sku(9, "Vertex AI: Training/Pipelines on C3 Instance Core running in", "h", (0, 9), regions=[REGION]),
    ],
    "Cloud Storage": [
        sku(10, "Standard Storage Netherlands", "GiBy.mo", (0, 0), (0, 20_000_000), regions=[REGION]),
        sku(11, "Standard Storage Iowa", "GiBy.mo", (0, 20_000_000), regions=["us-central1"]),
        sku(12, "Standard Storage Iowa Dual-region", "GiBy.mo", (0, 30_000_000), regions=["us-central1"]),
    ],
    "Artifact Registry": [
        sku(13, "Artifact Registry Storage", "GiBy.mo", (0, 0), (0, 100_000_000), regions=["global"]),
    ],
}  # fmt: skip


def conforms(value: Any, schema: dict[str, Any]) -> None:
    """Fails if a value is not as the discovery document describes it."""
    schema = DOCUMENT["schemas"][schema["$ref"]] if "$ref" in schema else schema
    if schema["type"] == "object":
        assert isinstance(value, dict)
        for name, item in value.items():
            conforms(item, schema["properties"][name])
    elif schema["type"] == "array":
        for item in value:
            conforms(item, schema["items"])
    else:
        assert isinstance(value, {"string": str, "integer": int, "number": float, "boolean": bool}[schema["type"]])


@pytest.fixture
def billing(httpserver: HTTPServer) -> HTTPServer:
    """The catalogue's two methods, two items a page. Requests and answers are as the discovery document has them."""
    methods = (
        DOCUMENT["resources"]["services"]["methods"],
        DOCUMENT["resources"]["services"]["resources"]["skus"]["methods"],
    )

    def answer(request: Request) -> Response:
        if request.path == "/v1/services":
            method, key = methods[0]["list"], "services"
            items = [
                {
                    "name": f"services/{id_}",
                    "serviceId": id_,
                    "displayName": name,
                    "businessEntityName": "businessEntities/GCP",
                }
                for name, id_ in SERVICES.items()
            ]
        else:
            method, key = methods[1]["list"], "skus"
            match = re.fullmatch(r"/v1/(services/([^/]+))/skus", request.path)
            assert match
            assert re.fullmatch(method["parameters"]["parent"]["pattern"], match[1])
            items = LISTED[{id_: name for name, id_ in SERVICES.items()}[match[2]]]
        assert request.method == method["httpMethod"]
        assert set(request.args) <= set(method["parameters"])
        start = int(request.args.get("pageToken", 0))
        body: dict[str, Any] = {key: items[start : start + 2]}
        if start + 2 < len(items):
            body["nextPageToken"] = str(start + 2)
        conforms(body, method["response"])
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request(re.compile("/v1/.*")).respond_with_handler(answer)
    return httpserver


def test_the_catalogue_fills_the_table(
    billing: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "_session", requests.Session)
    table = tmp_path / "prices.csv"
    table.write_text(prices.TABLE.read_text())
    catalogue.main(["--table", str(table), "--catalogue", billing.url_for("").rstrip("/")])
    found = prices.load(table)
    usd = {key: one.usd for key, one in found.by_key.items()}
    assert usd[COMPUTE, "C3 vCPU", REGION] == 0.0363825
    assert usd[COMPUTE, "C3 vCPU", "us-central1"] == 1.5
    assert usd[PREDICTION, "C3 vCPU", REGION] == 0.041
    assert usd["storage", "standard", REGION] == 0.02, "after the free tier"
    assert usd["registry", "storage", "*"] == 0.1
    changed = found.by_key[PREDICTION, "C3 GB", REGION]
    assert changed.source.endswith("/v1/services/X/skus/8")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", changed.day)
    assert found.machine(PREDICTION, "c3-highcpu-4", REGION) == pytest.approx(4 * 0.041 + 8 * 0.0047)
    # What it does not find, or finds twice, stays as it was and is said.
    said = capsys.readouterr().err
    assert "compute, C3 GB, us-central1: no SKU" in said
    assert usd[COMPUTE, "C3 GB", "us-central1"] == 0.003938
    assert "storage, standard, us-central1: 2 SKUs with different prices" in said
    assert "logging, storage, *: no SKU" in said


def test_another_region_gets_the_same_items(billing: HTTPServer) -> None:
    table = catalogue.with_region(prices.load(), "europe-north1")
    added = {key for key in table.by_key if key[2] == "europe-north1"}
    assert {key[:2] for key in added} == {(s, i) for s, i, region in prices.load().by_key if region != "*"}
    assert catalogue.with_region(table, "europe-north1").by_key == table.by_key


def test_a_refusal_of_the_catalogue_is_told(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/v1/services").respond_with_json({"error": {"message": "no permission"}}, status=403)
    with pytest.raises(SystemExit, match=r"(?s)403.*no permission"):
        catalogue.fetch(requests.Session(), httpserver.url_for("").rstrip("/"))


@pytest.mark.parametrize(
    ("service", "item", "description"),
    [
        (PREDICTION, "N1 vCPU", "Vertex AI: Online/Batch Prediction N1 Predefined Instance Core running in Americas"),
        (TRAINING, "E2 GB", "Vertex AI: Training/Pipelines on E2 Instance Ram running in Singapore"),
        (COMPUTE, "N1 vCPU", "N1 Predefined Instance Core running in Singapore"),
        (COMPUTE, "NVIDIA_TESLA_T4", "Nvidia Tesla T4 GPU running in Singapore"),
        (COMPUTE, "NVIDIA_L4", "Nvidia L4 GPU running in Netherlands"),
    ],
)
def test_descriptions_of_the_catalogue_are_recognised(service: str, item: str, description: str) -> None:
    """As public code that reads the catalogue has them."""
    assert re.search(catalogue.pattern(service, item)[0], description)
    assert not re.search(catalogue.pattern(service, item)[0], f"Spot Preemptible {description}")
