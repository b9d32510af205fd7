"""The recorded previews, and previews that a test makes up."""

from __future__ import annotations

import json
from typing import Any

from helpers import ROOT

from review import events, prices
from review.events import Preview
from review.served import served
from review.summary import Review, review

RECORDS = ROOT / "tests" / "reviews"
EXITS = {
    "nothing": 0,
    "prod-endpoint-kind": 1,
    "first-deployment": 2,
    "new-handler-line": 2,
    "machine-type": 2,
    "replicas": 2,
    "canary": 2,
    "promotion": 2,
    "rollback": 2,
    "bucket-public": 3,
    "endpoint-kind": 3,
    "new-predictor": 3,
    "paused": 3,
    "prod-below-two": 3,
    "prod-over-limit": 3,
    "prod-without-canary": 3,
}
PRICES = prices.load()


def recorded(name: str) -> Preview:
    stack = "prod" if name.startswith("prod-") else "dev"
    return events.read(stack, (RECORDS / f"{name}.jsonl").read_text().splitlines())


def earlier() -> set[str]:
    """The versions that had served when the rollback was previewed."""
    past = json.loads((RECORDS / "dev.json").read_text())
    return served(past, past["history"])


def reviewed(name: str) -> Review:
    return review(recorded(name), PRICES, earlier() if name == "rollback" else ())


def a_change(old: dict[str, Any] | None, new: dict[str, Any] | None, **more: Any) -> Preview:
    """The preview of one changed resource beside one that stays."""
    op = "update" if old is not None and new is not None else "create" if old is None else "delete"
    metadata = {"op": op, "urn": "urn:pulumi:dev::headcount::a:b/c:Thing::thing", "type": "a:b/c:Thing", **more}
    for side, inputs in (("old", old), ("new", new)):
        protect = metadata.pop(f"{side}_protect", False)
        metadata[side] = None if inputs is None else {"inputs": inputs, "protect": protect}
    stays = {"op": "same", "urn": "urn:pulumi:dev::headcount::a:b:C::stays", "type": "a:b:C", "old": {}, "new": {}}
    log = [{"resourcePreEvent": {"metadata": m}} for m in (stays, metadata)]
    return events.read("dev", [*map(json.dumps, log), '{"summaryEvent": {"result": "succeeded"}}'])
