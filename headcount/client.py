"""The Python client."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from headcount.counters import Answer, Counter, CountError, Grpc, InProcess, Rest
from serving.contract import Parameters, Point, RequestError


def open_counter(
    url: str | None = None,
    grpc: str | None = None,
    stack: str | None = None,
    endpoint: str | None = None,
    parallel: int = 1,
) -> Counter:
    """The counter for a server's URL, a gRPC address, a stack's endpoint, an endpoint of Vertex AI, or this process.

    In this process the checkpoint is HEADCOUNT_WEIGHTS (a published name or a path), fetched if need be.
    parallel: pictures counted at once in this process. Raises CountError, and ValueError for an address that
    is none.
    """
    if sum(server is not None for server in (url, grpc, stack, endpoint)) > 1:
        raise ValueError("a URL, a gRPC address, a stack and an endpoint are different servers; give one of them")
    if url is not None:
        return Rest(url)
    if grpc is not None:
        return Grpc(grpc)
    if stack is not None or endpoint is not None:
        from headcount.endpoint import Endpoint, of_name, of_stack

        return Endpoint(of_stack(stack) if stack is not None else of_name(endpoint or ""))
    from headcount.data import DEFAULT_WEIGHTS, DataError, find_weights

    try:
        checkpoint = find_weights(os.environ.get("HEADCOUNT_WEIGHTS") or DEFAULT_WEIGHTS)
    except DataError as error:
        raise CountError(str(error)) from None
    return InProcess(checkpoint, parallel)


class Client:
    """Counts the people in pictures.

    >>> with Client("http://localhost:8080") as client:  # a server; Client() counts in this process
    ...     answer = client.count("bus.jpg", confidence=0.5)
    >>> answer.count, answer.people[0].box
    (4, (671.7, 393.7, 809.6, 879.1))

    url: a Headcount server. grpc: HOST:PORT of its gRPC service instead. stack: a deployed Pulumi stack instead.
    endpoint: an endpoint of Vertex AI instead, projects/…/locations/…/endpoints/ID. A client may be used from several
    threads. One that counts in this process loads the network, so keep it. Raises CountError, and
    ValueError for an address that is none.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        grpc: str | None = None,
        stack: str | None = None,
        endpoint: str | None = None,
    ) -> None:
        self._counter = open_counter(url, grpc, stack, endpoint)

    def count(
        self,
        picture: bytes | str | os.PathLike[str],
        *,
        confidence: float = Parameters.confidence,
        iou: float = Parameters.iou,
        max_people: int | None = None,
        region: Sequence[Point] | None = None,
        annotate: bool = False,
        detail: str = Parameters.detail,
        grid: str | None = None,
        candidates: float | None = None,
    ) -> Answer:
        """The people in a picture.

        picture: its bytes, or the path of a JPEG, PNG, WebP or GIF file. The parameters are those of
        `serving.contract.Parameters`; grid is written COLUMNSxROWS. Raises CountError for a picture or a server that
        will not do, ValueError for a parameter out of range, OSError for a file that cannot be read.
        """
        given = {
            "confidence": confidence,
            "iou": iou,
            "max_people": max_people,
            "region": region,
            "annotate": annotate,
            "detail": detail,
            "grid": grid,
            "candidates": candidates,
        }
        try:
            parameters = Parameters.parse(given)
        except RequestError as error:
            raise ValueError(str(error)) from None
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        return self._counter.count(data, parameters)

    def close(self) -> None:
        self._counter.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
