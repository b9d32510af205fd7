"""Runs a compiled pipeline on this machine with KFP's local runner.

KFP orders the tasks, hands values and artifacts on, and has conditions, loops, exit handlers, retries and the cache.
Four of its functions are replaced while a pipeline runs, because KFP has no setting for them:

- the execution of one task: KFP's subprocess runner refuses container components; its Docker runner runs a command
  below the image's entry point, which Vertex AI replaces, and takes a container that vanished for a success; neither
  looks for missing outputs, nor knows the artifacts of a container component;
- the cache, for the keys that training/pipelines/cache.py explains;
- the function around both, to report a line for each task;
- the values in conditions, because KFP's runner finds a task's output only if its name is `Output`, and takes a
  condition on another one for false.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from unittest.mock import patch

from kfp import dsl, local
from kfp.dsl.component_factory import EXECUTOR_MODULE
from kfp.local import cache as kfp_cache
from kfp.local import executor_input_utils, executor_output_utils, placeholder_utils, task_dispatcher
from kfp.local.orchestrator import task_executor
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator
from kfp.local.pipeline_orchestrator import run_local_pipeline
from kfp.local.status import Status

from training.pipelines import template
from training.pipelines.cache import ContentCache
from training.pipelines.execution import Command, Execution
from training.pipelines.report import Report, Step

SUMMARIES = ("summary", "Output")  # outputs with a sentence about the step; KFP calls what a function returns Output

_step: ContextVar[Step] = ContextVar("step")


def run(
    spec: Any, arguments: dict[str, Any], root: Path, execution: Execution, report: Report, *, fresh: bool = False
) -> bool:
    """Runs a pipeline, and returns whether all of its tasks succeeded.

    spec: PipelineSpec. root: absolute path of the folder for outputs, logs and the cache. fresh: nothing is taken from
    the cache. Raises UsageError, and KeyboardInterrupt after its processes have ended.
    """
    root.mkdir(parents=True, exist_ok=True)
    execution.prepare(template.images(spec))
    started = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")

    def unchanged(run: str) -> None:
        _step.get().taken_from = run

    cache = ContentCache(root / ".cache", started, execution.identity, unchanged, fresh)
    with _kfp(root, cache, execution, report), _stopped_by_signals(execution):
        run_local_pipeline(spec, arguments)
    report.end(list(template.tasks(spec)))
    return not report.failed


@contextlib.contextmanager
def _kfp(root: Path, cache: ContentCache, execution: Execution, report: Report) -> Iterator[None]:
    """Sets KFP's local runner up. Its own output goes to kfp.log."""
    execute = task_executor.execute_single_task

    def reported(**task: Any) -> tuple[dict[str, Any], Status]:
        step = Step(task["task_name"], root / task["pipeline_resource_name"] / f"{task['task_name']}.log")
        token = _step.set(step)
        report.start(step)
        try:
            outputs, status = execute(**task)
        except Exception as error:  # KFP has no type for "this task cannot be started here"
            logging.exception("task %s", step.name)
            outputs, status, step.why = {}, Status.FAILURE, f"KFP cannot run it here: {error}"
        finally:
            _step.reset(token)
        if status == Status.SUCCESS:
            texts = (outputs[name] for name in SUMMARIES if isinstance(outputs.get(name), str))
            report.success(step, next(texts, ""))
        else:
            report.failure(step)
        return outputs, status

    def carried_out(**task: Any) -> tuple[dict[str, Any], Status]:
        step = _step.get()
        outputs, step.why = _carry_out(step, execution, **task)
        return outputs, Status.FAILURE if step.why else Status.SUCCESS

    before = local.config.LocalExecutionConfig.instance
    with (
        (root / "kfp.log").open("w", encoding="utf-8") as log,
        _logged(log),
        contextlib.redirect_stdout(log),
        patch.object(task_executor, "execute_single_task", reported),
        patch.object(task_dispatcher, "run_single_task_implementation", carried_out),
        patch.object(kfp_cache, "get_local_cache", lambda: cache),
        patch.object(ConditionEvaluator, "_resolve_pipeline_channel", staticmethod(_value_of)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # settings of a task that have no effect here, such as its CPUs
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=str(root),
            workspace_root=str(root / ".workspace"),
            raise_on_error=False,
            enable_caching=True,
        )
        try:
            yield
        finally:
            local.config.LocalExecutionConfig.instance = before


@contextlib.contextmanager
def _logged(log: TextIO) -> Iterator[None]:
    """Sends the records of the root logger, which KFP uses, to a file only."""
    logger = logging.getLogger()
    handlers, logger.handlers = logger.handlers, [logging.StreamHandler(log)]
    try:
        yield
    finally:
        logger.handlers = handlers


@contextlib.contextmanager
def _stopped_by_signals(execution: Execution) -> Iterator[None]:
    """Ends the steps at Ctrl-C and SIGTERM, those of KFP's threads included, and raises KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        execution.stop()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _carry_out(
    step: Step,
    execution: Execution,
    *,
    pipeline_resource_name: str,
    component_spec: Any,
    executor_spec: Any,
    arguments: dict[str, Any],
    pipeline_root: str,
    unique_pipeline_id: str,
    **_: Any,
) -> tuple[dict[str, Any], str]:
    """Executes one task. Returns its outputs by name, and why it failed, or ""."""
    folder = step.log.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt before
    folder.mkdir(parents=True)
    arguments = {name: _named(value, pipeline_resource_name) for name, value in arguments.items()}
    executor_input = executor_input_utils.construct_executor_input(
        component_spec, arguments, str(folder), block_input_artifact=False
    )
    as_json = executor_input_utils.executor_input_to_dict(executor_input, component_spec)

    def resolved(words: Any) -> list[str]:
        found: list[str] = placeholder_utils.replace_placeholders(
            [_named(word, pipeline_resource_name) for word in words],
            as_json,
            pipeline_resource_name,
            step.name,
            pipeline_root,
            unique_pipeline_id,
        )
        return found

    container = executor_spec.container
    environment = {one.name: one.value for one in container.env}
    command = Command(container.image, resolved(container.command), resolved(container.args), environment, folder)
    with step.log.open("ab") as log:
        if why := execution.run(command, log):
            return {}, why
    is_function = any(EXECUTOR_MODULE in word for word in command.command)
    if is_function and not Path(executor_input.outputs.output_file).exists():
        return {}, "it ended without a result"
    try:
        outputs = executor_output_utils.get_outputs_for_task(executor_input, component_spec)
    except ValueError as error:  # protobuf's ParseError is one
        return {}, f"its result cannot be read: {error}"
    # A container component writes artifacts, and no list of them.
    for name, artifacts in executor_input.outputs.artifacts.items():
        outputs.setdefault(name, executor_output_utils.runtime_artifact_to_dsl_artifact(artifacts.artifacts[0]))
    declared = [*component_spec.output_definitions.parameters, *executor_input.outputs.artifacts]
    missing = [name for name in declared if not _is_there(outputs.get(name), folder)]
    return outputs, f"it ended without its output {' and '.join(missing)}" if missing else ""


_kfp_value_of = ConditionEvaluator._resolve_pipeline_channel


def _value_of(channel: str, values: Any) -> Any:
    """Returns the value of a condition's reference `pipelinechannel--TASK-OUTPUT`, or of a parameter."""
    name, scope = channel.replace("pipelinechannel--", ""), values
    while scope is not None:
        for task, outputs in scope._task_output_data.items():
            for output, value in outputs.items():
                if name == f"{task}-{output}":
                    return value
        scope = scope._parent
    return _kfp_value_of(channel, values)


def _named(value: Any, run: str) -> Any:
    """Returns a value with the name of the run in place of the job's, which KFP's local runner does not know."""
    return value.replace(dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER, run) if isinstance(value, str) else value


def _is_there(output: Any, folder: Path) -> bool:
    """Returns whether a declared output exists. An artifact that is figures alone gets a file with them."""
    if not isinstance(output, dsl.Artifact):
        return output is not None
    path = Path(output.path)
    if not path.is_relative_to(folder):  # elsewhere, as the step has said
        return True
    if not path.exists() and output.metadata:
        path.write_text(json.dumps(output.metadata, indent=1) + "\n", encoding="utf-8")
    return path.exists()
