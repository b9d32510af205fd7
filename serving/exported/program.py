"""Exported programs (torch.export) as data: a file brings a graph and tensors, and nothing in it is run as code.

`torch.export.load` unpickles, evaluates expressions and compiles text that it finds in the file, and its documentation
says never to load one from an untrusted source. `Program` reads the same file without any of that: the graph as JSON,
the weights as raw bytes, and of the operators only those of Core ATen
(https://docs.pytorch.org/docs/stable/torch.compiler_ir.html), which compute on tensors and cannot reach a file, a
process or the network. A program can still compute for long and ask for much memory, as any model can.
"""

from __future__ import annotations

import io
import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCHEMA = 8  # torch/_export/serde/schema.py: a new major version changes the meaning of old fields
MAX_GRAPH_BYTES = 64 << 20  # parsed JSON takes many times its size; that of a network with 1,000 layers has 5 MB
_GRAPH = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights", "data/constants"
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_ASSERTION = "torch.ops.aten._assert_tensor_metadata.default"  # checks what the exporter assumed; computes nothing
# Arithmetic of sizes that depend on the batch, as the exporter names it.
_OF_SIZES = {f"_operator.{one.__name__}": one for one in (operator.add, operator.sub, operator.mul, operator.floordiv)}
_DAMAGED = (  # the errors that a damaged file leads to while it is read
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class ProgramError(Exception):
    """A file is no program that can be read as data; the message says why."""


def save(model: nn.Module, examples: Sequence[Tensor], file: Path) -> None:
    """Exports a model whose inputs and outputs all have the batch as their first dimension.

    model: takes the tensors of `examples` by position and returns a tuple of tensors. examples: of at least two
    records. The same weights make the same file.
    """
    batch = torch.export.Dim("batch", min=1)
    inner = _Positional(model).cpu().eval()
    with torch.no_grad():
        program = torch.export.export(inner, tuple(examples), dynamic_shapes=(tuple({0: batch} for _ in examples),))
        program = program.run_decompositions()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:  # they name files of this machine and addresses in its memory
                for key in ("stack_trace", "nn_module_stack", "torch_fn", "from_node", "source_fn_stack"):
                    node.meta.pop(key, None)
    program.example_inputs = None  # they would be pickled
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getvalue())


