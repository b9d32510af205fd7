"""The exceptions of the network and of google-auth, as this provider's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from .errors import PassingError, ProblemError

T = TypeVar("T")

REQUEST_SECONDS: Final = 60.0  # without a byte from the other side


def translated(unreachable: str, send: Callable[[], T]) -> T:
    """The result of `send`. Raises ProblemError, or PassingError with the text `unreachable`."""
    import requests
    from google.auth import exceptions

    try:
        return send()
    except exceptions.RefreshError as error:
        raise ProblemError(
            f"Google did not accept the credentials: {error}. Run `gcloud auth application-default login`."
        ) from None
    except (requests.RequestException, exceptions.TransportError) as error:
        raise PassingError(f"{unreachable} ({type(error).__name__}).") from None
