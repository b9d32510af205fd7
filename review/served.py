"""Which model versions have answered requests, from Pulumi's state and history."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .dangers import VERSION


def served(deployment: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> set[str]:
    """The versions of a stack, as `ID@NUMBER`, whose release has had traffic since they were made.

    deployment: as `pulumi stack export` has it. history: as `pulumi stack history --json` has it.
    """
    updates = [
        (_time(update["endTime"]), _with_traffic(update.get("config") or {}))
        for update in history
        if update.get("kind") == "update" and update.get("result") == "succeeded"
    ]
    return {
        str(resource["id"]).rpartition("/models/")[2]
        for resource in (deployment.get("deployment") or {}).get("resources") or ()
        if resource["type"] == VERSION and resource.get("id") and resource.get("created")
        for made, release in [(_time(resource["created"]), resource["urn"].rpartition("::")[2])]
        if any(ended >= made and release in releases for ended, releases in updates)
    }


def _with_traffic(config: Mapping[str, Any]) -> set[str]:
    """The releases that an update gave traffic."""
    if str((config.get("headcount:paused") or {}).get("value", "")).lower() == "true":
        return set()
    given = (config.get("headcount:releases") or {}).get("value")
    releases = json.loads(given) if given else {"main": {"traffic": 100}}  # as infra/settings.py has it
    return {name for name, release in releases.items() if release.get("traffic")}


def _time(text: str) -> datetime:
    """A time of Pulumi's, in whole seconds, as its history has them."""
    return datetime.fromisoformat(text).replace(microsecond=0)
