"""The client's gRPC messages are those of TorchServe's own inference.proto."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from torchserve_protos import definitions

from headcount.torchserve_grpc import METHOD, PACKAGE, PredictionResponse, PredictionsRequest

OURS = {"PredictionsRequest": PredictionsRequest, "PredictionResponse": PredictionResponse}


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    pool = definitions("inference.proto")
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in OURS}


def test_the_method_is_theirs() -> None:
    _, service, method = METHOD.split("/")
    found = definitions("inference.proto").FindServiceByName(service).methods_by_name[method]
    assert (found.input_type.full_name, found.output_type.full_name) == tuple(f"{PACKAGE}.{name}" for name in OURS)
    assert not found.client_streaming
    assert not found.server_streaming


@given(name=st.text(), fields=st.dictionaries(st.text(), st.binary()), prediction=st.binary())
def test_messages_are_read_as_they_were_written(
    theirs: dict[str, Any], name: str, fields: dict[str, bytes], prediction: bytes
) -> None:
    request = PredictionsRequest(model_name=name, input=fields)
    read = theirs["PredictionsRequest"].FromString(request.SerializeToString())
    assert (read.model_name, dict(read.input)) == (name, fields)
    assert len(read.ListFields()) == bool(name) + bool(fields)
    answer = theirs["PredictionResponse"](prediction=prediction)
    assert PredictionResponse.FromString(answer.SerializeToString()).prediction == prediction
