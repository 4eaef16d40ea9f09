"""A guard around every request: which addresses may be reached, how long and how much may be read.

`installed` makes urllib's `urlopen`, which img2dataset calls, go through a `GuardedOpener`. It knows http, https and
redirects and nothing else: no files, no proxies, no cookies, no credentials. A body is read within limits here;
whether it is an image is for `pipelines.fetch` to say.

Not covered: the time of a name look-up, which the system's resolver bounds.
"""

import http.client
import io
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from curation.errors import ConfigError
from pipelines.fetch_address import is_allowed
from pipelines.fetch_errors import FetchError, Reason, as_fetch_error, status_error
from pipelines.fetch_url import encode_url, redirect_url

MAX_REDIRECTS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PIECE = 1 << 16


@dataclass(frozen=True)
class FetchPolicy:
    """How URLs are fetched.

    Attributes:
        user_agent: what servers are told; the part before `/` or a space is the name opt-out headers may address.
        opt_out: `X-Robots-Tag` directives that forbid the use of an image.
        timeout: seconds one operation on a connection may take.
        max_seconds: seconds for one URL in all, redirects, headers and body.
        max_bytes: largest body.
        max_pixels: largest image, width times height, as its header states it.
        retries: further attempts after failures that may pass.
        threads: URLs fetched at once.
        allow_private: whether loopback and private addresses may be reached.
    """

    user_agent: str = "lvd-builder (image dataset builder; honours X-Robots-Tag)"
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    timeout: float = 10.0
    max_seconds: float = 30.0
    max_bytes: int = 20_000_000
    max_pixels: int = 100_000_000
    retries: int = 1
    threads: int = 32
    allow_private: bool = False

    def __post_init__(self) -> None:
        if not self.user_agent.strip() or not (self.user_agent.isascii() and self.user_agent.isprintable()):
            raise ConfigError(f"user_agent {self.user_agent!r} must be printable ASCII text")

    @property
    def user_agent_token(self) -> str:
        """The name by which an `X-Robots-Tag` may address us alone."""
        return self.user_agent.split()[0].split("/")[0].lower()


@dataclass(frozen=True)
class _Trip:
    """The way of one URL, redirects included, and the time left for it."""

    policy: FetchPolicy
    deadline: float
    stop: threading.Event

    def patience(self) -> float:
        """Seconds the next operation may take. Raises FetchError when there are none left."""
        remaining = self.deadline - time.monotonic()
        if self.stop.is_set():
            raise FetchError(Reason.INTERNAL, "stopped")
        if remaining <= 0:
            raise self._too_slow()
        return min(self.policy.timeout, remaining)

    def explain(self, error: Exception) -> FetchError:
        """What ended the trip; a time limit hit at the deadline is the deadline's."""
        found = as_fetch_error(error)
        late = found.reason is Reason.TIMEOUT and time.monotonic() >= self.deadline
        return self._too_slow() if late else found

    def _too_slow(self) -> FetchError:
        return FetchError(Reason.TOO_SLOW, f"not done in {self.policy.max_seconds:g} seconds")


def _connect(host: str, port: int, trip: _Trip) -> socket.socket:
    """A connection to one of the host's addresses, all of which must be allowed.

    The name is resolved once and the address found is the one connected to, so that no second answer of a name
    server can lead elsewhere.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not all(is_allowed(address, trip.policy.allow_private) for address in addresses):
        raise FetchError(Reason.FORBIDDEN_ADDRESS, "the host's address is not public")
    failure: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), trip.patience())
        except OSError as error:
            failure = error
    raise failure


class _TimedReader(io.RawIOBase):
    """Reads a socket; every read has the time that is left at most."""

    def __init__(self, sock: socket.socket, trip: _Trip) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until the response is read
        self._trip = trip

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._trip.patience())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """As much of a socket as http.client uses, on a trip's time."""

    def __init__(self, sock: socket.socket, trip: _Trip) -> None:
        self._sock = sock
        self._trip = trip

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._trip.patience())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._trip))

    def close(self) -> None:
        self._sock.close()


class _Connection(http.client.HTTPConnection):
    """One request's connection: to an allowed address, under the host's own name."""

    def __init__(self, host: str, *, timeout: float, trip: _Trip, context: ssl.SSLContext | None) -> None:
        self.default_port = http.client.HTTP_PORT if context is None else http.client.HTTPS_PORT
        super().__init__(host, timeout=timeout)
        self._trip = trip
        self._tls = context

    def connect(self) -> None:
        sock = _connect(self.host, self.port, self._trip)
        if self._tls is not None:
            sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        self.sock = _TimedSocket(sock, self._trip)


