"""TorchServe's own definitions of its gRPC services, out of the jar that it is installed with."""

from __future__ import annotations

import functools
import tempfile
import zipfile
from importlib.metadata import files
from importlib.resources import files as resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_tools import protoc


@functools.cache
def definitions(name: str) -> DescriptorPool:
    """What a .proto file of TorchServe's defines, e.g. inference.proto, compiled by protoc."""
    jar = next(file for file in files("torchserve") or [] if file.name == "model-server.jar")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(str(jar.locate()))) as archive:
            archive.extractall(folder, [entry for entry in archive.namelist() if entry.endswith(".proto")])
        out = Path(folder, "out")
        well_known = str(resources("grpc_tools") / "_proto")
        code = protoc.main(["protoc", f"-I{folder}/proto", f"-I{folder}", f"-I{well_known}", "--include_imports",
                            f"--descriptor_set_out={out}", name])  # fmt: skip
        assert code == 0
        pool = DescriptorPool()
        for file in FileDescriptorSet.FromString(out.read_bytes()).file:
            pool.Add(file)
    return pool
