"""The caller's credentials on Google Cloud."""

from __future__ import annotations

from typing import Final

from headcount.counters import CountError

SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"


class CredentialsError(CountError):
    """There are no usable credentials; the message says how to get them."""


class Credentials:
    """Application Default Credentials, renewed when they run out."""

    def __init__(self) -> None:
        try:
            import google.auth
            import google.auth.exceptions
            import google.auth.transport.requests
        except ImportError as error:
            raise CredentialsError(
                f"Google Cloud needs {error.name}; run `make install`, or install headcount[client]"
            ) from None
        try:
            self._credentials, _ = google.auth.default(scopes=[SCOPE])
        except google.auth.exceptions.DefaultCredentialsError:
            raise CredentialsError("no Google credentials: run `gcloud auth application-default login`") from None
        self._request = google.auth.transport.requests.Request()

    def header(self) -> dict[str, str]:
        """The request header that identifies the caller. Raises CredentialsError."""
        import google.auth.exceptions

        if not self._credentials.valid:
            try:
                self._credentials.refresh(self._request)  # type: ignore[no-untyped-call]
            except google.auth.exceptions.GoogleAuthError as error:
                raise CredentialsError(
                    f"the Google credentials are refused ({error}): run `gcloud auth application-default login`"
                ) from None
        return {"Authorization": f"Bearer {self._credentials.token}"}
