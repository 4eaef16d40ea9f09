"""The loopback server: replies as asked for, from this process or from one of its own that never outlives it."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from curation.errors import LvdError
from pipelines.loopback import BLOBS, INDEX, PortInUseError, Reply, serve, serve_blobs, write_blobs

ROOT = Path(__file__).resolve().parents[2]


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        data: bytes = response.read()
    return data


def port_of(url: str) -> int:
    assert url.startswith("http://127.0.0.1:")
    return int(url.rpartition(":")[2])


def answers(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port_of(url)), timeout=5).close()
    except ConnectionError:
        return False
    return True


def wait_until_silent(url: str) -> bool:
    deadline = time.monotonic() + 20
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not answers(url)


def test_replies_have_status_body_type_and_headers() -> None:
    replies = {
        "/a%20b?c=1": Reply(body=b"picture", headers=(("X-Robots-Tag", "noai"), ("X-Robots-Tag", "noindex"))),
        "/busy": Reply(503, b"later", "text/plain"),
        "/empty": Reply(),
    }
    with serve(replies.get) as url:
        with urllib.request.urlopen(f"{url}/a%20b?c=1") as response:
            assert response.read() == b"picture"
            assert response.headers["Content-Type"] == "image/jpeg"
            assert response.headers.get_all("X-Robots-Tag") == ["noai", "noindex"]
        assert get(f"{url}/empty") == b""
        for path, status, body in (("/busy", 503, b"later"), ("/a b", 404, b"not found\n"), ("/", 404, b"not found\n")):
            with pytest.raises(urllib.error.HTTPError) as error:
                get(url + path.replace(" ", "%20"))
            assert (error.value.code, error.value.read()) == (status, body)


def test_one_connection_carries_many_requests() -> None:
    with serve(lambda path: Reply(body=path.encode())) as url:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(url))
        connection.connect()
        first = connection.sock
        for number in range(20):
            connection.request("HEAD" if number % 5 == 4 else "GET", f"/{number}")
            response = connection.getresponse()
            assert int(response.headers["Content-Length"]) == len(f"/{number}")
            assert response.read() == (b"" if number % 5 == 4 else f"/{number}".encode())
            assert connection.sock is first
        connection.close()


def test_a_larger_declared_length_truncates_the_body() -> None:
    find = {"/a": Reply(body=b"x" * 1000, declared_length=1500)}.get
    with serve(find) as url, pytest.raises(http.client.IncompleteRead) as error:
        get(f"{url}/a")
    assert (len(error.value.partial), error.value.expected) == (1000, 500)


def test_a_slow_reply_keeps_no_other_waiting() -> None:
    asked, release = threading.Event(), threading.Event()

    def find(path: str) -> Reply:
        if path == "/slow":
            asked.set()
            assert release.wait(20)
        return Reply(body=path.encode())

    with serve(find) as url:
        got: list[bytes] = []
        slow = threading.Thread(target=lambda: got.append(get(f"{url}/slow")))
        slow.start()
        assert asked.wait(20)
        assert get(f"{url}/fast") == b"/fast"
        assert got == []
        release.set()
        slow.join()
    assert got == [b"/slow"]


def test_no_address_but_one_is_bound(tmp_path: Path) -> None:
    write_blobs(str(tmp_path), [])
    with serve(lambda path: None) as url, serve_blobs(str(tmp_path)) as stored:
        for port in (port_of(url), port_of(stored)):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            # A socket bound to every address would be reached by any other of loopback's, too.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_port_in_use_is_refused_by_both_kinds(tmp_path: Path) -> None:
    write_blobs(str(tmp_path), [])
    with serve(lambda path: None) as url:
        with pytest.raises(PortInUseError, match=f"port {port_of(url)}"), serve(lambda path: None, port_of(url)):
            pass
        with pytest.raises(PortInUseError, match=f"port {port_of(url)}"), serve_blobs(str(tmp_path), port_of(url)):
            pass
    assert not answers(url)
    with serve(lambda path: Reply(body=b"again"), port_of(url)) as again:
        assert again == url
        assert get(url) == b"again"


@pytest.mark.parametrize("seed", [0, 1])
def test_stored_replies_come_back(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    bodies = [rng.randbytes(rng.choice([0, 1, 100, 5000])) for _ in range(20)]
    items = {
        f"/{number}/a%20b?c={number}": Reply(
            rng.choice([200, 404, 500]),
            rng.choice(bodies),
            rng.choice(["image/png", "text/html"]),
            headers=tuple((f"X-{rng.randrange(100)}", str(rng.random())) for _ in range(rng.randrange(3))),
        )
        for number in range(60)
    }
    write_blobs(str(tmp_path), items.items())
    assert (tmp_path / BLOBS).stat().st_size == sum(map(len, {reply.body for reply in items.values()}))
    with serve_blobs(str(tmp_path)) as url:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(url))
        for path, reply in items.items():
            connection.request("GET", path)
            response = connection.getresponse()
            assert (response.status, response.read()) == (reply.status, reply.body)
            assert response.headers["Content-Type"] == reply.content_type
            assert all(value in response.headers.get_all(name, []) for name, value in reply.headers)
        connection.request("GET", "/60")
        assert connection.getresponse().status == 404
        connection.close()
    assert not answers(url)


def test_stored_truncation_and_a_second_web_in_the_same_place(tmp_path: Path) -> None:
    write_blobs(str(tmp_path), [("/a", Reply(body=b"old")), ("/b", Reply(body=b"old"))])
    write_blobs(str(tmp_path), [("/a", Reply(body=b"new", declared_length=10))])
    with serve_blobs(str(tmp_path)) as url:
        with pytest.raises(http.client.IncompleteRead) as error:
            get(f"{url}/a")
        assert error.value.partial == b"new"
        with pytest.raises(urllib.error.HTTPError):
            get(f"{url}/b")


def test_a_path_comes_once_and_a_failed_store_serves_nothing(tmp_path: Path) -> None:
    write_blobs(str(tmp_path), [("/a", Reply(body=b"old"))])
    with pytest.raises(ValueError, match="/a comes twice"):
        write_blobs(str(tmp_path), [("/a", Reply()), ("/a", Reply())])
    assert not (tmp_path / INDEX).exists()
    assert [path.name for path in tmp_path.iterdir()] == [BLOBS]


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_unreadable_replies_are_one_line(tmp_path: Path, damage: str) -> None:
    if damage == "broken":
        (tmp_path / INDEX).write_bytes(b"PAR1 no more")
    with pytest.raises(LvdError, match="cannot read the stored web in") as error, serve_blobs(str(tmp_path)):
        pass
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


PARENT = """
import os, sys, time
from pipelines.loopback import serve_blobs
with serve_blobs(sys.argv[1]) as url:
    # A fork that lives on holds all pipes of its parent open.
    fork = os.fork() if sys.argv[2] == "forked" else -1
    if fork:
        print(url, fork, flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("parent", ["alone", "forked"])
def test_the_server_ends_when_its_parent_is_killed(tmp_path: Path, parent: str) -> None:
    write_blobs(str(tmp_path), [("/a", Reply(body=b"here"))])
    command = [sys.executable, "-c", PARENT, str(tmp_path), parent]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, fork = process.stdout.readline().split()
        try:
            assert get(f"{url}/a") == b"here"
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert wait_until_silent(url)
        finally:
            process.kill()
            if int(fork) > 0:
                os.kill(int(fork), signal.SIGKILL)
