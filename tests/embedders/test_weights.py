"""Files by URL, from a server on this machine that cuts, lies, redirects and stalls as it is told."""

import hashlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from embedders import weights
from embedders.base import EmbedderError
from embedders.weights import cache_folder, fetch, obtain

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64


class Server:
    """Serves CONTENT at every path.

    Attributes:
        requests: path and Range header of each request, in order.
        sent: for each answer with a body, its first and last byte in the file (the last exclusive).
        cuts: of the coming answers, after how many bytes to close; without more, whole answers.
        statuses: codes to answer first, before any content.
        ranges: "yes", "no" (answers in full), "wrong" (another range), "silent" (206 without saying which).
        stalls: whether an answer that is cut is not closed until the next request comes (or some seconds pass).
        stalled: for each such answer, whether the next request came meanwhile.
        pace: seconds between blocks.
        stated: whether the length is stated.
        location: where to redirect to.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.sent: list[tuple[int, int]] = []
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.stalled: list[bool] = []
        self.ranges, self.stalls, self.pace, self.stated, self.location = "yes", False, 0.0, True, ""
        self.asked = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"told": self}))
        self.base = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.base}/some/model.pth"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    told: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.told.requests.append((self.path, asked))
        self.told.asked.set()
        if self.told.location:
            self._end(302, {"Location": self.told.location})
        elif self.told.statuses:
            self._end(self.told.statuses.pop(0), {})
        elif asked and self.told.ranges != "no":
            self._range(int(asked.removeprefix("bytes=").removesuffix("-")))
        else:
            self._body(200, 0, {})

    def _range(self, start: int) -> None:
        if start >= len(CONTENT):
            self._end(416, {"Content-Range": f"bytes */{len(CONTENT)}"})
            return
        if self.told.ranges == "wrong":
            start += 7
        stated = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self._body(206, start, {} if self.told.ranges == "silent" else {"Content-Range": stated})

    def _body(self, status: int, start: int, headers: dict[str, str]) -> None:
        end = start + self.told.cuts.pop(0) if self.told.cuts else len(CONTENT)
        if self.told.stated:
            headers["Content-Length"] = str(len(CONTENT) - start)
        self._end(status, headers)
        self.told.sent.append((start, end))
        for at in range(start, end, 1 << 15):
            self.wfile.write(CONTENT[at : min(at + (1 << 15), end)])
            time.sleep(self.told.pace)
        if end < len(CONTENT) and self.told.stalls:
            self.told.asked.clear()
            self.told.stalled.append(self.told.asked.wait(5))

    def _end(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("LVD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "BACKOFF_SECONDS", 0.001)
    server = Server()
    yield server
    server.stop()


def partial() -> Path:
    return cache_folder() / f"{SHA}.part"


def begun(content: bytes) -> None:
    """What an interrupted process left behind."""
    cache_folder().mkdir()
    partial().write_bytes(content)


def test_a_file_is_fetched_once_and_then_found_without_network(server: Server) -> None:
    path = fetch(server.url, SHA)
    assert path == cache_folder() / f"{SHA}.pth" and path.read_bytes() == CONTENT
    assert server.requests == [("/some/model.pth", None)] and not partial().exists()
    server.stop()
    (cache_folder() / f"{SHA}.lock").unlink()
    assert fetch(server.url, SHA) == path
    assert len(server.requests) == 1 and list(cache_folder().iterdir()) == [path]  # a cache of others serves as well


@pytest.mark.parametrize("cuts", [[1], [100_000], [100_000, 50_000, 99_999], [40_000] * 7])
def test_what_came_before_a_cut_is_not_sent_again(server: Server, cuts: list[int]) -> None:
    server.cuts = list(cuts)
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    begins = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
    assert [asked for _, asked in server.requests] == [None] + [f"bytes={begin}-" for begin in begins[1:]]
    assert server.sent == list(zip(begins, [*begins[1:], len(CONTENT)], strict=True))


def test_where_no_length_is_stated_the_hash_tells_a_cut(server: Server) -> None:
    server.stated, server.cuts = False, [100_000]
    with pytest.raises(EmbedderError, match=hashlib.sha256(CONTENT[:100_000]).hexdigest()):
        fetch(server.url, SHA)
    assert fetch(server.url, SHA).read_bytes() == CONTENT


def test_an_interrupted_process_is_continued(server: Server) -> None:
    begun(CONTENT[:123_456])
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert server.sent == [(123_456, len(CONTENT))]


def test_a_server_that_stalls_is_left(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TIMEOUT_SECONDS", 0.2)
    server.cuts, server.stalls = [100_000], True
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert server.sent == [(0, 100_000), (100_000, len(CONTENT))] and server.stalled == [True]


def test_a_server_without_ranges_begins_anew(server: Server) -> None:
    server.ranges, server.cuts = "no", [100_000]
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert server.sent == [(0, 100_000), (0, len(CONTENT))]


@pytest.mark.parametrize("ranges", ["wrong", "silent"])
def test_a_range_that_was_not_asked_for_is_not_used(server: Server, ranges: str) -> None:
    begun(CONTENT[:1000])
    server.ranges = ranges
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=1000-", None]


@pytest.mark.parametrize(
    ("left", "requests"),
    [
        (CONTENT, ["bytes=300000-"]),  # whole, but not yet checked
        (CONTENT + b"more", ["bytes=300004-", None]),
        (b"\0" * 300_000, ["bytes=300000-", None]),
        (b"\0" * 1000, ["bytes=1000-", None]),
    ],
)
def test_what_was_left_behind_is_checked(server: Server, left: bytes, requests: list[str | None]) -> None:
    begun(left)
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == requests


def test_another_file_than_pinned_is_refused_and_removed(server: Server) -> None:
    with pytest.raises(EmbedderError) as caught:
        fetch(server.url, OTHER)
    assert SHA in str(caught.value) and OTHER in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in cache_folder().iterdir()] == [f"{OTHER}.lock"]


def test_passing_faults_are_tried_again(server: Server) -> None:
    server.statuses = [503, 429, 500]
    assert fetch(server.url, SHA).read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_lasting_faults_end_after_some_tries_and_what_came_is_kept(server: Server) -> None:
    begun(CONTENT[:1000])
    server.statuses = [503] * 100
    with pytest.raises(EmbedderError, match=r"model\.pth cannot be fetched: HTTP 503; what has come is kept"):
        fetch(server.url, SHA)
    assert len(server.requests) == weights.TRIES and partial().read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_what_is_not_there_is_asked_for_once(server: Server, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(EmbedderError, match=rf"cannot be fetched: HTTP {status}") as caught:
        fetch(server.url, SHA)
    assert len(server.requests) == 1 and "\n" not in str(caught.value)


def test_no_server_is_one_line(server: Server) -> None:
    server.stop()
    with pytest.raises(EmbedderError, match=r"cannot be fetched: .*refused") as caught:
        fetch(server.url, SHA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_lead_to_the_web_alone(server: Server, location: str) -> None:
    server.location = location
    with pytest.raises(EmbedderError, match="cannot be fetched") as caught:
        fetch(server.url, SHA)
    assert len(server.requests) == 1 and "\n" not in str(caught.value)


def test_redirects_keep_the_range(server: Server) -> None:
    begun(CONTENT[:1000])
    first = Server()
    first.location = server.url
    assert fetch(f"{first.base}/old.pth", SHA).read_bytes() == CONTENT
    first.stop()
    assert server.requests == [("/some/model.pth", "bytes=1000-")]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://h/x", "s3://bucket/x.pth"])
def test_other_schemes_are_refused(server: Server, url: str) -> None:
    with pytest.raises(EmbedderError, match="only http and https"):
        fetch(url, SHA)


@pytest.mark.parametrize("path", ["/a b.pth", "/ä.pth"])
def test_addresses_that_are_none_are_one_line(server: Server, path: str) -> None:
    with pytest.raises(EmbedderError, match="cannot be fetched: write what is no letter or digit as %XX") as caught:
        fetch(server.base + path + "?token=secret", SHA)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value) and not server.requests


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/m.safetensors?token=secret#x", f"{SHA}.safetensors"),
        ("/a/b.torchscript.pt", f"{SHA}.pt"),
        ("/download?file=../../x.pth", SHA),
        ("/x.p%2Fth", SHA),
    ],
)
def test_only_the_ending_of_the_address_gets_onto_the_disk(server: Server, path: str, name: str) -> None:
    assert fetch(server.base + path, SHA) == cache_folder() / name


def test_errors_keep_secrets(server: Server) -> None:
    server.statuses = [403]
    for url in (server.url + "?token=secret", server.url.replace("://", "://user:secret@")):
        with pytest.raises(EmbedderError) as caught:
            fetch(url, SHA)
        assert "secret" not in str(caught.value)


PROCESS = """
import sys
from embedders.weights import fetch
sys.stdin.readline()
print(fetch(sys.argv[1], sys.argv[2]), flush=True)
"""


def test_several_processes_at_once_fetch_once(server: Server) -> None:
    server.pace = 0.03  # 10 blocks: 0.3 s, in which the others come
    arguments = [sys.executable, "-c", PROCESS, server.url, SHA]
    processes = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:  # each one is started, or will be soon
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60) for process in processes]
    assert {out.strip() for out, _ in answers} == {str(cache_folder() / f"{SHA}.pth")}
    assert server.sent == [(0, len(CONTENT))]


def test_threads_wait_for_each_other(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.pace = 0.02
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.url, SHA))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and server.sent == [(0, len(CONTENT))]
    assert "waiting for another process that fetches model.pth" in capsys.readouterr().err


def test_a_full_disk_says_what_to_do(server: Server) -> None:
    cache_folder().mkdir()
    partial().symlink_to("/dev/full")
    with pytest.raises(EmbedderError, match="No space left on device; free some space, or set LVD_CACHE"):
        fetch(server.url, SHA)


def test_a_cache_that_cannot_be_written_says_what_to_do(server: Server) -> None:
    cache_folder().write_text("a file")
    with pytest.raises(EmbedderError, match="set LVD_CACHE to a folder that can be written"):
        fetch(server.url, SHA)


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("LVD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/lvd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/lvd")
    monkeypatch.setenv("LVD_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_progress_is_lines_without_a_terminal(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 100_000)
    fetch(server.url, SHA)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fetching model.pth, 0 MB" and len(lines) >= 4
    assert lines[1].startswith("model.pth: 0 MB, ") and lines[1].endswith(" s left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    begun(CONTENT[:100_000])
    server.cuts = [50_000]
    fetch(server.url, SHA)
    shown = sys.stderr.getvalue()
    assert "model.pth" in shown and "/300.0 kB" in shown and "\x1b[" in shown


def test_the_bar_begins_where_the_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with weights._Meter("model.pth") as meter:
        for first, total in ((0, None), (100, 300), (0, 300)):  # a request without length, one that resumes, one anew
            meter.begin(first, total)
            meter.advance(50)
            task = meter._bar.tasks[0]
            assert (task.completed, task.total) == (first + 50, total)
            assert len(meter._bar.tasks) == 1
            meter.begin(first, total)
            assert task.completed == first


def test_local_files_need_no_hash_but_one_given_is_checked(tmp_path: Path) -> None:
    (tmp_path / "m.pth").write_bytes(CONTENT)
    for pin in (None, SHA):
        assert obtain(str(tmp_path / "m.pth"), pin, "vit:m.pth") == (tmp_path / "m.pth", SHA)
    with pytest.raises(EmbedderError, match=f"^vit:m.pth: .*m.pth has SHA-256 {SHA}, not {OTHER}$"):
        obtain(str(tmp_path / "m.pth"), OTHER, "vit:m.pth")
    for missing in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(EmbedderError, match=r"^vit:x: no such file: /"):
            obtain(str(missing), None, "vit:x")


def test_addresses_need_a_hash(server: Server) -> None:
    with pytest.raises(EmbedderError, match=r"^vit:x: no SHA-256 is known for http://.*; add #sha256=") as caught:
        obtain(server.url + "?token=secret", None, "vit:x")
    assert not server.requests and "secret" not in str(caught.value)
    assert obtain(server.url, SHA, "vit:x") == (cache_folder() / f"{SHA}.pth", SHA)
