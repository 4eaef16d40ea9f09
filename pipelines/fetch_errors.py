"""Why a URL gave no image: a small stable set of reasons, and the exceptions of the network mapped onto it.

A detail says more for a reader. It is canonical: equal responses give equal text, so no times, addresses or counts
that depend on how a connection happened to break.
"""

import errno
import http.client
import socket
import ssl
import urllib.error
from enum import StrEnum


class Reason(StrEnum):
    """Why a URL gave no image. The values are stored in reject tables."""

    BAD_URL = "bad_url"
    SCHEME = "scheme"
    FORBIDDEN_ADDRESS = "forbidden_address"
    HOST_NOT_FOUND = "host_not_found"
    DNS = "dns"
    CONNECTION = "connection"
    TLS = "tls"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    BAD_RESPONSE = "bad_response"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_NOT_FOUND = "http_not_found"
    HTTP_FORBIDDEN = "http_forbidden"
    HTTP_RATE_LIMITED = "http_rate_limited"
    HTTP_CLIENT_ERROR = "http_client_error"
    HTTP_SERVER_ERROR = "http_server_error"
    OPTED_OUT = "opted_out"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    NOT_AN_IMAGE = "not_an_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        Reason.DNS,
        Reason.CONNECTION,
        Reason.TIMEOUT,
        Reason.TOO_SLOW,
        Reason.HTTP_RATE_LIMITED,
        Reason.HTTP_SERVER_ERROR,
        Reason.TRUNCATED,
    }
)
"""Reasons that may be gone at another time; the others are answers."""

OPTED_OUT_MESSAGE = "Use of image disallowed by X-Robots-Tag directive"
"""What img2dataset says of an image whose headers forbid its use."""


class FetchError(Exception):
    """A URL gave no image. Its text, `reason: detail`, survives a way that carries only text (see `parse`)."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    @property
    def retryable(self) -> bool:
        """Whether another attempt may end otherwise."""
        return self.reason in RETRYABLE

    @classmethod
    def parse(cls, text: str) -> "FetchError":
        """The error whose text is `text`; img2dataset hands on texts only."""
        if text == OPTED_OUT_MESSAGE:
            return cls(Reason.OPTED_OUT, "X-Robots-Tag")
        reason, _, detail = text.partition(": ")
        if reason in set(Reason):
            return cls(Reason(reason), detail)
        return cls(Reason.INTERNAL, "unexpected error in the downloader")


def status_error(status: int) -> FetchError:
    """The error of an HTTP status other than success and redirects."""
    reasons = {
        403: Reason.HTTP_FORBIDDEN,
        404: Reason.HTTP_NOT_FOUND,
        408: Reason.TIMEOUT,
        410: Reason.HTTP_NOT_FOUND,
        429: Reason.HTTP_RATE_LIMITED,
    }
    by_class = {4: Reason.HTTP_CLIENT_ERROR, 5: Reason.HTTP_SERVER_ERROR}
    reason = reasons.get(status) or by_class.get(status // 100, Reason.BAD_RESPONSE)
    return FetchError(reason, f"HTTP {status}")


def as_fetch_error(error: Exception) -> FetchError:
    """What an exception of the network libraries means. Order matters below: the special before the general."""
    match error:
        case FetchError():
            return error
        case urllib.error.URLError(reason=Exception() as inner):
            return as_fetch_error(inner)
        case TimeoutError():
            return FetchError(Reason.TIMEOUT, "no answer in time")
        case socket.gaierror(errno=socket.EAI_NONAME):
            return FetchError(Reason.HOST_NOT_FOUND, "no such host")
        case socket.gaierror():
            return FetchError(Reason.DNS, "name resolution failed")
        case ssl.SSLCertVerificationError():
            return FetchError(Reason.TLS, error.verify_message)
        case ssl.SSLEOFError():
            return FetchError(Reason.CONNECTION, "closed")
        case ssl.SSLError():
            return FetchError(Reason.TLS, error.reason or "handshake failed")
        case ConnectionRefusedError():
            return FetchError(Reason.CONNECTION, "refused")
        case ConnectionError():
            return FetchError(Reason.CONNECTION, "closed")
        case http.client.IncompleteRead():
            return FetchError(Reason.TRUNCATED, "the body ended early")
        case http.client.InvalidURL() | UnicodeError():
            return FetchError(Reason.BAD_URL, "invalid host, port or path")
        case http.client.HTTPException():
            return FetchError(Reason.BAD_RESPONSE, type(error).__name__)
        case OSError():
            return FetchError(Reason.CONNECTION, errno.errorcode.get(error.errno or 0, type(error).__name__))
    return FetchError(Reason.INTERNAL, type(error).__name__)
