"""A small HTTP server on 127.0.0.1, for the demo and the benchmarks: the real download stage needs something to fetch.

`serve` answers from a function, in threads of this process. `serve_blobs` answers in a process of its own from what
`write_blobs` stored, so that serving costs the measured process nothing. Nothing here ever listens on another address.
"""

import contextlib
import dataclasses
import hashlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import LvdError

HOST = "127.0.0.1"
BLOBS, INDEX = "blobs.bin", "blobs.parquet"
_INDEX_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("status", pa.int32(), nullable=False),
        pa.field("content_type", pa.string(), nullable=False),
        pa.field("declared_length", pa.int64()),
        pa.field("headers", pa.list_(pa.list_(pa.string(), 2)), nullable=False),
    ]
)


class PortInUseError(LvdError):
    """Another program listens on the port asked for."""


@dataclass(frozen=True)
class Reply:
    """What is answered to a GET.

    Attributes:
        status: the HTTP status.
        body: the bytes sent.
        content_type: the Content-Type header.
        declared_length: the Content-Length header, where it is not the length of `body`: with a larger one the
            body is truncated. The connection is closed after it.
        headers: further headers, (name, value) each.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = "image/jpeg"
    declared_length: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


Find = Callable[[str], Reply | None]
"""From the target of a request as it was sent (path and query, still percent-encoded) to its reply; None is a 404."""

_NOT_FOUND = Reply(404, b"not found\n", "text/plain")


class _Server(ThreadingHTTPServer):
    """One thread for each connection; holds nothing else. Raises PortInUseError."""

    request_queue_size = 1024

    def __init__(self, find: Find, port: int) -> None:
        self.find = find
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise PortInUseError(f"cannot serve on port {port} of {HOST}: {os.strerror(error.errno or 0)}") from None

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for this machine's name, which can take seconds and is not needed.
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.socket.getsockname()[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    timeout = 60

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def _reply(self, with_body: bool) -> None:
        reply = self.server.find(self.path) or _NOT_FOUND
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        if reply.declared_length is None:
            self.send_header("Content-Length", str(len(reply.body)))
        else:
            self.send_header("Content-Length", str(reply.declared_length))
            self.send_header("Connection", "close")
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        return None


@contextmanager
def serve(find: Find, port: int = 0) -> Iterator[str]:
    """Answer from `find` in threads of this process; yields the base URL, `http://127.0.0.1:PORT`.

    `find` is called from several threads at once. Port 0 is any free one. Raises PortInUseError.
    """
    with _Server(find, port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def write_blobs(directory: str, items: Iterable[tuple[str, Reply]]) -> None:
    """Store replies by path for `serve_blobs`: one file of bodies, equal ones once, and an index; all or nothing.

    Holds the index (about 300 bytes a path), never the bodies. Raises ValueError for a path that comes twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    offsets: dict[bytes, int] = {}
    storage.remove_file(storage.join(directory, INDEX))
    with storage.AtomicFile(storage.join(directory, BLOBS)) as blobs:
        for path, reply in items:
            if path in rows:
                raise ValueError(f"the path {path} comes twice")
            key = hashlib.sha256(reply.body).digest()
            if key not in offsets:
                offsets[key] = blobs.size
                blobs.write(reply.body)
            head = {name: getattr(reply, name) for name in ("status", "content_type", "declared_length", "headers")}
            rows[path] = {"path": path, "offset": offsets[key], "length": len(reply.body), **head}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows.values()), _INDEX_SCHEMA), sink)
    storage.write_bytes(storage.join(directory, INDEX), sink.getvalue().to_pybytes())


def _open_blobs(directory: str) -> Find:
    """Find replies among stored ones; holds the index. Raises OSError and pyarrow's ArrowInvalid."""
    places: dict[str, tuple[int, int, Reply]] = {}
    for row in pq.read_table(os.path.join(directory, INDEX), schema=_INDEX_SCHEMA).to_pylist():
        headers = tuple((name, value) for name, value in row["headers"])
        head = Reply(row["status"], b"", row["content_type"], row["declared_length"], headers)
        places[row["path"]] = (row["offset"], row["length"], head)
    blobs = os.open(os.path.join(directory, BLOBS), os.O_RDONLY)

    def find(path: str) -> Reply | None:
        if path not in places:
            return None
        offset, length, head = places[path]
        return dataclasses.replace(head, body=os.pread(blobs, length, offset))

    return find


@contextmanager
def serve_blobs(directory: str, port: int = 0) -> Iterator[str]:
    """Answer from stored replies in a process of its own, which ends with this one; yields the base URL.

    Raises PortInUseError, and LvdError when the replies cannot be read.
    """
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "pipelines.loopback", os.path.abspath(directory), str(port)]
    # A session of its own: an interrupt at the terminal must leave the server answering until the run has stopped.
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            word, _, rest = child.stdout.readline().strip().partition(" ")
            if word != "serving":
                raise PortInUseError(rest) if word == "port" else LvdError(rest or "the server process did not start")
            yield rest
        finally:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()


def _serve_until_orphaned(directory: str, port: int) -> None:
    """The server process: says on stdout how it began, and ends when its parent closes stdin or is gone."""
    parent = os.getppid()
    try:
        with serve(_open_blobs(directory), port) as url:
            print("serving", url, flush=True)
            # A fork of the parent may hold the pipe open beyond the parent's death, so the parent is watched as well.
            while not select.select([sys.stdin], [], [], 1.0)[0] and os.getppid() == parent:
                pass
    except PortInUseError as error:
        print("port", error, flush=True)
    except (OSError, pa.ArrowInvalid) as error:
        print("error", f"cannot read the stored web in {directory}: {' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    _serve_until_orphaned(sys.argv[1], int(sys.argv[2]))
