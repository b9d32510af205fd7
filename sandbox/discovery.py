"""Google's discovery documents: the method of a request, and the fields that it may have.

The documents are those that `google-api-python-client` ships, so names and shapes are Google's, not
ours. Reading both of Vertex AI's takes about 40 ms; the others are read when they are first asked for.
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sandbox.errors import GoogleError, error_violations
from sandbox.store import JSON

DOCUMENTS = (
    "aiplatform.v1",
    "aiplatform.v1beta1",
    "storage.v1",
    "artifactregistry.v1",
    "artifactregistry.v1beta2",
    "iam.v1",
    "serviceusage.v1",
    "serviceusage.v1beta1",
    "cloudresourcemanager.v1",
    "cloudresourcemanager.v3",
    "compute.v1",
    "cloudkms.v1",
    "logging.v2",
)
# Google tells its APIs apart by host, and some have the same paths. On one host all but Vertex AI begin with
# their name, which clients take as a part of the endpoint that they are given.
PREFIXES = {name.partition(".")[0] for name in DOCUMENTS} - {"aiplatform"}

# Query parameters of every Google API that the documents do not list.
GLOBAL_QUERY = {"$alt", "$prettyPrint", "$fields", "$userProject", "$callback", "$unique"}

# Fields that Google's pages show and the documents lack.
# https://docs.cloud.google.com/vertex-ai/docs/predictions/rolling-deployment
MORE_QUERY = {"aiplatform.projects.locations.endpoints.get": {"allDeploymentStates"}}
MORE_PROPERTIES = {"DeployedModel": {"state": {"type": "string"}}}

# Enums arrive as numbers from the generated REST clients (`$alt=json;enum-encoding=int`). Documents
# list values without numbers; the order is the number, but for these enums (values were added or removed between).
# Numbers: accelerator_type.proto, study.proto and custom_job.proto of google/cloud/aiplatform/v1, and repository.proto
# of google/devtools/artifactregistry/v1, compared in tests with Google's clients.
ENUM_NUMBERS: dict[str, dict[int, str]] = {
    "algorithm": {0: "ALGORITHM_UNSPECIFIED", 2: "GRID_SEARCH", 3: "RANDOM_SEARCH"},
    "strategy": {0: "STRATEGY_UNSPECIFIED", 1: "ON_DEMAND", 2: "LOW_COST", 3: "STANDARD", 4: "SPOT", 6: "FLEX_START"},
    "format": {
        0: "FORMAT_UNSPECIFIED",
        1: "DOCKER",
        2: "MAVEN",
        3: "NPM",
        5: "APT",
        6: "YUM",
        8: "PYTHON",
        9: "KFP",
        10: "GO",
        11: "GENERIC",
        12: "RUBY",
    },
    "acceleratorType": {
        0: "ACCELERATOR_TYPE_UNSPECIFIED",
        1: "NVIDIA_TESLA_K80",
        2: "NVIDIA_TESLA_P100",
        3: "NVIDIA_TESLA_V100",
        4: "NVIDIA_TESLA_P4",
        5: "NVIDIA_TESLA_T4",
        6: "TPU_V2",
        7: "TPU_V3",
        8: "NVIDIA_TESLA_A100",
        9: "NVIDIA_A100_80GB",
        10: "TPU_V4_POD",
        11: "NVIDIA_L4",
        12: "TPU_V5_LITEPOD",
        13: "NVIDIA_H100_80GB",
        14: "NVIDIA_H100_MEGA_80GB",
        15: "NVIDIA_H200_141GB",
        16: "NVIDIA_B200",
        17: "NVIDIA_GB200",
        18: "NVIDIA_RTX_PRO_6000",
    },
}


@dataclass(frozen=True)
class Method:
    """One method of a discovery document."""

    id: str  # e.g. aiplatform.projects.locations.endpoints.deployModel
    document: str  # e.g. aiplatform.v1
    request: str | None  # schema of the request's body
    response: str | None
    query: frozenset[str]

    @property
    def api(self) -> str:
        """The name of the API, such as `storage`."""
        return self.document.partition(".")[0]

    @property
    def version(self) -> str:
        return self.document.partition(".")[2]

    @property
    def vertex(self) -> bool:
        return self.document.startswith("aiplatform.")


@dataclass
class _Node:
    """A path segment of the routing tree; `*` is any segment."""

    children: dict[str, "_Node"] = field(default_factory=dict)
    methods: dict[tuple[str, str], Method] = field(default_factory=dict)  # (HTTP method, verb after ':')


@functools.cache
def document(name: str) -> JSON:
    """A discovery document by name, e.g. `aiplatform.v1`."""
    folder = importlib.resources.files("googleapiclient.discovery_cache.documents")
    parsed: JSON = json.loads((folder / f"{name}.json").read_bytes())
    if name.startswith("aiplatform."):
        for message, properties in MORE_PROPERTIES.items():
            version = name.partition(".")[2].replace("v", "V", 1)
            parsed["schemas"][f"GoogleCloudAiplatform{version}{message}"]["properties"] |= properties
    return parsed


def _methods(resource: JSON) -> Iterator[JSON]:
    yield from resource.get("methods", {}).values()
    for child in resource.get("resources", {}).values():
        yield from _methods(child)


@functools.cache
def _routes(api: str) -> _Node:
    root = _Node()
    for name in DOCUMENTS:
        if name.partition(".")[0] != (api or "aiplatform"):
            continue
        doc = document(name)
        for method in _methods(doc):
            base = doc["servicePath"].removeprefix(f"{api}/")
            path, _, verb = (base + method.get("flatPath", method["path"])).partition(":")
            node = root
            for segment in path.split("/"):
                key = "*" if segment.startswith("{") else segment
                node = node.children.setdefault(key, _Node())
            query = [p for p, v in method.get("parameters", {}).items() if v["location"] == "query"]
            node.methods[method["httpMethod"], verb] = Method(
                id=method["id"],
                document=name,
                request=method.get("request", {}).get("$ref"),
                response=method.get("response", {}).get("$ref"),
                query=frozenset([*query, *doc["parameters"], *GLOBAL_QUERY, *MORE_QUERY.get(method["id"], ())]),
            )
    return root


def route(http_method: str, path: str, api: str = "") -> Method | None:
    """The method that a request means, or None where Google has none.

    `path` is decoded and without the leading slash and the prefix: `v1/projects/p/locations/l/models:upload`.
    """
    head, _, last = path.rpartition("/")
    last, _, verb = last.partition(":")
    nodes = [_routes(api)]
    for segment in [*head.split("/"), last]:
        if not segment:
            return None
        # A literal segment goes before a wildcard, but both may lead on.
        nodes = [n.children[k] for n in nodes for k in (segment, "*") if k in n.children]
    for node in nodes:
        if method := node.methods.get((http_method, verb)):
            return method
    return None


# ------------------------------------------------------------------------------------------- shapes

_FORMATS = {
    "google-datetime": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)",
    "google-duration": r"-?\d+(\.\d{1,9})?s",
    "google-fieldmask": r"[A-Za-z0-9_.,`\"-]*",
    "int64": r"-?\d{1,19}",
    "uint64": r"\d{1,20}",
    "byte": r"[A-Za-z0-9+/_=-]*",
}


def _camel(name: str) -> str:
    return re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), name)


class _Reader:
    """Reads a JSON value by a schema, and reports mismatches in Google's words."""

    def __init__(self, name: str, *, request: bool) -> None:
        self.schemas: dict[str, JSON] = document(name)["schemas"]
        self.request = request
        self.errors: list[str] = []

    def wrong(self, at: str, kind: str, value: Any) -> Any:
        self.errors.append(f"Invalid value at '{at}' ({kind}), {json.dumps(value)[:80]}")
        return value

    def read(self, schema: JSON, value: Any, at: str, name: str = "") -> Any:
        if ref := schema.get("$ref"):
            schema = self.schemas[ref]
        kind = schema.get("type", "any")
        if kind == "any" or (value is None and self.request):  # JSON null is "not set" to Google
            return value
        if kind == "object":
            return self.object(schema, value, at)
        if kind == "array":
            if not isinstance(value, list):
                return self.wrong(at, "TYPE_ARRAY", value)
            return [self.read(schema["items"], v, f"{at}[{i}]", name) for i, v in enumerate(value)]
        return self.scalar(schema, kind, value, at, name)

    def object(self, schema: JSON, value: Any, at: str) -> Any:
        if not isinstance(value, dict):
            return self.wrong(at, "TYPE_MESSAGE", value)
        properties: dict[str, JSON] = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        result: JSON = {}
        for key, item in value.items():
            # Google's parser takes the proto names too.
            name = key if key in properties or not self.request else _camel(key)
            inner = f"{at}.{key}" if at else key
            if name in properties:
                if self.request and (properties[name].get("readOnly") or item is None):
                    continue  # output only: Google ignores it in requests
                result[name] = self.read(properties[name], item, inner, name)
            elif extra is not None:
                result[key] = self.read(extra, item, inner)
            else:
                where = f" at '{at}'" if at else ""
                self.errors.append(f'Unknown name "{key}"{where}: Cannot find field.')
        return result

    def scalar(self, schema: JSON, kind: str, value: Any, at: str, name: str) -> Any:
        form = schema.get("format", "")
        if kind == "boolean":
            return value if isinstance(value, bool) else self.wrong(at, "TYPE_BOOL", value)
        if kind == "integer":
            whole = isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**32
            return value if whole else self.wrong(at, "TYPE_INT32", value)
        if kind == "number":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return value if number else self.wrong(at, "TYPE_DOUBLE", value)
        if "enum" in schema:
            if self.request and isinstance(value, int) and not isinstance(value, bool):
                numbers = ENUM_NUMBERS.get(name) or dict(enumerate(schema["enum"]))
                value = numbers.get(value, value)
            return value if value in schema["enum"] else self.wrong(at, "TYPE_ENUM", value)
        if form in ("int64", "uint64") and self.request and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str):
            return self.wrong(at, "TYPE_STRING", value)
        if form in _FORMATS and not re.fullmatch(_FORMATS[form], value):
            return self.wrong(at, f"TYPE_STRING, {form}", value)
        return value


