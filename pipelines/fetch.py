"""URLs -> image bytes as served, through img2dataset's downloader, behind the guard of `pipelines.guard`.

img2dataset brings the pool of threads, the bound on what they hold and the opt-out headers; its readers, writers and
distributors are not used. Bodies are spooled to the temporary directory as they arrive and read back in input order, so
memory holds two bodies a thread at most (2 * threads * max_bytes), and some hundred bytes a URL.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from curation.errors import LvdError
from curation.storage import storage_errors
from embedders.images import TooManyPixels, UndecodableImage, image_size
from pipelines.fetch_errors import RETRYABLE, FetchError, Reason
from pipelines.fetch_spool import Spool, Stored
from pipelines.fetch_url import encode_url
from pipelines.guard import FetchPolicy, GuardedOpener, installed

__all__ = ["RETRYABLE", "Failed", "Fetched", "Fetcher", "Reason"]

RETRY_DELAY = 2.0
"""Seconds before the first retry; each further one waits twice as long."""


@dataclass(frozen=True)
class Fetched:
    """An image: its bytes as served, what its header says, and the URL in the end if redirects led elsewhere."""

    row: int
    image: bytes
    width: int
    height: int
    format: str
    final_url: str | None


@dataclass(frozen=True)
class Failed:
    """No image: a `Reason`, a detail for the reader, and whether another attempt may help."""

    row: int
    reason: str
    detail: str
    retryable: bool


class Fetcher:
    """Fetches lists of URLs under a policy, one at a time; meanwhile the guard is urllib's opener in this process."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._opener = GuardedOpener(policy)
        self._downloader, resizer = _img2dataset()
        self._resizer = resizer(1, "no", resize_only_if_bigger=False, disable_all_reencoding=True)

    def fetch(self, rows: Sequence[int], urls: Sequence[str | None]) -> Iterator[Fetched | Failed]:
        """One result for each URL, in input order; equal URLs are asked for once.

        Args:
            rows: a number for each URL, handed through.
            urls: as found; None and what is no URL give `Failed`.

        Raises LvdError when the downloader itself fails, StorageFullError when the temporary disk is full.
        """
        asked = [_encode(url) for url in urls]
        distinct = list(dict.fromkeys(url for url in asked if isinstance(url, str)))
        with (
            tempfile.TemporaryDirectory(prefix="lvd-fetch-") as folder,
            Spool(folder, self._opener.final_urls, self._opener.stop) as spool,
        ):
            self._fetch_all(distinct, folder, spool)
            for row, url in zip(rows, asked, strict=True):
                outcome = spool.outcomes[url] if isinstance(url, str) else url
                yield _result(row, outcome, spool, self._policy.max_pixels)

    def _fetch_all(self, urls: list[str], folder: str, spool: Spool) -> None:
        """Fetch distinct URLs into the spool; those that failed for a passing reason again, after a while.

        img2dataset's own retries follow at once, and repeat what cannot help.
        """
        for attempt in range(self._policy.retries + 1):
            if not urls:
                return
            if attempt:
                time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
            with storage_errors(tempfile.gettempdir()):
                self._fetch_once(urls, folder, spool)
            urls = [url for url in urls if spool.may_pass(url)]

    def _fetch_once(self, urls: list[str], folder: str, spool: Spool) -> None:
        """One pass of img2dataset's downloader over `urls`; afterwards the spool has an outcome of each."""
        self._opener.stop.clear()
        source = os.path.join(folder, "urls.arrow")
        table = pa.table({"url": urls})
        with pa.ipc.new_file(source, table.schema) as file:
            file.write_table(table)
        with installed(self._opener):
            self._run(self._make_downloader(len(urls), folder, spool), source)
        if spool.error is not None:
            raise spool.error
        missing = [url for url in urls if url not in spool.outcomes]
        if missing:
            raise LvdError(f"img2dataset gave no result for {len(missing)} of {len(urls)} URLs, the first {missing[0]}")

    def _run(self, downloader: Any, source: str) -> None:
        """Run the downloader in a thread, so that an interrupt finds this one free to stop it.

        Interrupted itself, it would wait for ever for a place in the queue that it has ceased to empty.
        """
        with ThreadPoolExecutor(1) as pool:
            try:
                pool.submit(downloader.download_shard, (0, source)).result()
            except BaseException as error:
                self._opener.stop.set()
                if isinstance(error, OSError) or not isinstance(error, Exception):
                    raise
                raise LvdError(f"img2dataset failed: {type(error).__name__}: {error}") from error

    def _make_downloader(self, num_urls: int, folder: str, spool: Spool) -> Any:
        return self._downloader(
            sample_writer_class=lambda *_: spool,
            resizer=self._resizer,
            thread_count=min(self._policy.threads, num_urls),
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=self._policy.timeout,
            number_sample_per_shard=num_urls,
            oom_shard_count=1,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=self._policy.user_agent_token,
            disallowed_header_directives=self._policy.opt_out,
        )


def _img2dataset() -> tuple[Any, Any]:
    """img2dataset's Downloader and Resizer, imported without its request for a newer version and its warnings."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset.downloader import Downloader
        from img2dataset.resizer import Resizer
    return Downloader, Resizer


def _encode(url: str | None) -> str | FetchError:
    try:
        return encode_url(url)
    except FetchError as error:
        return error


def _result(row: int, outcome: Stored | FetchError, spool: Spool, max_pixels: int) -> Fetched | Failed:
    if isinstance(outcome, Stored):
        image = spool.read(outcome)
        try:
            width, height, kind = _examine(image, max_pixels)
        except FetchError as error:
            outcome = error
        else:
            return Fetched(row, image, width, height, kind, outcome.final_url)
    return Failed(row, outcome.reason, outcome.detail, outcome.retryable)


def _examine(image: bytes, max_pixels: int) -> tuple[int, int, str]:
    """Width, height and format as the header states them; no pixel is decoded. Raises FetchError."""
    try:
        width, height, kind = image_size(image)
    except TooManyPixels as error:
        raise FetchError(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UndecodableImage:
        is_markup = image.lstrip()[:1] == b"<"
        raise FetchError(Reason.NOT_AN_IMAGE, "markup" if is_markup else "no known image format") from None
    if width * height > max_pixels:
        raise FetchError(Reason.TOO_MANY_PIXELS, f"{width}x{height}, limit {max_pixels}")
    return width, height, kind
