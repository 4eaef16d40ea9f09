"""Runs that are killed at random moments and run again: the same bytes, and no finished part made twice."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from moto.server import ThreadedMotoServer
from world import Finished, World, commits, digests, finished, lvd, start

KILLS = ["driver"] * 3 + ["worker"] * 4 + ["node"] * 3
MOMENTS_SEED = 20231
PATIENCE_SECONDS = 240

Process = subprocess.Popen[str]


def kept_commits(run: Path) -> int:
    """Finished parts of the sets that stay; names of working sets, which come and go, begin with `_`."""
    return sum(1 for commit in commits(run) if not is_working(commit))


def is_working(commit: Path) -> bool:
    """Whether a commit is of a working set."""
    return commit.parent.parent.name.startswith("_")


def wait_for(run: Path, count: int, process: Process) -> None:
    """Wait until so many parts are finished; the command must not end before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while kept_commits(run) < count:
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no progress to {count} parts"
        time.sleep(0.02)


def descendants(driver: int) -> list[tuple[str, psutil.Process]]:
    """The driver's Ray processes with their names, sorted by id."""
    found = []
    for process in sorted(psutil.Process(driver).children(recursive=True), key=lambda p: p.pid):
        try:
            found.append((process.name(), process))
        except psutil.NoSuchProcess:
            continue
    return found


def kill(kind: str, process: Process, rng: random.Random) -> list[psutil.Process]:
    """Kill -9 the driver, one of Ray's workers or its node, as soon as there is one; returns Ray's processes."""
    prefix = {"node": "raylet", "worker": "ray::_", "driver": ""}[kind]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1]}"
        alive = descendants(process.pid)
        victims = [child.pid for name, child in alive if name.startswith(prefix)]
        if victims:
            os.kill(process.pid if kind == "driver" else rng.choice(victims), signal.SIGKILL)
            return [child for _, child in alive]
        time.sleep(0.002)
    raise AssertionError(f"no {kind} to kill")


def assert_not_repeated(before: Finished, after: Finished) -> None:
    """What was finished is there as it was; working sets may have been deleted since."""
    for name, commit in before.items():
        assert name in after or is_working(Path(name)), f"{name} has vanished"
        assert after.get(name, commit) == commit, f"{name} was made again"


@pytest.fixture
def ray_processes() -> Iterator[set[psutil.Process]]:
    """Processes to be gone at the end of a test; what is left is killed."""
    seen: set[psutil.Process] = set()
    yield seen
    for process in seen:
        if process.is_running():
            process.kill()


@pytest.mark.timeout(900)
def test_killed_runs_resume_to_the_same_bytes(
    world: World, reference: dict[str, str], ray_processes: set[psutil.Process], tmp_path: Path
) -> None:
    rng = random.Random(MOMENTS_SEED)
    run = tmp_path / "run"
    command = ("run", "recipe.yaml", "--out", str(run), "--workers", "2")
    total = kept_commits(world.place / "reference")
    kinds = rng.sample(KILLS, len(KILLS))
    moments = sorted(rng.sample(range(1, total - 6), len(kinds)))
    print(f"seed {MOMENTS_SEED}: {list(zip(kinds, moments, strict=True))} of {total} parts")
    process = start(*command, cwd=world.place)
    for kind, moment in zip(kinds, moments, strict=True):
        wait_for(run, moment, process)
        time.sleep(rng.uniform(0, 0.05))
        before = finished(run)
        ray_processes.update(kill(kind, process, rng))
        if kind != "worker":
            process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode != 0
            process = start(*command, cwd=world.place)
        wait_for(run, len([name for name in before if not is_working(Path(name))]) + 1, process)
        assert_not_repeated(before, finished(run))
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert_not_repeated(before, finished(run))
    assert digests(str(run)) == reference
    lvd("verify", str(run), "--local", cwd=tmp_path)
    _, alive = psutil.wait_procs(ray_processes, timeout=60)
    assert not alive, f"{alive} outlived the drivers"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system over an object store on loopback, which the environment of this test leads to."""
    import s3fs

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in {**credentials, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(endpoint_url=endpoint, key="test", secret="test", use_listings_cache=False)
    fs.mkdir("curated")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def stored_commits(fs: Any) -> dict[str, Any]:
    """Entity tag and time of each commit in the bucket, but for those of working sets."""
    found = fs.find("curated/run", detail=True)
    commits = {name: [info["ETag"], info["LastModified"]] for name, info in found.items() if "/_commits/" in name}
    return {name: commit for name, commit in commits.items() if not is_working(Path(name))}


@pytest.mark.timeout(900)
def test_a_killed_run_on_an_object_store_resumes_to_the_local_bytes(
    world: World, bucket: Any, ray_processes: set[psutil.Process], tmp_path: Path
) -> None:
    rng = random.Random(MOMENTS_SEED)
    run = ("run", "recipe.yaml", "--set", "rows_per_part=32", "--out")
    lvd(*run, str(tmp_path / "run"), "--local", cwd=world.place)
    command = (*run, "s3://curated/run", "--workers", "2")
    moment = rng.randrange(10, kept_commits(tmp_path / "run") - 10)
    print(f"seed {MOMENTS_SEED}: killed after {moment} parts")
    process = start(*command, cwd=world.place)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(before := stored_commits(bucket)) < moment:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no progress to {moment} parts"
        time.sleep(0.5)  # the store is in this process: to ask it all the time would keep it from answering
    ray_processes.update(kill("driver", process, rng))
    process.communicate(timeout=PATIENCE_SECONDS)
    lvd(*command, cwd=world.place, timeout=480)
    after = stored_commits(bucket)
    assert {name: after[name] for name in before} == before
    assert digests("s3://curated/run") == digests(str(tmp_path / "run"))
    lvd("verify", "s3://curated/run", "--local", cwd=world.place)
