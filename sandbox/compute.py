"""Compute Engine: its regions, which the google provider lists when it starts.

https://cloud.google.com/compute/docs/reference/rest/v1/regions
"""

from sandbox.context import Call
from sandbox.store import JSON

# Some existing regions; the google provider only asks whether the configured one is among them.
REGIONS = (
    *("asia-east1", "asia-northeast1", "asia-south1", "asia-southeast1", "australia-southeast1", "me-west1"),
    *("europe-north1", "europe-west1", "europe-west2", "europe-west3", "europe-west4", "europe-west9"),
    *("northamerica-northeast1", "southamerica-east1", "us-central1", "us-east1", "us-east4", "us-west1"),
)


async def list_regions(call: Call) -> JSON:
    items = [{"kind": "compute#region", "name": name, "status": "UP"} for name in REGIONS]
    return {"kind": "compute#regionList", "id": call.name, "items": items}


METHODS = {"compute.regions.list": list_regions}
