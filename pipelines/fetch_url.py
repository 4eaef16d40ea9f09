"""URLs as they are found on the web, made into URLs that can be asked for, or refused."""

import string
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from pipelines.fetch_errors import FetchError, Reason

SCHEMES = ("http", "https")
_PATH = "%!$&'()*+,;=:@/"
_QUERY = _PATH + "?[]"


def encode_url(url: str | None) -> str:
    """The URL in ASCII: host in IDNA, path and query percent-encoded, no fragment. Encoding twice changes nothing.

    Raises FetchError: `scheme` for anything but http and https, `bad_url` for what is no URL or carries credentials.
    """
    text = (url or "").strip()
    if not text:
        raise FetchError(Reason.BAD_URL, "no URL")
    if any(c < " " or c == "\x7f" for c in text):
        raise FetchError(Reason.BAD_URL, "control character")
    try:
        return _encode(text)
    except ValueError:
        raise FetchError(Reason.BAD_URL, "invalid host, port or path") from None


def _encode(text: str) -> str:
    """`encode_url` of one line of text; raises ValueError where parsing or encoding fails."""
    parts = urlsplit(text)
    if not parts.scheme:
        raise FetchError(Reason.BAD_URL, "no scheme")
    if parts.scheme not in SCHEMES:
        raise FetchError(Reason.SCHEME, f"{parts.scheme[:20]}: is not fetched")
    if not parts.hostname:
        raise FetchError(Reason.BAD_URL, "no host")
    if "@" in parts.netloc:
        raise FetchError(Reason.BAD_URL, "credentials in the URL")
    host = parts.hostname.encode("idna").decode("ascii")
    if set(host) - set(string.ascii_letters + string.digits + "-._:"):
        raise ValueError("host")
    host = f"[{host}]" if ":" in host else host
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, netloc, quote(parts.path, _PATH) or "/", quote(parts.query, _QUERY), ""))


def redirect_url(base: str, location: str) -> str:
    """Where a `Location` header leads. Raises FetchError as `encode_url` does.

    http.client reads headers as Latin-1, so bytes outside ASCII (mostly UTF-8) are percent-encoded as they came.
    """
    try:
        target = urljoin(base, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
    except ValueError:
        raise FetchError(Reason.BAD_URL, "redirect: invalid location") from None
    try:
        return encode_url(target)
    except FetchError as error:
        raise FetchError(error.reason, f"redirect: {error.detail}") from None
