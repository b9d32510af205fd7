"""`python -m sandbox`: the Google Cloud APIs that Headcount uses, on this machine."""

import argparse
import logging
import socket
import sys
from pathlib import Path

import uvicorn

from sandbox.context import SandboxSettings
from sandbox.server import RUNNERS, SandboxServer
from sandbox.vertex_endpoints import SUPPOSITIONS


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("--port", type=int, default=8790, help="on 127.0.0.1; 0 takes a free one (8790)")
    parser.add_argument("--state", type=Path, default=Path(".headcount/sandbox"), help="folder (.headcount/sandbox)")
    parser.add_argument("--fresh", action="store_true", help="forget the state and its containers first")
    parser.add_argument("--runner", choices=RUNNERS, default="docker", help="stub: no containers, for tests")
    parser.add_argument("--admin", action="store_true", help="serve /_sandbox/…: faults, journal, history")
    parser.add_argument("--validate", action="store_true", help="check answers against the discovery documents")
    parser.add_argument(
        "--hold-after-undeploy",
        type=float,
        default=0,
        metavar="SECONDS",
        help="refuse to delete a model version this long after its undeployment; about 60 on Vertex AI (0)",
    )
    parser.add_argument(
        "--operation-seconds",
        type=float,
        default=0,
        metavar="SECONDS",
        help="least duration of an operation (0)",
    )
    parser.add_argument(
        "--service-account",
        action="append",
        default=[],
        metavar="EMAIL",
        help="an account that models may run as; repeatable; without it any may",
    )
    parser.add_argument(
        "--suppose",
        action="append",
        default=[],
        choices=SUPPOSITIONS,
        metavar="NAME",
        help="behave the other way where Vertex AI's own behaviour is not known; repeatable; one of "
        + "; ".join(f"{name}: {meaning}" for name, meaning in SUPPOSITIONS.items()),
    )
    parser.add_argument(
        "--idle-seconds",
        type=float,
        metavar="SECONDS",
        help="both periods of scale to zero, instead of those of a deployed model (300 to 28800)",
    )
    parser.add_argument(
        "--registry-port",
        type=int,
        default=8791,
        metavar="PORT",
        help="of the Docker registry, on 127.0.0.1, started with the first repository; 0 takes a free one (8791). Its "
        "user is oauth2accesstoken, the password an access token; the token `sandbox` never expires",
    )
    parser.add_argument(
        "--registry-certificate",
        type=Path,
        metavar="FILE",
        help="PEM file with a key and a certificate for 127.0.0.1: the registry speaks HTTPS too, on the same port",
    )
    parser.add_argument(
        "--token-lifetime",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="of access tokens from /oauth2/token; the registry and the APIs refuse one that has expired (3600)",
    )
    parser.add_argument(
        "--account-delay",
        type=float,
        default=0,
        metavar="SECONDS",
        help="every other read misses a service account this long after it was made, as on Google (0)",
    )
    parser.add_argument(
        "--api-delay",
        type=float,
        metavar="SECONDS",
        help="refuse calls of APIs that are not enabled, and this long after they were; without it all may be called",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = options(arguments)
    logging.basicConfig(level=logging.WARNING, format="sandbox: %(message)s")
    # The protocol said outright: asyncio sets TCP_NODELAY only then, and without it answers take 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", args.port))
    except OSError as error:
        print(
            f"Port {args.port} can not be used ({error.strerror}): stop what listens there, or choose "
            "another with --port.",
            file=sys.stderr,
        )
        return 1
    port = listener.getsockname()[1]
    try:
        server = _open(args, port)
    except BlockingIOError:
        print(
            f"Another sandbox uses the state folder {args.state}: stop it, or choose another with --state.",
            file=sys.stderr,
        )
        return 1
    # Before the application starts, so that a first request waits instead of being refused.
    listener.listen(2048)
    print(f"Sandbox on http://127.0.0.1:{port}, state in {args.state}, containers by {args.runner}", flush=True)
    # Google keeps an idle connection for minutes. One that is closed sooner may meet the client's next request.
    config = uvicorn.Config(
        server, lifespan="on", log_level="error", access_log=False, timeout_keep_alive=600, timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _open(args: argparse.Namespace, port: int) -> SandboxServer:
    settings = SandboxSettings(
        port=port,
        state=args.state,
        fresh=args.fresh,
        runner=args.runner,
        admin=args.admin,
        validate=args.validate,
        hold_after_undeploy=args.hold_after_undeploy,
        operation_seconds=args.operation_seconds,
        service_accounts=tuple(args.service_account),
        suppose=frozenset(args.suppose),
        idle_seconds=args.idle_seconds,
        registry_port=args.registry_port,
        registry_certificate=args.registry_certificate,
        token_lifetime=args.token_lifetime,
        api_delay=args.api_delay,
        account_delay=args.account_delay,
    )
    return SandboxServer(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