class _Positional(nn.Module):
    """A model whose signature says nothing of its inputs: the exporter takes one description for all of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(*inputs)
        return outputs


class Program:
    """A program read from a file. Threads may share it."""

    def __init__(self, file: Path, device: torch.device | None = None) -> None:
        """Raises ProgramError, and OSError if the file cannot be read."""
        self._device = device or torch.device("cpu")
        try:
            with zipfile.ZipFile(file) as archive:
                # Neither compressed nor overlapping members take more memory than the file has bytes.
                if sum(one.file_size for one in archive.infolist()) > file.stat().st_size:
                    raise ProgramError("its parts are larger than the file; torch.export.save does not compress them")
                self._read(archive)
        except zipfile.BadZipFile as error:
            raise ProgramError(f"{file} is no exported program, or is damaged: {error}") from None
        except ProgramError as error:
            raise ProgramError(f"{file}: {error}") from None
        except _DAMAGED as error:
            raise ProgramError(f"{file} cannot be read as an exported program: {error!r}") from None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors of the program's inputs, in order, each [batch, …]; its outputs, likewise.

        Raises RuntimeError, TypeError, ValueError or LookupError where they do not fit the program.
        """
        values: dict[str, Any] = dict(self._tensors)
        values |= zip(self._inputs, (one.to(self._device) for one in inputs), strict=True)
        with torch.inference_mode():
            for node in self._nodes:
                results = node.function(**{name: make(values) for name, make in node.arguments.items()})
                if not isinstance(results, tuple | list):
                    results = (results,)
                values.update(zip(node.outputs, results, strict=False))
                for name in node.last_used:
                    del values[name]
        return tuple(values[name] for name in self._outputs)

    def _read(self, archive: zipfile.ZipFile) -> None:
        graphs = [name for name in archive.namelist() if name.endswith(_GRAPH)]
        if len(graphs) != 1:
            raise ProgramError(f"it has {len(graphs)} graphs; one model is supported")
        if archive.getinfo(graphs[0]).file_size > MAX_GRAPH_BYTES:
            raise ProgramError(f"its graph is larger than {MAX_GRAPH_BYTES >> 20} MiB")
        saved, root = json.loads(archive.read(graphs[0])), graphs[0].removesuffix(_GRAPH)
        if saved["schema_version"]["major"] != SCHEMA:
            raise ProgramError(
                f"its format is {saved['schema_version']['major']}, of torch {saved['torch_version']}, and this reads "
                f"{SCHEMA}; export it with torch {torch.__version__}"
            )
        graph, signature = saved["graph_module"]["graph"], saved["graph_module"]["signature"]
        weights = self._payload(archive, root + _WEIGHTS, "model_weights_config.json")
        constants = self._payload(archive, root + _CONSTANTS, "model_constants_config.json")
        self._tensors: dict[str, Tensor] = {}
        self._inputs: list[str] = []
        for spec in signature["input_specs"]:
            ((kind, one),) = spec.items()
            if kind == "user_input":
                self._inputs.append(str(one["arg"]["as_tensor"]["name"]))
            elif kind == "parameter":
                self._tensors[one["arg"]["name"]] = weights[one["parameter_name"]]
            elif kind == "buffer":
                self._tensors[one["arg"]["name"]] = (weights if one["persistent"] else constants)[one["buffer_name"]]
            elif kind == "tensor_constant":
                self._tensors[one["arg"]["name"]] = constants[one["tensor_constant_name"]]
            else:
                raise ProgramError(f"it takes {kind!r}; only tensors are supported")
        self._outputs = [str(one["user_output"]["arg"]["as_tensor"]["name"]) for one in signature["output_specs"]]
        self._nodes = [self._node(node) for node in graph["nodes"] if node["target"] != _ASSERTION]
        self._free_early()

    def _free_early(self) -> None:
        """Has each node drop the values that no later node reads: a deep network's take gigabytes together."""
        needed = set(self._outputs)
        for node in reversed(self._nodes):
            names = {name for name in (*node.inputs, *node.outputs) if name not in needed}
            node.last_used.extend(sorted(names))
            needed |= names

    def _payload(self, archive: zipfile.ZipFile, folder: str, index: str) -> dict[str, Tensor]:
        """Tensors from raw bytes. A pickled one is refused, because unpickling runs code."""
        found, storages = {}, dict[str, bytearray]()
        for name, entry in json.loads(archive.read(f"{folder}/{index}"))["config"].items():
            meta, path = entry["tensor_meta"], str(entry["path_name"])
            if entry["use_pickle"] or meta is None:
                raise ProgramError(f"its tensor {name!r} is pickled, and unpickling could run code")
            if path not in storages:  # tensors may share one
                storages[path] = bytearray(archive.read(f"{folder}/{path}"))
            raw, dtype = storages[path], _DTYPES[meta["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            size, stride = ([int(one["as_int"]) for one in meta[key]] for key in ("sizes", "strides"))
            offset = int(meta["storage_offset"]["as_int"])
            found[name] = flat.as_strided(size, stride, offset).to(self._device)
        return found

    def _node(self, node: Mapping[str, Any]) -> _Node:
        made = _Node(_function(node["target"]))
        for output in node["outputs"]:
            ((kind, one),) = output.items()
            if kind == "as_tensors":
                made.outputs.extend(str(each["name"]) for each in one)
            else:
                made.outputs.append(str(one["name"] if kind == "as_tensor" else one["as_name"]))
        for one in node["inputs"]:
            made.arguments[str(one["name"])] = self._argument(one["arg"], made.inputs)
        return made

    def _argument(self, argument: Mapping[str, Any], inputs: list[str]) -> Callable[[Mapping[str, Any]], Any]:
        """A function of the values so far. The names of those that it reads are added to `inputs`."""

        def named(name: str) -> Callable[[Mapping[str, Any]], Any]:
            inputs.append(name)
            return lambda values: values[name]

        def size(one: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
            return named(one["as_name"]) if "as_name" in one else _always(int(one["as_int"]))

        def each(parts: Sequence[Callable[[Mapping[str, Any]], Any]]) -> Callable[[Mapping[str, Any]], Any]:
            return lambda values: [part(values) for part in parts]

        ((kind, value),) = argument.items()
        if kind == "as_tensor":
            return named(value["name"])
        if kind == "as_tensors":
            return each([named(one["name"]) for one in value])
        if kind == "as_optional_tensors":
            return each([named(one["as_tensor"]["name"]) if "as_tensor" in one else _always(None) for one in value])
        if kind == "as_sym_int":
            return size(value)
        if kind == "as_sym_ints":
            return each([size(one) for one in value])
        return _always(self._fixed(kind, value))

    def _fixed(self, kind: str, value: Any) -> Any:
        """An argument that is the same in every call."""
        if kind == "as_none":
            return None
        if kind in ("as_bool", "as_int", "as_string"):
            return value
        if kind in ("as_bools", "as_ints"):
            return list(value)
        if kind == "as_float":
            return float(value)  # JSON has no infinity: it comes as text
        if kind == "as_floats":
            return [float(one) for one in value]
        if kind == "as_scalar_type":
            return _DTYPES[value]
        if kind == "as_memory_format":
            return _MEMORY_FORMATS[value]
        if kind == "as_layout":
            return torch.strided
        if kind == "as_device":
            return self._device  # where it runs now, not where it was exported
        raise ProgramError(f"an argument is {kind!r}, which is not supported")


@dataclass
class _Node:
    """A step of a program: a function, and for each of its parameters a function of the values so far.

    inputs, outputs: the names of the values that it reads and makes. last_used: those that nothing reads after it.
    """

    function: Callable[..., Any]
    arguments: dict[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    last_used: list[str] = field(default_factory=list)


def _always(value: Any) -> Callable[[Mapping[str, Any]], Any]:
    return lambda _: value


def _function(target: str) -> Callable[..., Any]:
    return _of_sizes(_OF_SIZES[target]) if target in _OF_SIZES else core_operator(target)


def _of_sizes(compute: Callable[[int, int], int]) -> Callable[[int, int], int]:
    def bounded(a: int, b: int) -> int:
        result = compute(int(a), int(b))
        if abs(result) >= 1 << 63:  # repeated multiplication would go on for ever
            raise ValueError(f"a size is {result}")
        return result

    return bounded


def core_operator(target: str) -> Callable[..., Any]:
    """The operator of Core ATen named e.g. "torch.ops.aten.relu.default". Raises ProgramError for any other.

    Some of Core ATen are refused as well: those that change their arguments, which are the weights of other requests;
    those that return memory as it is, which may hold other requests' data; and those of training.
    """
    name = re.fullmatch(r"torch\.ops\.aten\.([a-z_][a-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)", target, re.ASCII)
    found = getattr(getattr(torch.ops.aten, name[1], None), name[2], None) if name else None
    if name is None or not isinstance(found, torch._ops.OpOverload) or torch.Tag.core not in found.tags:
        raise ProgramError(f"it calls {target!r}; only operators of Core ATen are supported (run_decompositions())")
    if found._schema.is_mutable or name[1].startswith("empty") or name[1].endswith("_backward"):
        raise ProgramError(f"it calls {target!r}, which a model that is served does not need")
    return found
