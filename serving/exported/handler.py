"""The TorchServe handler of an exported model: JSON instances in, predictions out."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from serving.base_handler import BaseHandler, RawRequest, Reply
from serving.contract import RequestError
from serving.exported.model import ExportedModel
from serving.exported.requests import TOGETHER, InstancesState, parse, reply

logger = logging.getLogger("handler")


class ExportedHandler(BaseHandler[InstancesState]):
    """Predicts with a model that was exported with torch.export."""

    state_type = InstancesState

    def set_up(self, model: Path, folder: Path, gpu: int) -> dict[str, Any]:
        """Load the model and let it predict its examples. model: a folder with model.pt2 and contract.json."""
        cuda = os.environ.get("HEADCOUNT_ACCELERATOR") != "cpu" and torch.cuda.is_available()
        device = torch.device(f"cuda:{gpu}" if cuda else "cpu")
        self.model = ExportedModel(model, device, self.limits.max_pixels)
        return {"device": device.type}

    def decode(self, raw: RawRequest) -> InstancesState:
        return parse(raw, self.model.contract.name, self.limits)

    def predict(self, states: list[InstancesState]) -> None:
        for state in states:
            began = time.perf_counter()
            try:
                for start in range(0, len(state.instances), TOGETHER):
                    state.answers += self.model.predict(state.instances[start : start + TOGETHER])
                    self.run_folder.sign_of_life()
            except Exception:
                logger.exception("predicting failed")
                state.error = RequestError("the server failed to predict these instances", 500)
            state.spend("inference", (time.perf_counter() - began) * 1e3)

    def answer(self, state: InstancesState) -> Reply:
        return reply(state.answers)
