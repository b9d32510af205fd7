"""Starts the Flask REST server of a YOLOv5 checkout: `python flask_peer.py CHECKOUT CHECKPOINT PORT`.

The interpreter is the checkout's own. The server is run as it is, except that it would fetch its code and its weights
from GitHub at every start: torch.hub.load takes the checkout and the checkpoint instead, so that it needs no network
and computes with the same weights as its competitors.
"""

import runpy
import sys

import torch

checkout, checkpoint, port = sys.argv[1:]
load = torch.hub.load
torch.hub.load = lambda *_, **__: load(checkout, "custom", checkpoint, source="local")  # type: ignore[no-untyped-call]
sys.argv = ["restapi.py", "--port", port, "--model", "people"]  # the model's name is in the route
runpy.run_path(f"{checkout}/utils/flask_rest_api/restapi.py", run_name="__main__")
