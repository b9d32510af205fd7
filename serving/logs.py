"""The launcher's log: JSON lines for machines, short lines for people."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from typing import Any

from serving.contract import PREDICT_ROUTE

# A sample picture of YOLOv5, for users without one at hand.
SAMPLE_URL = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images/bus.jpg"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def log(message: str, level: int = logging.INFO, **fields: Any) -> None:
    logging.getLogger("headcount").log(level, message, extra={"fields": fields})


def set_up(level: str, console: bool) -> None:
    """Log to stdout, for people if console is set. Raises ValueError for a level that does not exist."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(ForPeople() if console else JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if level not in LEVELS:
        raise ValueError(f"HEADCOUNT_LOG_LEVEL is {level!r}; set it to one of {', '.join(LEVELS)}")
    logging.getLogger().setLevel(level)


class JsonLines(logging.Formatter):
    """One JSON object a line, with the names Cloud Logging reads (https://cloud.google.com/logging/docs/structured-logging)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "severity": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ForPeople(logging.Formatter):
    """A short line for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        if record.getMessage() == "ready":
            return welcome(**fields)
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {told}".rstrip()
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def welcome(url: str, sample: str, workers: int, seconds: float, model: str = "", **_: object) -> str:
    """Returns the text for the person at the terminal, with a line to paste.

    sample: a picture's path, or empty. model: the name of an exported model, if there is one.
    """
    if model:
        return (
            f"\nHeadcount serves the model {model} at {url} with {workers} workers, ready after {seconds} s. "
            f"Predict:\n\n  headcount predict --url {url} --json-instances FILE\n\nCtrl-C stops it.\n"
        )
    count = f"curl --data-binary @{shlex.quote(sample)} {url}{PREDICT_ROUTE}"
    if not sample:
        count = f"curl -sL {SAMPLE_URL} | curl --data-binary @- {url}{PREDICT_ROUTE}"
    return (
        f"\nHeadcount counts at {url} with {workers} workers, ready after {seconds} s. "
        f"Count the people in a picture:\n\n  {count}\n\nCtrl-C stops it.\n"
    )
