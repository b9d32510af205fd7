"""Exported programs (torch.export) as data: a file brings a graph and tensors, and nothing in it is run as code.

`torch.export.load` unpickles, evaluates expressions and compiles text that it finds in the file, and its documentation
says never to load one from an untrusted source. `Program` reads the same file without any of that: the graph as JSON,
the weights as raw bytes, and of the operators only those of Core ATen
(https://docs.pytorch.org/docs/stable/torch.compiler_ir.html), which compute on tensors and cannot reach a file, a
process or the network.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCHEMA = 8  # torch/_export/serde/schema.py: a new major version changes the meaning of old fields
_GRAPH = "models/model.json"
_WEIGHTS, _CONSTANTS = "data/weights", "data/constants"
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_ASSERTION = "torch.ops.aten._assert_tensor_metadata.default"  # checks what the exporter assumed; computes nothing


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
                self._read(archive)
        except zipfile.BadZipFile:
            raise ProgramError(f"{file} is no exported program, or is cut off") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
            raise ProgramError(f"{file} cannot be read as an exported program: {error!r}") from None
        except ProgramError as error:
            raise ProgramError(f"{file}: {error}") from None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors of the program's inputs, in order, each [batch, …]; its outputs, likewise.

        Raises RuntimeError or TypeError, as torch's operators do, where they do not fit the program.
        """
        values: dict[str, Any] = dict(self._tensors)
        values |= zip(self._inputs, (one.to(self._device) for one in inputs), strict=True)
        with torch.inference_mode():
            for operator, arguments, outputs in self._nodes:
                given = {name: make(values) for name, make in arguments.items()}
                results = operator(**given)
                for name, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=False):
                    values[name] = result
        return tuple(values[name] for name in self._outputs)

    def _read(self, archive: zipfile.ZipFile) -> None:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise ProgramError("it is compressed, so that its size does not limit the memory it takes")
        root = "".join(name.removesuffix(_GRAPH) for name in archive.namelist() if name.endswith(_GRAPH))
        saved = json.loads(archive.read(root + _GRAPH))
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

    def _payload(self, archive: zipfile.ZipFile, folder: str, index: str) -> dict[str, Tensor]:
        """Tensors from raw bytes. A pickled one is refused, because unpickling runs code."""
        found = {}
        for name, entry in json.loads(archive.read(f"{folder}/{index}"))["config"].items():
            meta = entry["tensor_meta"]
            if entry["use_pickle"] or meta is None:
                raise ProgramError(f"its tensor {name!r} is pickled, and unpickling could run code")
            raw = bytearray(archive.read(f"{folder}/{entry['path_name']}"))
            dtype = _DTYPES[meta["dtype"]]
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            size, stride = ([int(one["as_int"]) for one in meta[key]] for key in ("sizes", "strides"))
            offset = int(meta["storage_offset"]["as_int"])
            found[name] = flat.as_strided(size, stride, offset).to(self._device)
        return found

    def _node(self, node: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Callable[..., Any]], list[str]]:
        """An operator, a function of the values so far for each of its arguments, and the names of its results."""
        outputs = []
        for output in node["outputs"]:
            ((kind, one),) = output.items()
            if kind == "as_tensors":
                raise ProgramError(f"its operator {node['target']} makes a list of tensors, which is not supported")
            outputs.append(str(one["name"] if kind == "as_tensor" else one["as_name"]))
        arguments = {str(one["name"]): self._argument(one["arg"]) for one in node["inputs"]}
        return core_operator(node["target"]), arguments, outputs

    def _argument(self, argument: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
        ((kind, value),) = argument.items()
        if kind == "as_tensor":
            return lambda values: values[value["name"]]
        if kind == "as_tensors":
            return lambda values: [values[one["name"]] for one in value]
        if kind == "as_optional_tensors":
            return lambda values: [values[one["as_tensor"]["name"]] if "as_tensor" in one else None for one in value]
        if kind == "as_sym_int":
            return lambda values: values[value["as_name"]] if "as_name" in value else int(value["as_int"])
        if kind == "as_sym_ints":
            return lambda values: [values[one["as_name"]] if "as_name" in one else int(one["as_int"]) for one in value]
        fixed = self._fixed(kind, value)
        return lambda _: fixed

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


def core_operator(target: str) -> Callable[..., Any]:
    """The operator of Core ATen named e.g. "torch.ops.aten.relu.default". Raises ProgramError for any other."""
    name = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    operator = getattr(getattr(torch.ops.aten, name[1], None), name[2], None) if name else None
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.core not in operator.tags:
        raise ProgramError(f"it calls {target!r}; only operators of Core ATen are supported (run_decompositions())")
    return operator
