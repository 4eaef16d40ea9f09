"""Files anywhere fsspec reaches: whole-file reads, all-or-nothing writes, listings and deletions.

Everything the project stores passes through here, so that a local directory and `s3://` behave alike: a file is
either absent or complete under its final name, whenever the process may die.
"""

import errno
import hashlib
import io
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from curation.errors import ConfigError, LvdError


class StorageFullError(LvdError):
    """Nothing more can be written to the place of output."""


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of `uri` and the path inside it. Raises ConfigError for a scheme it does not know."""
    try:
        # Listings must not be cached: other processes write here, and what they have committed must be seen.
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {uri}: {error}") from None
    return fs, path


def is_local(uri: str) -> bool:
    """Whether `uri` is a path on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *names: str) -> str:
    """`uri` extended by path components."""
    return "/".join([uri.rstrip("/"), *names])


def absolute(uri: str) -> str:
    """Local paths made absolute (a Ray worker has a working directory of its own); other URIs as they are."""
    if "://" in uri:
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri))


def relative(uri: str, base: str) -> str:
    """`uri` as seen from the directory `base` where both are in one filesystem, else `uri` itself."""
    scheme, base_scheme = uri.partition("://"), base.partition("://")
    if (scheme[1], scheme[0] if scheme[1] else "") != (base_scheme[1], base_scheme[0] if base_scheme[1] else ""):
        return uri
    path, start = (scheme[2], base_scheme[2]) if scheme[1] else (uri, base)
    return posixpath.relpath("/" + path.lstrip("/"), "/" + start.lstrip("/"))


def resolve(reference: str, base: str) -> str:
    """The inverse of `relative`."""
    if "://" in reference or reference.startswith("/"):
        return reference
    scheme, mark, path = base.partition("://") if "://" in base else ("", "", base)
    joined = posixpath.normpath(posixpath.join("/" + path.lstrip("/"), reference))
    return f"{scheme}{mark}{joined if path.startswith('/') else joined.lstrip('/')}"


def exists(uri: str) -> bool:
    """Whether there is a file or directory at `uri`."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def names(uri: str) -> list[str]:
    """Names directly under the directory `uri`, sorted; empty when there is no such directory."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    try:
        found = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(posixpath.basename(str(name).rstrip("/")) for name in found)


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file still being written, or left by a process that died."""
    return name.startswith(".") and name.endswith(".tmp")


def open_input(uri: str) -> IO[bytes]:
    """`uri` opened for reading. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return fs.open(path, "rb")  # type: ignore[no-any-return]


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    with open_input(uri) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file, all or nothing."""
    with AtomicFile(uri) as file:
        file.write(data)


def remove_file(uri: str) -> None:
    """Delete one file if it is there."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_tree(uri: str, last: str | None = None) -> None:
    """Delete a directory and all in it, if it is there; the file `last` in it goes after all others."""
    fs, path = filesystem(uri)
    if last is not None and (others := [name for name in names(uri) if name != last]):
        fs.rm([posixpath.join(path, name) for name in others], recursive=True)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    fs.invalidate_cache()


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what the system says of an unusable place of output into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"no space left to write {uri}; free some and run again: done parts are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(f"cannot write {uri}: {os.strerror(error.errno)}") from error
        raise


class AtomicFile(io.RawIOBase):
    """A file being written that appears under its name only once complete.

    Locally: a temporary name in the same directory, fsync, rename, fsync of the directory. Elsewhere: one upload,
    which object stores show only when it ends. `sha256` and `size` are of what has been written.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri
        self.size = 0
        self._hash = hashlib.sha256()
        self._fs, self._path = filesystem(uri)
        self._local = isinstance(self._fs, LocalFileSystem)
        with storage_errors(uri):
            self._open()

    def _open(self) -> None:
        directory, name = posixpath.split(self._path)
        self._target: Any
        if self._local:
            os.makedirs(directory, exist_ok=True)
            self._temporary = posixpath.join(directory, f".{name}.{uuid.uuid4().hex}.tmp")
            self._target = open(self._temporary, "wb")  # noqa: SIM115 - closed by __exit__
        else:
            self._target = self._fs.open(self._path, "wb")

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the bytes written so far."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with storage_errors(self.uri):
            self._target.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def publish(self) -> None:
        """Make the file visible under its name."""
        with storage_errors(self.uri):
            if not self._local:
                self._target.close()
                return
            self._target.flush()
            os.fsync(self._target.fileno())
            self._target.close()
            os.replace(self._temporary, self._path)
            _sync_directory(posixpath.dirname(self._path))

    def discard(self) -> None:
        """Drop what was written."""
        if self._local:
            with suppress(OSError):  # what is left cannot be written to a full disk, nor need it be
                self._target.close()
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)
        elif hasattr(self._target, "discard"):
            self._target.discard()
            self._target.closed = True  # else it would try to upload what is left when it is collected

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.publish()
        except BaseException:
            self.discard()
            raise


def _sync_directory(path: str) -> None:
    handle = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
