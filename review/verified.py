"""What `headcount verify STACK --json` measured, as the sentence of a review."""

from __future__ import annotations

import json
from typing import Any, Final

_RESULTS: Final = {
    "good": "is good",
    "measured": "was measured alone",
    "worse": "is worse",
    "too high": "is not good enough",
    "too few answers": "is not proved",
}


def sentence(text: str, stack: str) -> str:
    """The count error of the release that was verified, and how it was obtained. Raises ValueError."""
    try:
        proof = json.loads(text)
        if proof["stack"] != stack:
            raise ValueError(f"This proof is of stack {proof['stack']}: run `headcount verify {stack} --json`.")
        release, against, error = f"`{proof['release']}`", proof["against"], proof["error"]
        parts = [f"Release {release} {_RESULTS[proof['result']]}"]
        if error is not None:
            parts.append(f"it miscounts {error:.3f} people a picture on {proof['pictures']} labelled pictures")
        if against and proof["baseline"] is not None:
            parts.append(f"`{against}`, which has most of the traffic, {proof['baseline']:.3f} on the same pictures")
        latency = next((one["p95"] for one in proof["versions"] if one["release"] == proof["release"]), None)
        if latency is not None:
            parts.append(f"95 % of its answers came within {latency:.2f} s")
        if proof["failed"]:
            parts.append(f"{proof['failed']} of {proof['requests']} requests were not answered")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError("This is no output of `headcount verify STACK --json`: write that into the file.") from None
    return _joined(parts) + _because(proof)


def _joined(parts: list[str]) -> str:
    return parts[0] + (": " + "; ".join(parts[1:]) if len(parts) > 1 else "") + "."


def _because(proof: dict[str, Any]) -> str:
    return f" {proof['why'][0].upper()}{proof['why'][1:].rstrip('.')}." if proof["why"] else ""
