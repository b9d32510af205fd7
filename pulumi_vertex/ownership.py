"""Whose a thing on Vertex AI is, where Pulumi's state holds it twice.

A create finds the work of an earlier run and continues with it, because an upload or a deployment of a run that was
killed must not be lost. For the same reason a replacement (`up --replace`, another provider, a change that is taken
back after a failed update) can end with the very version or endpoint that it replaces. Pulumi then holds two states
with one id, that of the new resource and that of the old one, which it still deletes: at the end of the same run, or in
a later one, in this process or in another, by `up`, by `destroy`, with a refresh or without. A request to delete does
not say which of the two it means. (Pulumi's engine: pkg/resource/deploy/step.go, CreateStep, RefreshStep and
DeleteStep; step_generator.go, GenerateDeletes.)

So the thing itself tells. A create that takes something over makes a claim, a random number. It keeps the claim in its
state and writes it on the thing, over that of an earlier create. A deletion removes what carries no claim or the claim
of its own state, and leaves the rest to the later create. A version carries a claim as an alias, an endpoint as a
label; deployed models carry, in their display names, the claim of the create which deployed them. Where nothing is
taken over, versions and endpoints carry none.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from .wire import Wire

OUTPUT: Final = "__claim"  # in the outputs of a state; two underscores keep it out of Pulumi's displays and diffs
LABEL: Final = "pulumi-claim"  # of an endpoint
_ALIAS = re.compile(r"pulumi-claim-([0-9a-f]{8})")


def new_claim() -> str:
    return secrets.token_hex(4)


def claim_of(outputs: Wire) -> str:
    """The claim of a state, "" of one that has taken nothing over."""
    return str(outputs.get(OUTPUT) or "")


def as_output(claim: str) -> Wire:
    return {OUTPUT: claim} if claim else {}


def alias_of(claim: str) -> str:
    return f"pulumi-claim-{claim}"


def claims_in(aliases: list[str]) -> set[str]:
    """The claims that a version's aliases tell."""
    return {found[1] for alias in aliases if (found := _ALIAS.fullmatch(alias))}


def without_claims(aliases: list[str]) -> list[str]:
    return [alias for alias in aliases if not _ALIAS.fullmatch(alias)]
