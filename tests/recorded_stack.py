"""What Pulumi's engine said of a stack: recorded on the sandbox, and cut down to what the commands read.

The stack served release main, gave next 10 %, promoted it, and then drifted by hand.
"""

from __future__ import annotations

import json
from typing import Any, Final

from helpers import ROOT

_RECORDED: Final = json.loads((ROOT / "tests" / "recorded" / "operated_stack.json").read_text())
REFRESH: Final[dict[str, Any]] = _RECORDED["refresh"]  # pulumi refresh --preview-only --json
HISTORY: Final[list[dict[str, Any]]] = _RECORDED["history"]  # pulumi stack history --json
STATES: Final[list[dict[str, Any]]] = _RECORDED["states"]  # the deployment after each update, the oldest first
ENDPOINT: Final = "projects/headcount-local/locations/europe-west4/endpoints/970367916"
OUTPUTS: Final[dict[str, Any]] = {
    "endpoint": ENDPOINT,
    "url": f"http://127.0.0.1:8790/v1/{ENDPOINT}",
    "maxRequestBytes": 10485760,
    "models": {
        name: f"projects/headcount-local/locations/europe-west4/models/headcount-local@{number}"
        for name, number in (("main", 1), ("next", 2))
    },
}