def read_request(method: Method, query: list[str], body: Any) -> JSON:
    """The request's body as the server uses it: camelCase names, enums by name, output-only fields out.

    Raises INVALID_ARGUMENT, worded as Google does, for unknown names, wrong types, formats and enums.
    """
    reader = _Reader(method.document, request=True)
    for name in query:
        if name not in method.query and _camel(name) not in method.query:
            reader.errors.append(
                f'Unknown name "{name}": Cannot bind query parameter. '
                f"Field '{name}' could not be found in request message."
            )
    result = {}
    if method.request:
        result = reader.read({"$ref": method.request}, body, "")
    elif body:
        reader.errors.append("Request body is not expected by this method.")
    if reader.errors:
        lines = "\n".join(f"Invalid JSON payload received. {e}" if "Unknown" in e else e for e in reader.errors)
        violations = [{"description": e} for e in reader.errors]
        detail = {"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations}
        raise GoogleError("INVALID_ARGUMENT", lines, details=[detail])
    return result


def response_violations(method: Method, status: int, body: Any) -> list[str]:
    """The departures of a response from the document; empty if it fits."""
    if status >= 400:
        return error_violations(method.api, status, body)
    if not method.response:
        return [] if body == {} else ["the method answers an empty body"]
    reader = _Reader(method.document, request=False)
    reader.read({"$ref": method.response}, body, "")
    # An operation's metadata and response are `any` to the document, but name their own schema.
    if method.response == "GoogleLongrunningOperation":
        for part in ("metadata", "response"):
            reader.errors += _typed_violations(method.document, part, body.get(part))
    if method.response == "GoogleLongrunningListOperationsResponse":
        for operation in body.get("operations", []):
            for part in ("metadata", "response"):
                reader.errors += _typed_violations(method.document, part, operation.get(part))
    return reader.errors


def _typed_violations(name: str, part: str, value: JSON | None) -> list[str]:
    if value is None:
        return []
    kind = str(value.get("@type", "")).removeprefix("type.googleapis.com/")
    if kind == "google.protobuf.Empty":
        return []
    version, _, message = kind.removeprefix("google.cloud.aiplatform.").partition(".")
    if version not in ("v1", "v1beta1") or not message:
        return [f"{part} has no @type of this API: {kind}"]
    schema = "GoogleCloudAiplatform" + version.replace("v", "V", 1) + message
    reader = _Reader(f"aiplatform.{version}", request=False)
    if schema not in reader.schemas:
        return []  # REST documents leave out types that only operations carry
    reader.read({"$ref": schema}, {k: v for k, v in value.items() if k != "@type"}, part)
    return reader.errors
