"""Checks a pipeline's template and the parameters of a run, before anything of the run exists.

A template is what KFP's compiler writes, a PipelineSpec message:
https://github.com/kubeflow/pipelines/blob/master/api/v2alpha1/pipeline_spec.proto
"""

import functools
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from sandbox.discovery import ENUM_NUMBERS
from sandbox.errors import invalid, unimplemented
from sandbox.store import JSON

SCHEMA = "2.1.0"  # of KFP 2; runs of 2.0.0, which KFP 1.8 compiles, pass `parameters` instead of `parameterValues`
FOLDER = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/.*)?")
PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
# What a value of each parameterType may be in JSON. bool is a subclass of int.
TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


@functools.cache
def _messages() -> Any:
    """The generated module of PipelineSpec. Importing it by its name imports all of kfp, which takes two seconds."""
    found = importlib.util.find_spec("kfp")
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / "pipeline_spec" / "pipeline_spec_pb2.py"
    spec = importlib.util.spec_from_file_location("sandbox_pipeline_spec_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wrong(what: str) -> Exception:
    return invalid(f"Invalid pipeline_spec: {what}. A template is compiled with kfp.compiler.Compiler().compile().")


def check_template(spec: JSON) -> None:
    """Raises INVALID_ARGUMENT for a PipelineSpec that is none, UNIMPLEMENTED for a part that the sandbox cannot run."""
    name = spec.get("pipelineInfo", {}).get("name", "") if isinstance(spec.get("pipelineInfo"), dict) else ""
    if not PIPELINE_NAME.fullmatch(str(name)):
        raise _wrong(f'pipelineInfo.name "{name}" must have at most 128 of a-z, 0-9 and -, a letter or digit first')
    version = spec.get("schemaVersion")
    if version == "2.0.0":
        raise unimplemented("pipeline_spec.schema_version 2.0.0 of KFP 1.8; compile the template with KFP 2")
    if version != SCHEMA:
        raise _wrong(f"schemaVersion {version} is not {SCHEMA}")
    try:
        json_format.ParseDict(spec, _messages().PipelineSpec())
    except json_format.ParseError as error:
        raise _wrong(str(error)) from None
    components: JSON = spec.get("components", {})
    executors: JSON = spec.get("deploymentSpec", {}).get("executors", {})
    _check_dag(spec.get("root", {}), "root", components)
    for label, component in components.items():
        if "dag" in component:
            _check_dag(component, label, components)
        elif component.get("executorLabel") not in executors:
            raise _wrong(f"component {label} has no dag, and no executor in deploymentSpec")
    for label, executor in executors.items():
        _check_executor(label, executor)
    if "{{$.workspace_path}}" in json.dumps(spec):
        raise unimplemented("workspaces, which Vertex AI lacks, too")


def _check_dag(component: JSON, label: str, components: JSON) -> None:
    tasks: JSON = component.get("dag", {}).get("tasks", {})
    if not tasks:
        raise _wrong(f"{label} has no tasks")
    for name, task in tasks.items():
        wanted = task.get("componentRef", {}).get("name")
        if wanted not in components:
            raise _wrong(f"task {name} names the component {wanted}, which is not there")
        if missing := set(task.get("dependentTasks", [])) - tasks.keys():
            raise _wrong(f"task {name} depends on {', '.join(sorted(missing))}, which {label} lacks")


def _check_executor(label: str, executor: JSON) -> None:
    kind = next(iter(executor), "")
    if kind not in ("container", "importer"):
        raise unimplemented(f"executors of the kind {kind or 'none'}, as {label}")
    container: JSON = executor.get("container", {})
    if kind == "container" and not container.get("image"):
        raise _wrong(f"executor {label} has no image")
    if "preCachingCheck" in container.get("lifecycle", {}):
        raise unimplemented(f"lifecycle.preCachingCheck, as in the executor {label}")
    texts = [*container.get("command", []), *container.get("args", [])]
    if any("json_escape" in text for text in texts):
        raise unimplemented(f"the placeholder json_escape, as in the executor {label}")
    if executor.get("importer", {}).get("downloadToWorkspace"):
        raise unimplemented(f"importers with download_to_workspace, as {label}")


def check_arguments(spec: JSON, given: JSON) -> JSON:
    """The arguments of a run, those that are null left out. Raises INVALID_ARGUMENT for wrong, unknown and missing."""
    defined: JSON = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(given.keys() - defined.keys()):
        have = f"it has {', '.join(sorted(defined))}" if defined else "it has none"
        raise invalid(
            f"The pipeline parameter {', '.join(unknown)} is not found in the pipeline job input definitions: {have}."
        )
    required = {name for name, one in defined.items() if "defaultValue" not in one and not one.get("isOptional")}
    if missing := sorted(required - given.keys()):
        raise invalid(f"Required pipeline parameters are not set in runtime_config: {', '.join(missing)}.")
    for name, value in given.items():
        kind = defined[name].get("parameterType", "")
        allowed = TYPES.get(kind)
        if allowed is None:
            raise invalid(f"The pipeline parameter {name} of the type {kind} can not be set.")
        fits = isinstance(value, allowed) and (kind == "BOOLEAN" or not isinstance(value, bool))
        if fits and kind == "NUMBER_INTEGER":
            fits = math.isfinite(value) and float(value).is_integer()
        if not fits:
            raise invalid(f"The pipeline parameter {name} must be a {kind}; it is {value!r}.")
    artifacts: JSON = spec.get("root", {}).get("inputDefinitions", {}).get("artifacts", {})
    if needed := sorted(name for name, one in artifacts.items() if not one.get("isOptional")):
        raise unimplemented(f"runtime_config.input_artifacts, which the pipeline needs: {', '.join(needed)}")
    return given


def output_folder(resource: JSON) -> str:
    """The gs:// folder of a run's artifacts, without a slash at its end. Raises INVALID_ARGUMENT without one."""
    spec: JSON = resource["pipelineSpec"]
    folder: str = resource.get("runtimeConfig", {}).get("gcsOutputDirectory") or spec.get("defaultPipelineRoot", "")
    if not folder:
        raise invalid("Required field runtime_config.gcs_output_directory is not set.")
    if not FOLDER.fullmatch(folder):
        raise invalid(f'Invalid runtime_config.gcs_output_directory "{folder}": gs://BUCKET/FOLDER is expected.')
    return folder.rstrip("/")


def task_id(job: str, path: str) -> str:
    """The id of a task, which is the same when a run goes on after a restart. `path` is its taskUniqueName."""
    digest = hashlib.sha256(f"{job}/{path}".encode()).digest()
    return str(int.from_bytes(digest[:8]) >> 1)  # a positive int64


# Gigabytes in each unit that KFP knows for memory.
_UNITS = {"": 1e-9, "K": 1e-6, "M": 1e-3, "G": 1.0, "T": 1e3, "Ki": 2**10 / 1e9, "Mi": 2**20 / 1e9, "Gi": 2**30 / 1e9}
_SIZES = (2, 4, 8, 16, 32)  # CPUs of e2-standard machines


def machine(cpus: str, memory: str, accelerator: str, count: str) -> JSON:
    """The machine of a task: the least that has its limits, e2-standard-4 where there are none.

    https://docs.cloud.google.com/vertex-ai/docs/pipelines/machine-types
    cpus: such as 2, 0.5 or 500m; memory: such as 16G or 512Mi. Raises INVALID_ARGUMENT for limits that are none.
    """
    cpu = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", cpus or "0")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?i?)", memory or "0")
    if not cpu or not size or size[2] not in _UNITS:
        raise invalid(f'Invalid limits of a task: CPUs "{cpus}" (such as 2 or 500m), memory "{memory}" (such as 8G).')
    wanted = float(cpu[1]) / (1000 if cpu[2] else 1)
    needed = max(wanted, float(size[1]) * _UNITS[size[2]] / 4) or 4  # these machines have 4 GB for each CPU
    fitting = next((n for n in _SIZES if n >= needed), 96)
    if not accelerator:
        return {"machineType": f"e2-standard-{fitting}" if fitting in _SIZES else f"n1-standard-{fitting}"}
    kind = accelerator.upper().replace("-", "_")
    if kind not in ENUM_NUMBERS["acceleratorType"].values():
        raise invalid(f'Invalid accelerator "{accelerator}" of a task: one such as NVIDIA_TESLA_T4 is expected.')
    return {"machineType": f"n1-standard-{fitting}", "acceleratorType": kind, "acceleratorCount": int(count or 1)}
