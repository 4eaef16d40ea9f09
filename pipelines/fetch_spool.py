"""Where bodies lie between their arrival, in any order, and their reading, in input order: one temporary file."""

import os
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipelines.fetch_errors import FetchError


@dataclass(frozen=True)
class Stored:
    """A body in the spool, and the URL it came from in the end if redirects led elsewhere."""

    offset: int
    size: int
    final_url: str | None


class Spool:
    """The outcome of each URL: its body in a file, or why there is none. Holds some hundred bytes a URL in memory.

    It takes the place of img2dataset's sample writers, which `write` and `close` belong to.

    Attributes:
        outcomes: by URL; a later outcome takes the place of an earlier one.
        error: what ended the writing of the file, if anything did.
    """

    def __init__(self, folder: str, final_urls: dict[str, str], stop: threading.Event) -> None:
        """
        Args:
            folder: where the file is made.
            final_urls: where URLs led through redirects; taken out as bodies come in.
            stop: set when the file cannot be written, since nothing more need be fetched then.
        """
        self.outcomes: dict[str, Stored | FetchError] = {}
        self.error: OSError | None = None
        self._file = os.open(os.path.join(folder, "bodies"), os.O_RDWR | os.O_CREAT, 0o600)
        self._end = 0
        self._final_urls = final_urls
        self._stop = stop

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Keep one outcome. Errors are kept too, not raised: img2dataset would print and forget them."""
        url, message = meta["url"], meta["error_message"]
        final_url = self._final_urls.pop(url, None)
        if image is None:
            self.outcomes[url] = FetchError.parse(message)
            return
        try:
            self._append(image)
        except OSError as error:
            self.error = self.error or error
            self._stop.set()
            return
        self.outcomes[url] = Stored(self._end - len(image), len(image), final_url)

    def _append(self, image: bytes) -> None:
        rest = memoryview(image)
        while rest:
            rest = rest[os.pwrite(self._file, rest, self._end + len(image) - len(rest)) :]
        self._end += len(image)

    def close(self) -> None:
        """The end of a pass; the file stays open for reading and for further passes."""

    def read(self, stored: Stored) -> bytes:
        """A body, as it was written."""
        return os.pread(self._file, stored.size, stored.offset)

    def may_pass(self, url: str) -> bool:
        """Whether the URL failed for a reason that may be gone at another time."""
        outcome = self.outcomes[url]
        return isinstance(outcome, FetchError) and outcome.retryable
