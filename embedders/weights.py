"""Weight files from a path or a URL. What comes by URL is fetched once, resumed after a cut, and checked.

A fetched file lies in the cache folder ($LVD_CACHE, else $XDG_CACHE_HOME/lvd, else ~/.cache/lvd) under its SHA-256, and
only after its bytes have shown that hash; from then on no network is needed. Several processes may ask for the same
file at once: one fetches it, the others wait.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embedders.base import EmbedderError
from embedders.specs import is_url

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
"""Without a byte."""
TRIES = 4
"""In a row that bring nothing."""
BACKOFF_SECONDS = 1.0
"""Before the second try; doubles from try to try."""
PLAIN_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
RANGE_NOT_SATISFIABLE = 416


class _Cut(Exception):  # noqa: N818 (reads as what happened)
    """The transfer broke off, and another try may help; the message says why."""


def obtain(place: str, sha256: str | None, name: str) -> tuple[Path, str]:
    """A weight file on this machine and its SHA-256.

    Args:
        place: path or URL.
        sha256: what the file must have; a URL needs it.
        name: of the model, for errors.

    Raises:
        EmbedderError: no such file, one of another hash, a URL without hash, or the download failed.
    """
    if is_url(place):
        if sha256 is None:
            raise EmbedderError(
                f"{name}: no SHA-256 is known for {_shown(place)}; add #sha256=... as its publisher states it "
                "(sha256sum prints that of a file you trust), or take a local file"
            )
        return fetch(place, sha256), sha256
    path = Path(place)
    if not path.is_file():
        raise EmbedderError(f"{name}: no such file: {place}")
    found = file_sha256(path)
    if sha256 not in (None, found):
        raise EmbedderError(f"{name}: {place} has SHA-256 {found}, not {sha256}")
    return path, found


def fetch(url: str, sha256: str) -> Path:
    """The file at `url`, from the cache or fetched into it. The hash is checked before the file gets its name there.

    Raises:
        EmbedderError: not http or https, not to be had (after retries), of another hash, or the cache cannot be
            written.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise EmbedderError(f"{_shown(url)}: only http and https can be fetched; take a local file")
    folder = cache_folder()
    target = folder / f"{sha256}{_suffix(url)}"
    if target.is_file():
        return target
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{sha256}.lock", url):
            if not target.is_file():  # another process may have been faster
                partial = folder / f"{sha256}.part"
                _download(url, partial, sha256)
                partial.replace(target)
    return target


def cache_folder() -> Path:
    """Where fetched files lie."""
    own, xdg = os.environ.get("LVD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return Path(xdg) / "lvd" if xdg else Path.home() / ".cache" / "lvd"


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def basename(place: str) -> str:
    """The last part of a path or URL."""
    path = urlsplit(place).path if is_url(place) else place
    return path.rstrip("/").rpartition("/")[2]


def _suffix(url: str) -> str:
    """Of the file's name, since readers go by it; nothing else of the URL gets onto the disk."""
    suffix = Path(basename(url)).suffix
    return suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,16}", suffix) else ""


def _shown(url: str) -> str:
    """A URL for messages, without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the network are caught where they arise, so that what comes here is the disk's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space, or set LVD_CACHE to a folder on another disk"
        else:
            advice = "set LVD_CACHE to a folder that can be written"
        raise EmbedderError(f"cache {folder}: {error.strerror or error}; {advice}") from None


@contextmanager
def _locked(path: Path, url: str) -> Iterator[None]:
    """One process (or thread) at a time. The file stays: to remove it would let two in."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fetches {basename(url)}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, partial: Path, sha256: str) -> None:
    """Fills `partial` from where it ends; its bytes have the hash then, or it is gone and EmbedderError says so."""
    resumed = _size(partial) > 0
    _transfer(url, partial)
    found = file_sha256(partial)
    if found == sha256:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        return
    partial.unlink()
    if not resumed:
        raise EmbedderError(f"{_shown(url)} has SHA-256 {found}, not {sha256}; check both the address and the hash")
    _download(url, partial, sha256)  # what lay there may have been wrong: once more from the beginning


def _transfer(url: str, partial: Path) -> None:
    """All bytes that the server has, through cuts; a try that brought bytes does not count against TRIES."""
    failures = 0
    with _Meter(basename(url)) as meter:
        while True:
            before = _size(partial)
            try:
                return _pull(url, partial, meter)
            except _Cut as cut:
                failures = 1 if _size(partial) > before else failures + 1
                if failures == TRIES:
                    raise EmbedderError(
                        f"{_shown(url)} cannot be fetched: {cut}; what has come is kept for the next try"
                    ) from None
            time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))


def _pull(url: str, partial: Path, meter: "_Meter") -> None:
    """One request for what is missing. Raises _Cut, EmbedderError; OSError is the disk's."""
    have = _size(partial)
    response = _open(url, have)
    if response is None:
        return  # there is nothing behind what we have: the hash will tell whether it is the file
    with response:
        start = _start(response)
        if start not in (0, have):
            partial.unlink()
            raise _Cut("the server sends another range than asked for")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        meter.begin(start, total)
        with partial.open("ab" if start else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                meter.advance(len(chunk))
    if total is not None and _size(partial) < total:
        raise _Cut("the connection was closed early")


def _open(url: str, have: int) -> Any:
    """The answer to a request for all bytes from `have` on; None if the server says that there are none."""
    headers = {"User-Agent": "lvd", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE and have:
            return None
        if error.code in TRANSIENT:
            raise _Cut(f"HTTP {error.code}") from None
        raise EmbedderError(f"{_shown(url)} cannot be fetched: HTTP {error.code} {error.reason}") from None
    except (http.client.InvalidURL, ValueError):
        raise EmbedderError(f"{_shown(url)} cannot be fetched: write what is no letter or digit as %XX") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # urllib gives a string where it refuses by itself, such as a redirect to another scheme
        if isinstance(reason, str | ssl.SSLCertVerificationError):
            raise EmbedderError(f"{_shown(url)} cannot be fetched: {_line(reason)}") from None
        raise _Cut(_line(reason)) from None


def _opener() -> urllib.request.OpenerDirector:
    """urllib without the schemes ftp, file and data, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _start(response: Any) -> int | None:
    """The place in the file where the body begins; None if the server says nothing that can be understood."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    stated = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(stated[1]) if stated else None


def _chunks(response: Any) -> Iterator[bytes]:
    """The body as it comes: read1 does not wait for a whole chunk, so that nothing is lost when the rest stays away."""
    try:
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_line(error)) from None


def _line(reason: object) -> str:
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Meter:
    """Progress on standard error: a bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None
        self._task: Any = None
        self._spoke: float | None = None

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, done: int, total: int | None) -> None:
        """A request begins to bring bytes, the first of which is number `done` of the file."""
        self._first, self._done, self._total, self._began = done, done, total, time.monotonic()
        if sys.stderr.isatty():
            self._show_bar()
        elif self._spoke is None:
            self._spoke = self._began
            self._say(f"fetching {self._title}" + (f", {total / 1e6:,.0f} MB" if total else ""))

    def advance(self, num_bytes: int) -> None:
        """So many bytes have come."""
        self._done += num_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._spoke is not None and now - self._spoke > PLAIN_SECONDS:
            self._spoke = now
            rate = (self._done - self._first) / (now - self._began)
            left = f", about {(self._total - self._done) / rate:,.0f} s left" if self._total else ""
            self._say(f"{self._title}: {self._done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s{left}")

    def _show_bar(self) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        self._bar.reset(self._task, completed=self._done, total=self._total)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
