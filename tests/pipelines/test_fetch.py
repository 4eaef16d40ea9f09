"""Lists of URLs through img2dataset: one result each, in order, with the bytes as served."""

import errno
import os
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from curation.errors import LvdError
from curation.storage import StorageFullError
from pipelines import fetch
from pipelines.fetch import RETRYABLE, Failed, Fetched, Fetcher, Reason
from pipelines.fetch_errors import FetchError
from pipelines.fetch_spool import Spool, Stored
from pipelines.guard import FetchPolicy
from tests.pipelines.faulty_server import MAX_BYTES, FaultyServer, photo

POLICY = FetchPolicy(allow_private=True, max_bytes=MAX_BYTES, threads=8, timeout=5, max_seconds=10, retries=0)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _own_opener_and_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fetch, "RETRY_DELAY", 0.0)


def fetch_all(urls: Sequence[str | None], policy: FetchPolicy = POLICY) -> list[Fetched | Failed]:
    return list(Fetcher(policy).fetch(list(range(100, 100 + len(urls))), urls))


def test_images_come_as_served_in_input_order(server: FaultyServer) -> None:
    urls = [server.url(f"/photo/{seed}") for seed in range(60)] + [server.url("/404")]
    results = fetch_all([*urls[::-1], *urls])
    assert [r.row for r in results] == list(range(100, 222))
    seeds = [*range(59, -1, -1), *range(60)]
    images = [r for r in results if isinstance(r, Fetched)]
    assert [r.image for r in images] == [photo(seed=seed) for seed in seeds]
    assert {(r.width, r.height, r.format, r.final_url) for r in images} == {(60, 40, "jpeg", None)}
    assert [r.row for r in results if isinstance(r, Failed)] == [100, 221]


def test_formats_and_redirects(server: FaultyServer) -> None:
    results = fetch_all([server.url(path) for path in ("/photo.png", "/photo.webp", "/hop1")])
    assert [(r.image, r.format, r.final_url) for r in results if isinstance(r, Fetched)] == [
        (photo("png"), "png", None),
        (photo("webp"), "webp", None),
        (photo("png"), "png", server.url("/photo.png")),
    ]


def test_every_fault_has_its_reason_and_one_result(server: FaultyServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        expected: list[tuple[str | None, str, str]] = [
            (None, "bad_url", "no URL"),
            ("no url", "bad_url", "no scheme"),
            ("file:///etc/hostname", "scheme", "file: is not fetched"),
            (refused, "connection", "refused"),
            (server.url("/404"), "http_not_found", "HTTP 404"),
            (server.url("/403"), "http_forbidden", "HTTP 403"),
            (server.url("/429"), "http_rate_limited", "HTTP 429"),
            (server.url("/500"), "http_server_error", "HTTP 500"),
            (server.url("/html"), "not_an_image", "markup"),
            (server.url("/garbage"), "not_an_image", "no known image format"),
            (server.url("/bomb"), "too_many_pixels", "too many pixels"),
            (server.url("/empty"), "empty", "no bytes"),
            (server.url("/short"), "truncated", "the body ended early"),
            (server.url("/declared"), "too_large", f"declared {MAX_BYTES + 1} bytes, limit {MAX_BYTES}"),
            (server.url("/endless"), "too_large", f"more than {MAX_BYTES} bytes"),
            (server.url("/to-file"), "scheme", "redirect: file: is not fetched"),
            (server.url("/to-metadata"), "forbidden_address", "the host's address is not public"),
            (server.url("/noai"), "opted_out", "X-Robots-Tag"),
            (server.url("/ours"), "opted_out", "X-Robots-Tag"),
        ]
        results = fetch_all([url for url, _, _ in expected])
    assert [(r.reason, r.detail) for r in results if isinstance(r, Failed)] == [(r, d) for _, r, d in expected]
    assert all(r.retryable == (r.reason in RETRYABLE) for r in results if isinstance(r, Failed))


def test_opt_outs_of_other_bots_do_not_bind_us(server: FaultyServer) -> None:
    (result,) = fetch_all([server.url("/otherbot")])
    assert isinstance(result, Fetched)
    (result,) = fetch_all([server.url("/otherbot")], replace(POLICY, user_agent="OtherBot/1.0"))
    assert isinstance(result, Failed)
    assert result.reason == Reason.OPTED_OUT


def test_loopback_is_refused_by_default(server: FaultyServer) -> None:
    (result,) = fetch_all([server.url("/photo.png")], FetchPolicy())
    assert isinstance(result, Failed)
    assert result.reason == Reason.FORBIDDEN_ADDRESS
    assert not server.asked


def test_a_drip_does_not_hold_the_others(server: FaultyServer) -> None:
    urls = [server.url("/slow-body"), server.url("/slow-head"), server.url("/photo.png")]
    slow, slower, good = fetch_all(urls, replace(POLICY, max_seconds=0.4))
    assert isinstance(good, Fetched)
    for failed in (slow, slower):
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.detail) == ("too_slow", "not done in 0.4 seconds")


