"""Bad input and bad circumstances: one line that says what is wrong, the right exit code, and no traceback."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world import World, call, digests, finished, lvd, start

from curation import faiss_setup, storage

Failing = Callable[..., str]


@pytest.fixture
def failing(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Failing:
    """Runs the command in the world's directory; it must fail with this code. Returns the one line that it tells."""
    monkeypatch.chdir(world.place)

    def run(*arguments: str, code: int = 2) -> str:
        capfd.readouterr()
        assert call(monkeypatch, *arguments) == code
        told = capfd.readouterr()
        return error_line(told.err)

    return run


def error_line(told: str) -> str:
    """The last line on standard error, which must be the only one of an error."""
    lines = told.strip().splitlines()
    assert "Traceback" not in told
    assert lines[-1].startswith("error: "), told
    assert all(": " in line and not line.startswith((" ", "error")) for line in lines[:-1]), told
    return lines[-1]


def download(place: str, *more: str, kind: str = "--images") -> tuple[str, ...]:
    """Arguments that take images from a place."""
    return ("download", kind, place, "--source", "some", "--local", *more)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "missing.yaml", "--out", "x", "--local"), "missing.yaml does not exist"),
        (("run", "recipe.yaml", "--out", "x", "--local", "--set", "sources.web.urls=no.csv"), "no.csv does not exist"),
        (("plan", "lvd124m"), "no recipe 'lvd124m'"),
        (download("no.parquet", "--out", "x"), "no.parquet does not exist"),
        (download("no-folder", "--out", "x", kind="--folder"), "no-folder does not exist"),
        (download("no/*.parquet", "--out", "x"), "no/*.parquet does not exist"),
        (("stats", "no-run"), "no-run"),
        (("verify", "no-run", "--local"), "no-run"),
        (("sql", "no-run", "SELECT 1"), "no-run"),
        (("show", "no-run", "0" * 32), "no-run"),
    ],
)
def test_what_is_missing_is_named(failing: Failing, arguments: tuple[str, ...], told: str) -> None:
    assert told in failing(*arguments)


def test_a_wrong_column_is_told_with_what_was_meant(failing: Failing, tmp_path: Path) -> None:
    line = failing(*download("birds.parquet", "--image-column", "imagee", "--out", str(tmp_path)))
    assert "no column 'imagee' (did you mean image?); it has image, label" in line
    line = failing(*download("urls.csv", "--url-column", "link", "--out", str(tmp_path), kind="--urls"))
    assert "no column 'link'; it has url, label" in line
    line = failing(*download("birds.parquet", "--label-column", "labels", "--out", str(tmp_path)))
    assert "did you mean label?" in line