class _Body:
    """A response as img2dataset uses one: its headers, and its body within limits."""

    def __init__(self, response: http.client.HTTPResponse, url: str, trip: _Trip) -> None:
        self.headers = response.headers
        self.url = url
        self._response = response
        self._trip = trip

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body. Raises FetchError when it is empty, too large, too slow, or ends early."""
        declared, limit = self._response.length, self._trip.policy.max_bytes
        if declared is not None and declared > limit:
            raise FetchError(Reason.TOO_LARGE, f"declared {declared} bytes, limit {limit}")
        try:
            body = self._read(limit)
        except Exception as error:
            found = self._trip.explain(error)
            broken = found.reason in (Reason.CONNECTION, Reason.TRUNCATED)
            raise (FetchError(Reason.TRUNCATED, "the body ended early") if broken else found) from None
        if declared is not None and len(body) < declared:
            raise FetchError(Reason.TRUNCATED, "the body ended early")
        if not body:
            raise FetchError(Reason.EMPTY, "no bytes")
        return body

    def _read(self, limit: int) -> bytes:
        body = bytearray()
        while piece := self._response.read(_PIECE):
            body += piece
            if len(body) > limit:
                raise FetchError(Reason.TOO_LARGE, f"more than {limit} bytes")
        return bytes(body)


class _Request(urllib.request.Request):
    """A request on a trip, `hops` redirects from its start."""

    def __init__(self, url: str, trip: _Trip, hops: int = 0) -> None:
        super().__init__(url, headers={"User-Agent": trip.policy.user_agent})
        self.trip = trip
        self.hops = hops


class _Handler(urllib.request.AbstractHTTPHandler):
    """http and https: open, follow redirects, turn other statuses into errors. The names are urllib's."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self._context = context

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: _Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, trip=request.trip, context=None), request)

    def https_open(self, request: _Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, trip=request.trip, context=self._context), request)

    def http_response(self, request: _Request, response: http.client.HTTPResponse) -> _Body:
        if 200 <= response.status < 300:
            return _Body(response, request.full_url, request.trip)
        response.close()
        if response.status not in REDIRECTS:
            raise status_error(response.status)
        return self._follow(request, response.headers.get("Location"))

    https_response = http_response

    def _follow(self, request: _Request, location: str | None) -> _Body:
        if location is None:
            raise FetchError(Reason.BAD_RESPONSE, "a redirect without a location")
        if request.hops == MAX_REDIRECTS:
            raise FetchError(Reason.TOO_MANY_REDIRECTS, f"more than {MAX_REDIRECTS} redirects")
        target = _Request(redirect_url(request.full_url, location), request.trip, request.hops + 1)
        body: _Body = self.parent.open(target, timeout=request.trip.policy.timeout)
        return body


class GuardedOpener(urllib.request.OpenerDirector):
    """Opens URLs under a policy; usable by many threads. Raises only FetchError.

    Attributes:
        final_urls: where a URL led, for those opened last through redirects; the caller removes what it has read.
        stop: once set, whatever is open or opened ends at its next operation.
    """

    def __init__(self, policy: FetchPolicy) -> None:
        super().__init__()
        self.final_urls: dict[str, str] = {}
        self.stop = threading.Event()
        self._policy = policy
        context = ssl.create_default_context()  # once: loading the certificates takes longer than most requests
        context.set_alpn_protocols(["http/1.1"])
        self.add_handler(_Handler(context))

    def open(self, fullurl: str | urllib.request.Request, data: Any = None, timeout: float | None = None) -> Any:
        """The response, at the end of redirects; `data` and `timeout` are urllib's, the policy's own count here."""
        if isinstance(fullurl, _Request):
            return super().open(fullurl, timeout=self._policy.timeout)
        asked = encode_url(fullurl if isinstance(fullurl, str) else fullurl.full_url)
        trip = _Trip(self._policy, time.monotonic() + self._policy.max_seconds, self.stop)
        self.final_urls.pop(asked, None)
        try:
            response = super().open(_Request(asked, trip), timeout=self._policy.timeout)
        except Exception as error:
            raise trip.explain(error) from None
        if response.url != asked:
            self.final_urls[asked] = response.url
        return response


@contextmanager
def installed(opener: GuardedOpener) -> Iterator[None]:
    """Every `urllib.request.urlopen` of this process goes through the guard while the context is entered."""
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(None)  # urllib makes its own again when asked