def test_equal_urls_are_asked_for_once(server: FaultyServer) -> None:
    same = server.url("/häuser am see.jpg?a=ü")
    results = fetch_all([same, server.url("/h%C3%A4user%20am%20see.jpg?a=%C3%BC#top"), same])
    assert [r.image for r in results if isinstance(r, Fetched)] == [photo()] * 3
    assert sum(server.asked.values()) == 1


def test_only_what_may_pass_is_retried(server: FaultyServer) -> None:
    paths = ["/once-503", "/503", "/404", "/photo.png", "/html"]
    results = fetch_all([server.url(path) for path in paths], replace(POLICY, retries=2))
    assert [r.reason if isinstance(r, Failed) else "" for r in results] == [
        "",
        "http_server_error",
        "http_not_found",
        "",
        "not_an_image",
    ]
    assert server.asked == {"/once-503": 2, "/503": 3, "/404": 1, "/photo.png": 1, "/html": 1}


def test_the_same_responses_give_the_same_results(server: FaultyServer) -> None:
    paths = [f"/photo/{n}" for n in range(20)] + ["/short", "/reset", "/no-http", "/hop1", "/html", "/silent", "/500"]
    policy = replace(POLICY, timeout=0.3)
    results = fetch_all([server.url(path) for path in paths], replace(policy, threads=1))
    assert results == fetch_all([server.url(path) for path in paths], replace(policy, threads=16))


def test_a_fetcher_serves_many_lists_and_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    fetcher = Fetcher(POLICY)
    Fetcher(FetchPolicy())  # another's guard has taken the place of ours meanwhile
    assert list(fetcher.fetch([], [])) == []
    for seed in range(3):
        (result,) = fetcher.fetch([seed], [server.url(f"/photo/{seed}")])
        assert isinstance(result, Fetched)
        assert (result.row, result.image) == (seed, photo(seed=seed))
    assert list(tmp_path.iterdir()) == []


def test_bodies_lie_in_a_file_not_in_memory(server: FaultyServer, tmp_path: Path) -> None:
    results = Fetcher(POLICY).fetch([0, 1], [server.url("/photo/0"), server.url("/photo/1")])
    next(results)
    (folder,) = tmp_path.iterdir()
    assert (folder / "bodies").stat().st_size == len(photo(seed=0)) + len(photo(seed=1))
    del results
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_pass(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    urls = [server.url(f"/photo/{n}") for n in range(200)]
    with pytest.raises(StorageFullError, match="no space left"):
        fetch_all(urls)
    assert len(server.asked) < 100


def test_a_failing_downloader_is_named(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from img2dataset.downloader import Downloader

    def broken(self: object, row: object) -> None:
        raise ValueError("broken inside")

    monkeypatch.setattr(Downloader, "download_shard", broken)
    with pytest.raises(LvdError, match="img2dataset failed: ValueError: broken inside"):
        fetch_all([server.url("/photo/0")])
    monkeypatch.setattr(Downloader, "download_shard", lambda self, row: None)
    with pytest.raises(LvdError, match=r"no result for 1 of 1 URLs, the first http://127\.0\.0\.1"):
        fetch_all([server.url("/photo/0")])


def test_an_interrupt_ends_a_fetch(server: FaultyServer) -> None:
    """More URLs wait than img2dataset queues at once, which is when it could not be interrupted."""
    main = threading.get_ident()

    def interrupt(to: object) -> None:
        signal.pthread_kill(main, signal.SIGINT)

    server.pages["/interrupt"] = interrupt
    paths = [f"/photo/{n}" for n in range(20)] + ["/interrupt"] + [f"/photo/{n}" for n in range(20, 300)]
    with pytest.raises(KeyboardInterrupt):
        fetch_all([server.url(path) for path in paths], replace(POLICY, threads=2))
    assert sum(server.asked.values()) < 300


def test_the_spool_gives_back_what_came_last(tmp_path: Path) -> None:
    stop = threading.Event()
    with Spool(str(tmp_path), {"a": "b"}, stop) as spool:
        spool.write(None, "0", None, {"url": "a", "error_message": str(FetchError(Reason.DNS, "x"))})
        assert spool.may_pass("a")
        for url, body in [("a", b"first"), ("c", b"second"), ("a", b"")]:
            spool.write(body, "0", None, {"url": url, "error_message": None})
        assert spool.outcomes == {"a": Stored(11, 0, None), "c": Stored(5, 6, None)}
        assert spool.read(Stored(5, 6, None)) == b"second"
        assert not spool.may_pass("a")
    assert not stop.is_set()
