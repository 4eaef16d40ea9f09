"""Files anywhere: all or nothing, the same names for local directories and object stores, clear errors."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from curation import storage
from curation.errors import ConfigError, LvdError
from curation.storage import AtomicFile, StorageFullError


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-{os.getpid()}"


def test_what_is_written_can_be_read(base: str) -> None:
    uri = storage.join(base, "deep", "er", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two!")
    assert storage.read_bytes(uri) == b"two!"
    assert storage.exists(uri)
    assert storage.names(storage.join(base, "deep", "er")) == ["file.bin"]
    assert storage.names(storage.join(base, "deep")) == ["er"]
    assert storage.names(storage.join(base, "nothing")) == []


def test_a_file_knows_its_hash_and_size(base: str) -> None:
    with AtomicFile(storage.join(base, "file")) as file:
        assert file.write(b"ab") == 2
        assert file.write(memoryview(bytearray(range(6))).cast("h")) == 6
        assert file.tell() == 8
    data = b"ab" + bytes(range(6))
    assert (file.size, file.sha256) == (8, hashlib.sha256(data).hexdigest())
    assert storage.read_bytes(storage.join(base, "file")) == data


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    base = str(tmp_path)
    uri = storage.join(base, "file")
    storage.write_bytes(uri, b"old")
    for name in ("file", "new"):
        file = AtomicFile(storage.join(base, name))
        file.write(b"half")
        file.__exit__(RuntimeError, RuntimeError(), None)
    assert storage.names(base) == ["file"]
    assert storage.read_bytes(uri) == b"old"


def test_a_file_is_not_visible_before_it_is_complete(tmp_path: Path) -> None:
    base = str(tmp_path)
    with AtomicFile(storage.join(base, "file")) as file:
        file.write(b"half")
        visible = [name for name in storage.names(base) if not storage.is_temporary(name)]
        assert visible == []
    assert storage.names(base) == ["file"]


def test_what_a_killed_process_leaves_is_known_as_temporary(tmp_path: Path) -> None:
    file = AtomicFile(str(tmp_path / "part-00000.parquet"))
    (left,) = storage.names(str(tmp_path))
    assert storage.is_temporary(left)
    assert not storage.is_temporary("part-00000.parquet")
    file.discard()


def test_deleting(base: str) -> None:
    for name in ("a/x", "a/b/y", "c"):
        storage.write_bytes(storage.join(base, name), b"1")
    storage.remove_tree(storage.join(base, "a"))
    storage.remove_tree(storage.join(base, "a"))
    storage.remove_file(storage.join(base, "c"))
    storage.remove_file(storage.join(base, "c"))
    assert storage.names(base) == []


def raising(code: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "publish"])
def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    uri = str(tmp_path / "file")
    file = AtomicFile(uri)
    if where == "write":
        monkeypatch.setattr(file, "_target", FailingTarget(file._target, code))
    else:
        monkeypatch.setattr(os, "fsync", raising(code))
    with pytest.raises(StorageFullError, match=f"no space left to write {uri}"), file:
        file.write(b"data")
    assert storage.names(str(tmp_path)) == []


class FailingTarget:
    """An open file that cannot be written to."""

    def __init__(self, target: Any, code: int) -> None:
        self._target, self.write = target, raising(code)

    def close(self) -> None:
        self._target.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_must_not_be_written_is_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "makedirs", raising(code))
    with pytest.raises(ConfigError, match=r"cannot write .*/file") as error:
        storage.write_bytes(str(tmp_path / "file"), b"")
    assert error.value.exit_code == 2


def test_a_directory_below_a_file_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    for below in ("taken/file", "taken/deeper/file"):
        with pytest.raises(ConfigError, match="cannot write"):
            storage.write_bytes(str(tmp_path / below), b"")


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="I/O") as error, storage.storage_errors("x"):
        raise OSError(errno.EIO, "I/O error")
    assert not isinstance(error.value, LvdError)


def test_an_unknown_scheme_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="cannot open nonsense://x"):
        storage.exists("nonsense://x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("memory://not-there-at-all")


@pytest.mark.parametrize(
    "root", ["/data/run", "s3://bucket/run", "memory://run", "file:///data/run", "gs://b/deep/run"]
)
def test_relative_and_resolve_are_inverse(root: str) -> None:
    base = storage.join(root, "filtered", "web")
    for place, seen in {
        storage.join(root, "images", "web"): "../../images/web",
        storage.join(root, "centroids"): "../../centroids",
        storage.join(base, "_keys"): "_keys",
        base: ".",
    }.items():
        assert storage.relative(place, base) == seen
        assert storage.resolve(seen, base) == place


def test_places_in_other_filesystems_stay_as_they_are() -> None:
    for place, base in [("s3://a/x", "/run"), ("/x/y", "s3://a/run"), ("s3://a/x", "memory://run")]:
        assert storage.relative(place, base) == place
        assert storage.resolve(place, base) == place
    assert storage.resolve(storage.relative("s3://a/x", "s3://b/run/y"), "s3://b/run/y") == "s3://a/x"
    assert storage.resolve("/x/y", "/run") == "/x/y"


def test_a_moved_run_finds_its_sets() -> None:
    seen = storage.relative("/old/run/images/web", "/old/run/filtered/web")
    assert storage.resolve(seen, "/new/place/filtered/web") == "/new/place/images/web"


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("run/") == str(tmp_path / "run")
    assert storage.absolute("s3://bucket/run/") == "s3://bucket/run"
    assert storage.is_local(str(tmp_path))
    assert not storage.is_local("memory://x")
