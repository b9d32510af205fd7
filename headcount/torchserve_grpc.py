"""TorchServe's gRPC inference service, as far as counting needs it.

The names and field numbers are the wire contract of `org.pytorch.serve.grpc.inference`
(https://github.com/pytorch/serve, frontend/server/src/main/resources/proto/inference.proto, v0.12.0).
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "org.pytorch.serve.grpc.inference"
METHOD = f"/{PACKAGE}.InferenceAPIsService/Predictions"
_Field = FieldDescriptorProto


def _field(name: str, number: int, kind: Any) -> FieldDescriptorProto:
    return _Field(name=name, number=number, type=kind, label=_Field.LABEL_OPTIONAL)


def _messages() -> tuple[Any, Any]:
    # proto3 writes map<string, bytes> as repeated entries of a nested message.
    entry = DescriptorProto(
        name="InputEntry",
        field=[_field("key", 1, _Field.TYPE_STRING), _field("value", 2, _Field.TYPE_BYTES)],
    )
    entry.options.map_entry = True
    inputs = _Field(
        name="input", number=3, type=_Field.TYPE_MESSAGE, label=_Field.LABEL_REPEATED,
        type_name=f".{PACKAGE}.PredictionsRequest.InputEntry",
    )  # fmt: skip
    request = DescriptorProto(
        name="PredictionsRequest",
        field=[_field("model_name", 1, _Field.TYPE_STRING), inputs],
        nested_type=[entry],
    )
    response = DescriptorProto(name="PredictionResponse", field=[_field("prediction", 1, _Field.TYPE_BYTES)])
    file = FileDescriptorProto(name="inference.proto", package=PACKAGE, syntax="proto3")
    file.message_type.extend([request, response])
    # A pool of our own: TorchServe's generated code in the same process would claim the same names.
    pool = DescriptorPool()
    pool.Add(file)
    classes = [GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{m.name}")) for m in (request, response)]
    return classes[0], classes[1]


PredictionsRequest, PredictionResponse = _messages()
