"""An HTTP server on loopback whose paths misbehave, each in one way."""

import socket
import ssl
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

MAX_BYTES = 200_000
"""The limit on a body that `/declared` and `/endless` exceed."""

GIVE_UP = 5.0
"""Seconds after which the endless answers end, so that a client without limits fails its test and does not hang."""


def photo(kind: str = "jpeg", size: tuple[int, int] = (60, 40), seed: int = 0) -> bytes:
    """An encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pixel_bomb(side: int) -> bytes:
    """A PNG whose header states `side` x `side` pixels, and that holds none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class FaultyServer(ThreadingHTTPServer):
    """Serves the paths in `pages`, and `/photo/N` as image number N; counts and keeps what it was asked.

    Attributes:
        asked: how often each path was asked for.
        agents: the user agents that asked.
        pages: path -> what answers there.
        released: ends the answers that would go on.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str | None] = set()
        self.released = threading.Event()
        self.pages: dict[str, Callable[[_Handler], None]] = _pages()
        self._lock = threading.Lock()
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.server_port}{path}"

    def note(self, path: str, agent: str | None) -> int:
        """Count a request; returns which one of its path it is, from 1."""
        with self._lock:
            self.asked[path] += 1
            self.agents.add(agent)
            return self.asked[path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        self.nth = self.server.note(self.path, self.headers["User-Agent"])
        self.close_connection = True
        if self.path.startswith("/photo/"):
            self.answer(photo(seed=int(self.path.removeprefix("/photo/"))))
        else:
            self.server.pages.get(self.path, status(404))(self)

    def answer(self, body: bytes, code: int = 200, length: int | None = None, **headers: str) -> None:
        """An answer with `body`; `length` is what it claims, `X_Header` names the header `X-Header`."""
        self.head(code, Content_Length=str(len(body) if length is None else length), **headers)
        self.wfile.write(body)

    def head(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


Page = Callable[[_Handler], None]


def page(body: bytes, length: int | None = None, **headers: str) -> Page:
    return lambda to: to.answer(body, 200, length, **headers)


def status(code: int) -> Page:
    return lambda to: to.answer(b"nothing here", code)


def redirect(location: str, code: int = 302) -> Page:
    return lambda to: to.answer(b"", code, Location=location)


def raw(data: bytes) -> Page:
    """Bytes instead of an HTTP answer."""

    def serve(to: _Handler) -> None:
        to.wfile.write(data)

    return serve


def chunked(chunks: list[bytes], end: bytes = b"0\r\n\r\n") -> Page:
    def serve(to: _Handler) -> None:
        to.head(Transfer_Encoding="chunked")
        for data in chunks:
            to.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        to.wfile.write(end)

    return serve


def drip(start: bytes) -> Page:
    """`start`, then a byte every 20 ms, for longer than the client should have patience."""

    def serve(to: _Handler) -> None:
        to.wfile.write(start)
        ends = time.monotonic() + GIVE_UP
        while time.monotonic() < ends and not to.server.released.wait(0.02):
            to.wfile.write(b"x")

    return serve


def silent(to: _Handler) -> None:
    """No answer at all, for longer than the client should have patience."""
    to.server.released.wait(GIVE_UP)


def hang_up(to: _Handler) -> None:
    """A reset instead of an answer."""
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.connection.close()


def failing(times: int, code: int) -> Page:
    """An error `times` times over, then an image."""
    return lambda to: to.answer(b"", code) if to.nth <= times else to.answer(photo())


def _pages() -> dict[str, Page]:
    image = photo()
    pages: dict[str, Page] = {f"/{code}": status(code) for code in (403, 404, 408, 410, 418, 429, 500, 503, 304)}
    pages |= {f"/photo.{kind}": page(photo(kind)) for kind in ("jpeg", "png", "webp")}
    return pages | {
        "/html": page(b"  <!doctype html><title>gone</title>"),
        "/garbage": page(b"\x00\x01" * 50),
        "/bomb": page(pixel_bomb(15_000)),
        "/empty": page(b""),
        "/noai": page(image, X_Robots_Tag="noai"),
        "/ours": page(image, X_Robots_Tag="lvd-builder: noimageai, nofollow"),
        "/otherbot": page(image, X_Robots_Tag="otherbot: noai"),
        "/h%C3%A4user%20am%20see.jpg?a=%C3%BC": page(image),
        "/short": page(image[:-50], length=len(image)),
        "/short-chunked": chunked([image[:100]], end=b"ff\r\nxy"),
        "/chunked": chunked([image[:100], image[100:]]),
        "/declared": page(b"", length=MAX_BYTES + 1),
        "/endless": chunked([b"x" * 10_000] * (MAX_BYTES // 10_000 + 1)),
        "/slow-body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        "/slow-head": drip(b"HTTP/1.1 200 OK\r\nX-Filler: "),
        "/silent": silent,
        "/reset": hang_up,
        "/no-http": raw(b"SSH-2.0-OpenSSH_9.0\r\n"),
        "/no-answer": raw(b""),
        "/hop1": redirect("/hop2", 301),
        "/hop2": redirect("hop3?x=1", 307),
        "/hop3?x=1": redirect("/photo.png", 308),
        "/loop": redirect("/loop"),
        "/to-file": redirect("file:///etc/hostname"),
        "/to-metadata": redirect("http://169.254.169.254/latest/meta-data"),
        "/to-umlaut": redirect("/h\u00e4user am see.jpg?a=%C3%BC".encode().decode("latin-1")),
        "/to-nowhere": lambda to: to.answer(b"", 302),
        "/once-503": failing(1, 503),
    }
