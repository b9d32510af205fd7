"""The tasks of a pipeline job's process, and the values that they pass on."""

from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]
# What a stub writes into the file of an output parameter.
STUBBED = {
    "NUMBER_INTEGER": "1",
    "NUMBER_DOUBLE": "0.5",
    "BOOLEAN": "true",
    "LIST": "[]",
    "STRUCT": "{}",
}


@dataclass
class Task:
    path: tuple[str, ...]
    kind: str  # container, importer or dag
    id: str
    spec: Any
    executor: Any = None
    attempts: int = 0  # containers that were started
    error: JSON | None = None
    arguments: JSON = field(default_factory=dict)
    inputs: JSON = field(default_factory=dict)  # the ExecutorInput, as a dictionary
    expected: dict[str, str] = field(default_factory=dict)  # the files of its outputs, with a stub's text

    @property
    def unique(self) -> str:
        return ".".join(self.path)


def mounted(uri: str) -> str:
    """The path under which containers have a gs:// object."""
    return "/gcs/" + uri.removeprefix("gs://") if uri.startswith("gs://") else uri


def whole_numbers(value: Any) -> Any:
    """A JSON value whose numbers have no point where they need none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    return {key: whole_numbers(item) for key, item in value.items()} if isinstance(value, dict) else value
