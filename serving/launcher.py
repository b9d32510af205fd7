"""Process 1 of the container, also started by `make serve`: TorchServe on loopback, the front before it.

`python -m serving.launcher --archive FOLDER` counts people; `--model FOLDER` serves an exported model. Environment:
AIP_HTTP_PORT, AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE and AIP_STORAGE_URI as Vertex AI sets them, and the HEADCOUNT_
variables of serving/README.md.
Exit codes: 0 after SIGTERM or Ctrl-C, 1 if the server cannot work; the last line of output then says why.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.run_folder import RunFolder
    from serving.supervisor import Options


def main() -> None:
    # The kernel ignores SIGTERM for a process 1 without a handler, and the imports below take most of a second.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="folder that serving.archive made; not needed with --model")
    parser.add_argument(
        "--model",
        default=os.environ.get("AIP_STORAGE_URI", ""),
        metavar="DIR",
        help="folder, or gs:// folder, with model.pt2 and contract.json, or with a .pt file to use instead of the "
        "archive's; default: AIP_STORAGE_URI",
    )
    parser.add_argument("--host", default=os.environ.get("HEADCOUNT_HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, help="default: AIP_HTTP_PORT, or 8080; 0: a free one")
    parser.add_argument("--grpc", default=os.environ.get("HEADCOUNT_GRPC", "127.0.0.1:7070"), metavar="HOST:PORT")
    parser.add_argument("--console", action="store_true", help="log for people instead of machines")
    parser.add_argument("--sample", default="", help="a picture for the line that --console prints")
    parser.add_argument(
        "--compiled",
        type=Path,
        help="folder in which a compiled network is made for the next start, as make serve does",
    )
    code = _serve(parser.parse_args())
    sys.stdout.flush()
    os._exit(code)  # a download may still run in a thread


def _serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit code."""
    import logging

    import uvloop

    from serving import logs
    from serving.exported.model_contract import ContractError
    from serving.run_folder import RunFolder, sweep
    from serving.storage import StorageError
    from serving.supervisor import StartError, Supervisor

    folder = None
    try:
        logs.set_up(os.environ.get("HEADCOUNT_LOG_LEVEL") or "INFO", arguments.console)
        sweep()
        folder = RunFolder.create()
        supervisor = Supervisor(_options(arguments, folder))
        # Not asyncio.run: at the end it would wait for a download.
        uvloop.new_event_loop().run_until_complete(supervisor.run())
        return 0
    except (StartError, StorageError, ContractError, ValueError, OSError) as error:
        logs.log(f"cannot serve: {error}", logging.CRITICAL)
        return 1
    finally:
        if folder is not None:
            folder.remove()


def _options(arguments: argparse.Namespace, folder: RunFolder) -> Options:
    """Reads the options from the command line and the environment. Raises StartError and ValueError."""
    from serving.capacity import available_cpus, available_memory, gpus, workers_that_fit
    from serving.contract import Limits, setting
    from serving.front import FrontSettings
    from serving.supervisor import Options, StartError
    from serving.torchserve import Plan, free_ports

    limits = Limits.from_environment()  # the workers read it too; this reports a mistake before they start
    spool_bytes = setting("HEADCOUNT_SPOOL_BYTES", FrontSettings.spool_bytes)
    if spool_bytes < limits.request_bytes:
        raise ValueError(
            f"HEADCOUNT_SPOOL_BYTES is {spool_bytes}, less than one request of HEADCOUNT_MAX_REQUEST_BYTES "
            f"({limits.request_bytes}); raise the one or lower the other"
        )
    fitting = workers_that_fit(available_cpus(), available_memory(), gpus(), spool_bytes)
    workers = setting("HEADCOUNT_WORKERS", fitting)
    answer_seconds = setting("HEADCOUNT_TIMEOUT", int(FrontSettings.answer_seconds))
    page = os.environ.get("HEADCOUNT_PAGE") or "on"
    if page not in ("on", "off"):
        raise ValueError(f"HEADCOUNT_PAGE is {page!r}; it must be on or off")
    front = FrontSettings(
        run_folder=folder,
        torchserve=free_ports(1)[0],
        predict_route=os.environ.get("AIP_PREDICT_ROUTE") or FrontSettings.predict_route,
        health_route=os.environ.get("AIP_HEALTH_ROUTE") or FrontSettings.health_route,
        request_bytes=limits.request_bytes,
        spool_bytes=spool_bytes,
        queue=setting("HEADCOUNT_QUEUE", 32 * workers),
        answer_seconds=answer_seconds,
        body_seconds=setting("HEADCOUNT_BODY_TIMEOUT", int(FrontSettings.body_seconds)),
        stuck_seconds=setting("HEADCOUNT_STUCK_SECONDS", int(FrontSettings.stuck_seconds)),
        page=page == "on",
    )
    port = setting("AIP_HTTP_PORT", 8080, least=0) if arguments.port is None else arguments.port
    grpc = re.fullmatch(r"(.+):(\d{1,5})", arguments.grpc)
    if not grpc:
        raise StartError(f"the gRPC address {arguments.grpc!r} is not HOST:PORT, such as 127.0.0.1:7070")
    if arguments.archive is None and not arguments.model:
        raise StartError("there is no model: give --archive or --model")
    if arguments.archive is not None and not list(arguments.archive.glob("MAR-INF/MANIFEST.json")):
        raise StartError(f"{arguments.archive} is no model archive; make one with python -m serving.archive")
    torchserve = Plan(
        folder=folder,
        archive=arguments.archive,
        inference=front.torchserve,
        grpc_host=grpc[1],
        grpc_port=int(grpc[2]) or free_ports(1)[0],
        workers=workers,
        gpus=gpus(),
        timeout=answer_seconds,
        request_bytes=limits.request_bytes,
    )
    return Options(
        host=arguments.host,
        port=port,
        front=front,
        torchserve=torchserve,
        model=arguments.model,
        sample=arguments.sample,
        # A GPU needs none, and a network from elsewhere is not the archive's.
        compiled=None if gpus() or arguments.model else arguments.compiled,
        grace=setting("HEADCOUNT_GRACE_SECONDS", int(Options.grace), least=0),
    )


if __name__ == "__main__":
    main()
