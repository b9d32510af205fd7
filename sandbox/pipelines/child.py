"""The process of one pipeline job: KFP's own local runner carries out the DAG, and asks the sandbox for containers.

The runner has a global configuration and blocks, so each job has a process, forked from one that has imported kfp. It
ends when the sandbox does. Messages are JSON: "task" says how a task stands, "run" asks for a container, "cached" and
"cache" read and write outputs by fingerprint, "end" is the last.

The runner is made for this machine's files, and version 2.17 has gaps. `Pipeline.install` replaces the functions in
which it differs from Vertex AI; each replacement gives its reason.
"""

import contextlib
import json
import os
import re
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

import docker  # noqa: F401  DockerRunner imports it, and a forked process should not
from google.protobuf import json_format
from kfp.local import (
    cache,
    config,
    docker_task_handler,
    executor_input_utils,
    executor_output_utils,
    graph_utils,
    io,
    placeholder_utils,
    status,
    utils,
)
from kfp.local.orchestrator import enhanced_dag_orchestrator as dags
from kfp.local.orchestrator import orchestrator_utils, task_spec_utils
from kfp.pipeline_spec import pipeline_spec_pb2 as messages

from sandbox.pipelines.connection import Outputs, Sandbox
from sandbox.pipelines.templates import task_id
from sandbox.pipelines.values import JSON, STUBBED, Task, mounted, whole_numbers

FAILURE: tuple[JSON, status.Status] = ({}, status.Status.FAILURE)
ALWAYS = messages.PipelineTaskSpec.TriggerPolicy.TriggerStrategy.ALL_UPSTREAM_TASKS_COMPLETED
DOUBLE = messages.ParameterType.ParameterTypeEnum.NUMBER_DOUBLE
# Between the command and the arguments of a container, because the runner hands them over as one list.
ARGUMENTS = "\0arguments"