def test_a_corrupt_file_is_named(world: World, failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1" + b"\0" * 300)
    assert "garbage.parquet is not a readable Parquet file" in failing(
        *download(str(tmp_path / "garbage.parquet"), "--out", str(tmp_path / "a"))
    )
    damaged = bytearray((world.place / "birds.parquet").read_bytes())
    damaged[200 : len(damaged) // 2] = bytes(len(damaged) // 2 - 200)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    assert "damaged.parquet" in failing(
        *download(str(tmp_path / "damaged.parquet"), "--out", str(tmp_path / "b")), code=2
    )


def test_an_empty_input_is_refused(failing: Failing, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    (tmp_path / "empty.csv").write_text("url\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    out = ("--out", str(tmp_path / "out"))
    assert "empty.parquet: no rows" in failing(*download(str(tmp_path / "empty.parquet"), *out))
    assert "empty.csv: no rows" in failing(*download(str(tmp_path / "empty.csv"), *out, kind="--urls"))
    assert "empty.txt: no rows" in failing(*download(str(tmp_path / "empty.txt"), *out, kind="--urls"))
    assert "holds no image files" in failing(*download(str(tmp_path / "folder"), *out, kind="--folder"))


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("dedup.treshold=0.9", "unknown key dedup.treshold (did you mean threshold?)"),
        ("sources.web.rolle=pool", "unknown key sources.web.rolle (did you mean role?)"),
        ("parts.0.as_it=birds", "unknown key parts.0.as_it (did you mean as_is?)"),
        ("parts.0.as_is=bird", "no source 'bird' (did you mean birds?)"),
        ("dedup.threshold=high", "dedup.threshold"),
        ("dedup.threshold=1.5", "dedup.threshold"),
        ("dedup.threshold", "expected key=value"),
    ],
)
def test_a_misspelt_key_is_told_with_what_was_meant(
    failing: Failing, tmp_path: Path, assignment: str, told: str
) -> None:
    assert told in failing("run", "recipe.yaml", "--out", str(tmp_path), "--local", "--set", assignment)


@pytest.mark.parametrize("model", ["hf:no-such-folder/model", "torchscript:no-such-weights.pt", "dino"])
def test_missing_weights_are_named(
    world: World, reference: dict[str, str], failing: Failing, tmp_path: Path, model: str
) -> None:
    sets = ("reference/images/bench", "--filtered", "reference/filtered/bench", "--out", str(tmp_path / "x"))
    assert model.partition(":")[2] in failing("embed", *sets, "--model", model, "--local")


def test_options_that_exclude_each_other(failing: Failing, tmp_path: Path) -> None:
    run = ("run", "recipe.yaml", "--out", str(tmp_path))
    assert "no such stage" in failing(*run, "--from", "dedupe", "--local")
    assert "--local" in failing(*run, "--local", "--workers", "2")
    assert "--workers 0" in failing(*run, "--workers", "0")


def test_an_unwritable_output(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    line = failing("run", "recipe.yaml", "--out", str(tmp_path / "file" / "run"), "--local")
    assert f"cannot write {tmp_path}/file/run" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in failing("run", "recipe.yaml", "--out", str(tmp_path / "other"), "--local")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


class Disk:
    """A small place of output that something else fills: a file system of its own where mounting is allowed, else
    writes that fail as they would on one."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
        self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        self._patch = monkeypatch

    def fill(self, left: int) -> None:
        """Leave so many bytes."""
        if self.mounted:
            free = shutil.disk_usage(self.place).free
            (self.place / "filler").write_bytes(bytes(free - left))
            return
        write, written = storage.AtomicFile.write, [0]

        def limited(file: storage.AtomicFile, data: bytes) -> int:
            written[0] += memoryview(data).nbytes
            with storage.storage_errors(file.uri):
                if written[0] > left:
                    raise OSError(errno.ENOSPC, "full")
            return write(file, data)

        self._patch.setattr(storage.AtomicFile, "write", limited)

    def free(self) -> None:
        """Make room again."""
        if self.mounted:
            (self.place / "filler").unlink()
        else:
            self._patch.undo()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", monkeypatch)
    yield made
    if made.mounted:
        subprocess.run(["umount", str(made.place)], check=True)


@pytest.mark.parametrize("left", [20_000, 300_000, 900_000])
def test_a_full_disk_stops_the_run_which_then_resumes(
    world: World,
    reference: dict[str, str],
    disk: Disk,
    capfd: pytest.CaptureFixture[str],
    left: int,
) -> None:
    disk.fill(left)
    command = ("run", str(world.recipe), "--out", str(disk.place / "run"), "--local")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *command) in (1, 3)
    line = error_line(capfd.readouterr().err)
    assert "no space left" in line
    before = finished(disk.place / "run")
    disk.free()
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, *command) == 0
    after = finished(disk.place / "run")
    assert {name: after[name] for name in before if name in after}.items() <= before.items()
    assert digests(str(disk.place / "run")) == reference


@pytest.mark.timeout(120)
def test_an_unreachable_cluster(world: World, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = ("run", "recipe.yaml", "--out", str(tmp_path / "run"), "--address", address)
    done = lvd(*command, cwd=world.place, code=2, timeout=60)
    assert f"no Ray cluster answers at {address}" in error_line(done.stderr)


def test_both_builds_of_faiss_or_none(
    world: World, reference: dict[str, str], failing: Failing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sets = ("reference/embeddings/default/web", "--images", "reference/images/web", "--threshold", "0.9")
    command = ("dedup", *sets, "--engine", "faiss", "--out", str(tmp_path / "duplicates"), "--local")
    for name in ("faiss_cpu", "faiss_gpu"):
        (tmp_path / f"{name}-1.12.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.12.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.12.0\n")
    monkeypatch.setattr(faiss_setup, "_import_faiss", faiss_setup._import_faiss.__wrapped__)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert "faiss-cpu and faiss-gpu are both installed" in failing(*command)

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert "FAISS is not installed" in failing(*command)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("where", [("--local",), ("--workers", "2")])
def test_an_interrupt_ends_the_run_which_then_resumes(
    world: World, reference: dict[str, str], tmp_path: Path, where: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    command = ("run", "recipe.yaml", "--out", str(run))
    process = start(*command, *where, cwd=world.place)
    while len(finished(run)) < 25:
        assert process.poll() is None
        time.sleep(0.01)
    before = finished(run)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    lvd(*command, "--local", cwd=world.place)
    after = finished(run)
    assert {name: after.get(name) for name in before} == before
    assert digests(str(run)) == reference
