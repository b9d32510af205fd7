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

A job cannot be written to once it is made, so it carries no claim. The state that the engine has created or compared
last, in this process, is the current one, and a deletion of the other state leaves the job alone (jobs/job.py). The
engine compares the current state before it deletes what was replaced, also in a later run.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from typing import Final

from .definition import Definition
from .differences import with_defaults
from .wire import Wire

OUTPUT: Final = "__claim"  # in the outputs of a state; two underscores keep it out of Pulumi's displays and diffs
LABEL: Final = "pulumi-claim"  # of an endpoint
_ALIAS = re.compile(r"pulumi-claim-([0-9a-f]{8})")


def mark_of(definition: Definition, urn: str, inputs: Wire) -> str:
    """16 hexadecimal digits by which a create that was killed finds its own work again.

    They are a hash of the resource and of the inputs that cannot change. Two resources of the same content are two
    things, because the URN is part of the hash.
    """
    filled = with_defaults(definition.inputs, inputs)
    # Only what is given, so that another input of a later release of this provider changes no mark.
    fixed = {p.wire: filled[p.wire] for p in definition.inputs if p.field.replaces and p.wire in filled}
    return hashlib.sha256(json.dumps([urn, fixed], sort_keys=True).encode()).hexdigest()[:16]


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