def run(connection: Connection, order: JSON) -> None:
    """Carries out a pipeline, and returns after the message "end". See `Pipelines._order` for the order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C goes to the sandbox, which ends this process
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # the runner prints
        os.dup2(nowhere, 2)
    sandbox = Sandbox(connection)
    try:
        error = Pipeline(sandbox, order).run()
    except Exception as problem:
        error = {"code": 9, "message": f"The pipeline can not be carried out: {problem}"}
    sandbox.tell("end", error=error)


def _add_dependencies(task: Any) -> None:
    """Makes a task wait for those whose outputs it takes: the compiler forgets those that set its limits."""
    wanted = [one.task_output_parameter.producer_task for one in task.inputs.parameters.values()]
    wanted += [one.task_output_artifact.producer_task for one in task.inputs.artifacts.values()]
    task.dependent_tasks.extend({name for name in wanted if name} - set(task.dependent_tasks))


class Pipeline:
    def __init__(self, sandbox: Sandbox, order: JSON) -> None:
        self.sandbox = sandbox
        self.order = order
        self.tasks: dict[tuple[str, ...], Task] = {}
        self.failed: list[tuple[str, ...]] = []
        self.here = threading.local()  # path: of the DAG that a thread begins; task: the one that it carries out
        self.originals: JSON = {}

    def run(self) -> JSON | None:
        """Returns the error of the pipeline, or None."""
        spec = messages.PipelineSpec()
        json_format.ParseDict(self.order["spec"], spec)
        executors = {
            label: utils.struct_to_executor_spec(one) for label, one in spec.deployment_spec["executors"].items()
        }
        for one in executors.values():
            if one.WhichOneof("spec") == "container":
                one.container.command.append(ARGUMENTS)
        for component in (spec.root, *spec.components.values()):
            for task in component.dag.tasks.values():
                _add_dependencies(task)
        runner = config.DockerRunner()
        # No workspace: Vertex AI has none.
        config.LocalExecutionConfig(runner, self.order["root"], "", raise_on_error=False, enable_caching=True)
        self.executors = executors
        self.install()
        self.here.path = ()
        _, result = dags.run_enhanced_dag(
            pipeline_resource_name=self.order["job"],
            dag_component_spec=spec.root,
            executors=executors,
            components=dict(spec.components.items()),
            dag_arguments=self.order["arguments"],
            pipeline_root=self.order["root"],
            runner=runner,
            unique_pipeline_id=self.order["uid"],
            fail_stack=[],
        )
        return self.dag_error(()) if result == status.Status.FAILURE else None

    def install(self) -> None:
        """Puts this object's methods in the place of the runner's functions."""
        utilities = orchestrator_utils.OrchestratorUtils
        pipeline, outputs = self, Outputs(self.sandbox, self.here)

        class Store(io.IOStore):  # type: ignore[misc]
            def __init__(self, parent: Any = None) -> None:
                super().__init__(parent)
                self.path: tuple[str, ...] = pipeline.here.path

            def put_task_output(self, task_name: str, key: str, value: Any) -> None:
                super().put_task_output(task_name, key, value)
                # Conditions and loops look outputs with a name other than Output up as inputs.
                self.put_parent_input(f"pipelinechannel--{task_name}-{key}", value)

        class Handler(docker_task_handler.DockerTaskHandler):  # type: ignore[misc]
            def run(self) -> status.Status:
                return pipeline.run_container(self.image, self.full_command, self.env_vars)

        io.IOStore = Store
        docker_task_handler.DockerTaskHandler = Handler
        cache.get_local_cache = lambda: outputs
        # The order of a protocol buffer's map differs from run to run, and with it that of tasks.
        graph_utils.build_dependency_map = lambda tasks: {name: tasks[name].dependent_tasks for name in sorted(tasks)}
        executor_input_utils.construct_local_task_root = lambda **_: self.task_root()
        for owner, name, ours in (
            (dags, "run_enhanced_dag", self.run_dag),
            (dags, "execute_task", self.execute_task),
            (dags, "_run_parallel_for_task", self.run_loop),
            (dags.ConditionEvaluator, "evaluate_condition", staticmethod(self.holds)),
            (utilities, "get_dag_outputs", staticmethod(self.dag_outputs)),
            (utilities, "make_task_arguments", staticmethod(self.make_arguments)),
            (utilities, "join_user_inputs_and_defaults", staticmethod(self.join_defaults)),
            (task_spec_utils, "build_nested_dag_arguments", self.nested_arguments),
            (executor_input_utils, "construct_executor_input", self.executor_input),
            (executor_input_utils, "executor_input_to_dict", self.input_dictionary),
            (executor_output_utils, "get_outputs_for_task", self.read_outputs),
            (placeholder_utils, "resolve_individual_placeholder", self.resolve),
        ):
            self.originals[name] = getattr(owner, name)
            setattr(owner, name, ours)

    # --------------------------------------------------------------------------------------------- tasks and DAGs

    def say(self, task: Task, state: str, outputs: JSON | None = None) -> None:
        # A container's parameters have their placeholders replaced, and those that only served for that are left out.
        values = task.inputs.get("inputs", {}).get("parameterValues", {})
        shown = {key: one for key, one in task.arguments.items() if not values or key not in values}
        shown |= {key: one for key, one in values.items() if not key.startswith("pipelinechannel--")}
        self.sandbox.tell(
            "task",
            unique=task.unique,
            name=task.path[-1],
            parent=".".join(task.path[:-1]),
            id=task.id,
            type=task.kind,
            state=state,
            inputs=whole_numbers(Outputs._serialize_outputs(shown)),
            outputs=Outputs._serialize_outputs(outputs or {}),
            error=task.error,
        )

    def begin(self, path: tuple[str, ...], spec: Any, component: Any) -> Task:
        kind, executor = "dag", None
        if component.WhichOneof("implementation") != "dag":
            executor = self.executors[component.executor_label]
            kind = executor.WhichOneof("spec")
        task = Task(path, kind, task_id(self.order["name"], ".".join(path)), spec, executor)
        self.tasks[path] = task
        return task

    def dag_error(self, path: tuple[str, ...]) -> JSON:
        names = [failed[-1] for failed in self.failed if failed[:-1] == path]
        said = f"The DAG failed because some tasks failed. The failed tasks are: [{', '.join(names)}]."
        return {"code": 9, "message": said}

    def execute_task(self, **given: Any) -> tuple[JSON, status.Status]:
        """Says how a task stands. The runner has no such callback, and lets exceptions end everything."""
        name, spec, parent = given["task_name"], given["task_spec"], given["io_store"].path
        loop = re.fullmatch(r"(.+)-iteration-\d+", name)
        if loop and (*parent, loop[1]) in self.tasks:
            parent = (*parent, loop[1])
        task = self.begin((*parent, name), spec, given["components"][spec.component_ref.name])
        if self.failed and self.order["failFast"] and spec.trigger_policy.strategy != ALWAYS:
            self.say(task, "NOT_TRIGGERED")
            return FAILURE
        self.here.task, self.here.path = task, task.path
        self.say(task, "RUNNING")
        outputs, result = FAILURE
        try:
            outputs, result = self.originals["execute_task"](**given)
        except Exception as error:
            task.error = {"code": 9, "message": str(error)}
        self.finish(task, result, outputs)
        return outputs, result

    def finish(self, task: Task, result: status.Status, outputs: JSON) -> None:
        if result == status.Status.SUCCESS:
            cached = task.kind == "container" and not task.attempts
            self.say(task, "SKIPPED" if cached else "SUCCEEDED", outputs)
            return
        self.failed.append(task.path)
        if not task.error:
            task.error = (
                self.dag_error(task.path) if task.kind == "dag" else {"code": 13, "message": "The task failed."}
            )
        self.say(task, "FAILED")

    def run_loop(self, **given: Any) -> bool:
        """Says how a loop stands.

        The runner guesses what the items are from the name of the input, has no outputs for a loop without items, and
        None for each item whose task was not triggered.
        """
        name, io_store, spec = given["task_name"], given["io_store"], messages.PipelineTaskSpec()
        spec.CopyFrom(given["task_spec"])
        component = given["components"][spec.component_ref.name]
        task = self.here.task = self.begin((*io_store.path, name), spec, component)
        failed = True
        try:
            given_items = self.make_arguments(spec.inputs, io_store).get(spec.parameter_iterator.items.input_parameter)
            self.say(task, "RUNNING")
            if given_items is not None:
                text = given_items if isinstance(given_items, str) else json.dumps(given_items)
                spec.parameter_iterator.items.raw = text
            outputs = (*component.output_definitions.parameters, *component.output_definitions.artifacts)
            for key in outputs:
                io_store.put_task_output(name, key, [])
            failed = self.originals["_run_parallel_for_task"](**{**given, "task_spec": spec})
            for key in outputs:
                found = [one for one in io_store.get_task_output(name, key) if one is not None]
                if key in component.output_definitions.artifacts:  # a loop in a loop makes one list
                    found = [one for part in found for one in (part if isinstance(part, list) else [part])]
                io_store.put_task_output(name, key, found)
        except Exception as error:
            task.error = {"code": 9, "message": str(error)}
        self.finish(task, status.Status.FAILURE if failed else status.Status.SUCCESS, {})
        return failed

    def run_dag(self, **given: Any) -> tuple[JSON, status.Status]:
        """Names the tasks that were not triggered, after the others have ended."""
        path, dag = self.here.path, given["dag_component_spec"].dag
        try:
            result: tuple[JSON, status.Status] = self.originals["run_enhanced_dag"](**given)
        finally:
            for name, spec in dag.tasks.items():
                if (*path, name) not in self.tasks:
                    task = self.begin((*path, name), spec, given["components"][spec.component_ref.name])
                    self.say(task, "NOT_TRIGGERED")
        return result

    def dag_outputs(self, dag_outputs_spec: Any, io_store: Any) -> JSON:
        """Leaves outputs of tasks out that were not triggered, where the runner fails. dsl.OneOf is made so."""
        there = messages.DagOutputsSpec()
        there.CopyFrom(dag_outputs_spec)
        for name, output in dag_outputs_spec.parameters.items():
            producer = (*io_store.path, output.value_from_parameter.producer_subtask)
            if output.HasField("value_from_parameter") and producer not in self.tasks:
                del there.parameters[name]
        for name, output in dag_outputs_spec.artifacts.items():
            made = [one for one in output.artifact_selectors if (*io_store.path, one.producer_subtask) in self.tasks]
            del there.artifacts[name].artifact_selectors[:]
            there.artifacts[name].artifact_selectors.extend(made)
            if not made:
                del there.artifacts[name]
        found: JSON = self.originals["get_dag_outputs"](there, io_store)
        return found

    # ----------------------------------------------------------------------------------- conditions and arguments

    def holds(self, condition: str, io_store: Any) -> bool:
        """Evaluates a condition. The runner puts values into its text, where a quote ends them, and hides errors."""

        def value(match: re.Match[str]) -> str:
            return repr(dags.ConditionEvaluator._resolve_pipeline_channel(match[1], io_store))

        text = re.sub(r"inputs\.parameter_values\['([^']+)'\]", value, condition.replace("&&", " and "))
        text = re.sub(r"!\s*\(", "not (", text.replace("||", " or "))
        names = {"true": True, "false": False, "null": None, "int": int, "double": float, "string": str}
        try:
            return bool(eval(text, {"__builtins__": {}}, names))
        except Exception as error:
            raise ValueError(f"The condition {condition} can not be evaluated: {error}") from None

    def make_arguments(self, task_inputs_spec: Any, io_store: Any) -> JSON:
        """Leaves inputs without a value out, which the runner cannot encode, and corrects the status of exit tasks.

        The compiler gives a condition or a loop the item of the loop inside it, which is not there yet.
        """
        there = messages.TaskInputsSpec()
        there.CopyFrom(task_inputs_spec)
        for name, spec in task_inputs_spec.parameters.items():
            if "loop-item" in spec.component_input_parameter:
                try:
                    io_store.get_parent_input(spec.component_input_parameter)
                except ValueError:
                    del there.parameters[name]
        given: JSON = self.originals["make_task_arguments"](there, io_store)
        for name, spec in task_inputs_spec.parameters.items():
            if spec.HasField("task_final_status"):
                given[name] = self.final_status((*io_store.path, spec.task_final_status.producer_task))
        given = {name: value for name, value in given.items() if value is not None}
        self.here.task.arguments = given
        return given

    def final_status(self, path: tuple[str, ...]) -> JSON:
        """PipelineTaskFinalStatus with the names that dsl.PipelineTaskFinalStatus is read from."""
        failed = next((task for task in (self.tasks.get(path),) if task and task.error), None)
        return {
            "state": "FAILED" if failed else "SUCCEEDED",
            "pipelineJobResourceName": self.order["name"],
            "pipelineTaskName": path[-1],
            "error": failed.error if failed else {},
        }

    def join_defaults(self, dag_arguments: JSON, dag_inputs_spec: Any) -> JSON:
        """Adds None for optional inputs without a default, of which the runner takes none."""
        absent: JSON = {
            name: None for name, one in dag_inputs_spec.parameters.items() if not one.HasField("default_value")
        } | {name: None for name, one in dag_inputs_spec.artifacts.items() if one.is_optional}
        joined: JSON = self.originals["join_user_inputs_and_defaults"]({**absent, **dag_arguments}, dag_inputs_spec)
        return joined

    def nested_arguments(self, **given: Any) -> JSON:
        """Adds the artifacts of a nested DAG that takes no parameters: the runner looks for them by other names."""
        found: JSON = self.originals["build_nested_dag_arguments"](**given)
        inputs = given["task_spec"].inputs
        return {**found, **self.make_arguments(inputs, given["io_store"])} if inputs.artifacts else found

    # --------------------------------------------------------------------------------------------- one container

    def task_root(self) -> str:
        """The folder of a task's outputs, as on Vertex AI; the runner's is shared by the tasks of one component."""
        task: Task = self.here.task
        return f"{self.order['root']}/{task.path[-1]}_{task.id}"

    def executor_input(self, **given: Any) -> Any:
        """Sets the paths under /gcs of files that containers write, beside the gs:// URIs of artifacts."""
        made = self.originals["construct_executor_input"](**given)
        task, defined = self.here.task, given["component_spec"].output_definitions
        task.expected = {}
        for name in [name for name, value in made.inputs.parameter_values.items() if not value.WhichOneof("kind")]:
            del made.inputs.parameter_values[name]
        made.outputs.output_file = mounted(made.outputs.output_file)
        for name, parameter in made.outputs.parameters.items():
            parameter.output_file = mounted(parameter.output_file)
            kind = messages.ParameterType.ParameterTypeEnum.Name(defined.parameters[name].parameter_type)
            task.expected[parameter.output_file] = STUBBED.get(kind, "stub")
        for artifacts in made.outputs.artifacts.values():
            task.expected[mounted(artifacts.artifacts[0].uri)] = "stub"
        return made

    def input_dictionary(self, **given: Any) -> JSON:
        """Writes whole numbers without a point, but for those of the type float: protocol buffers know doubles only."""
        made: JSON = self.originals["executor_input_to_dict"](**given)
        defined = given["component_spec"].input_definitions.parameters
        values = made.get("inputs", {}).get("parameterValues", {})
        for name, value in values.items():
            if name not in defined or defined[name].parameter_type != DOUBLE:
                values[name] = whole_numbers(value)
        return made

    def resolve(self, element: str, executor_input_dict: JSON, **given: Any) -> Any:
        """Replaces the placeholders that the runner lacks, and the paths of artifacts, for which it has their URIs."""
        task: Task = self.here.task
        task.inputs = executor_input_dict
        for name, value in (
            ("pipeline_job_resource_name", self.order["name"]),
            ("pipeline_job_create_time_utc", self.order["created"]),
            ("pipeline_job_schedule_time_utc", self.order["scheduled"]),
        ):
            element = element.replace("{{$." + name + "}}", value)

        def artifact(match: re.Match[str]) -> str:
            found = executor_input_dict.get(match[1], {}).get("artifacts", {}).get(match[2], {}).get("artifacts", [])
            return json.dumps(found) if not match[3] else mounted(found[0]["uri"]) if found else ""

        element = re.sub(r"\{\{\$\.(inputs|outputs)\.artifacts\['([^']+)'\](\.path)?\}\}", artifact, element)
        mine = {"task_resource_name": task.path[-1], "pipeline_task_id": task.id}
        return self.originals["resolve_individual_placeholder"](element, executor_input_dict, **{**given, **mine})

    def run_container(self, image: str, command: list[str], env: dict[str, str]) -> status.Status:
        """One attempt of a task, as a custom job."""
        task: Task = self.here.task
        divide = command.index(ARGUMENTS)
        limits = task.executor.container.resources
        accelerator = limits.accelerator

        def text(value: str, number: float) -> str:
            return str(self.resolve_text(value)) if value else f"{number:g}" if number else ""

        answer = self.sandbox.ask(
            "run",
            task=task.unique,
            attempt=task.attempts,
            image=self.resolve_text(image),
            command=command[:divide],
            args=command[divide + 1 :],
            env=env,
            cpus=text(limits.resource_cpu_limit, limits.cpu_limit),
            memory=text(limits.resource_memory_limit, 0)
            or (f"{limits.memory_limit:g}G" if limits.memory_limit else ""),
            accelerator=text(accelerator.resource_type, 0) or accelerator.type,
            accelerators=text(accelerator.resource_count, accelerator.count),
            outputs=task.expected,
        )
        task.attempts += 1
        task.error = answer.get("error")
        return status.Status.FAILURE if task.error else status.Status.SUCCESS

    def resolve_text(self, text: str) -> str:
        """Replaces the inputs in a text of the executor that the runner leaves as it is."""
        return str(placeholder_utils.resolve_io_placeholders(self.here.task.inputs, text))

    def read_outputs(self, executor_input: Any, component_spec: Any) -> JSON:
        """Reads what a container wrote. A container component names no artifacts, so they are the declared ones."""
        here = messages.ExecutorInput()
        here.CopyFrom(executor_input)
        folder = self.order["buckets"]
        for owner in (here.outputs, *here.outputs.parameters.values()):
            owner.output_file = folder + owner.output_file.removeprefix("/gcs")
        found: JSON = self.originals["get_outputs_for_task"](here, component_spec)
        defined = component_spec.output_definitions
        for name, artifacts in executor_input.outputs.artifacts.items():
            found.setdefault(
                name,
                executor_output_utils.artifact_list_to_dsl_artifact(
                    artifacts, is_artifact_list=defined.artifacts[name].is_artifact_list
                ),
            )
        if missing := sorted(set(defined.parameters) - set(found)):
            paths = ", ".join(executor_input.outputs.parameters[name].output_file for name in missing)
            raise ValueError(f"The container ended well and did not write its outputs {', '.join(missing)} to {paths}.")
        return found
