"""OAuth 2.0: the access tokens that callers present, and the endpoint that issues them.

https://oauth2.googleapis.com/token is /oauth2/token here. Every caller on loopback gets a token.
The token `sandbox` never expires; `sandbox-expires-TIME` is accepted until that time, in seconds since 1970;
`sandbox:EMAIL` never expires, and names its caller in the audit log.
"""

import re
import urllib.parse

from starlette.requests import Request
from starlette.responses import JSONResponse

from sandbox import clock
from sandbox.errors import GoogleError

TOKEN = "sandbox"
PATH = "/oauth2/token"
GRANTS = ("refresh_token", "urn:ietf:params:oauth:grant-type:jwt-bearer")
_EXPIRING = re.compile(r"sandbox-expires-(\d+)")


def expiry(token: str) -> float | None:
    """The time at which a token of the sandbox ends, in seconds since 1970; None for another token."""
    if token == TOKEN or token.startswith(f"{TOKEN}:"):
        return float("inf")
    found = _EXPIRING.fullmatch(token)
    return float(found[1]) if found else None


def caller(authorization: str) -> str:
    """The address of the caller whose token names one, or "". authorization: the request's header."""
    return authorization.partition(f"Bearer {TOKEN}:")[2]


def is_accepted(token: str) -> bool:
    """Whether a token is one of the sandbox's that has not expired."""
    return (expiry(token) or 0) > clock.time()


async def issue(request: Request, lifetime: float) -> JSONResponse:
    """Answers a token request as RFC 6749 has it."""
    form = dict(urllib.parse.parse_qsl((await request.body()).decode()))
    if form.get("grant_type") not in GRANTS:
        return JSONResponse({"error": "unsupported_grant_type", "error_description": f"One of {GRANTS}."}, 400)
    token = f"sandbox-expires-{int(clock.time() + lifetime)}"
    return JSONResponse({"access_token": token, "expires_in": int(lifetime), "token_type": "Bearer"})


def check(request: Request) -> None:
    """Raises UNAUTHENTICATED for an expired token. A call without a token, or with an unknown one, is let in."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind == "Bearer" and expiry(token) is not None and not is_accepted(token):
        raise GoogleError(
            "UNAUTHENTICATED",
            "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other "
            "valid authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.",
        )
