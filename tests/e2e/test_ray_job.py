"""A Ray cluster of two nodes, begun here, and the command submitted to it as jobs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from world import RAY_FOLDER, ROOT, TRAINING, World, digests, environment, lvd

RAY = (sys.executable, "-m", "ray.scripts.scripts")
STORE = ("--object-store-memory", "80000000")


def free_ports(count: int) -> list[str]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def job_environment() -> dict[str, str]:
    """As `environment`, but the code must come with the job."""
    values = environment()
    values["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    return values


def start_node(*options: str) -> "subprocess.Popen[bytes]":
    """`ray start`, in a process group of its own that lives as long as the node."""
    command = [*RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", *STORE, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=RAY_FOLDER, env=job_environment(), start_new_session=True, **quiet)


def stop_node(node: "subprocess.Popen[bytes]") -> None:
    """End a node and all that it started."""
    children = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    node.send_signal(signal.SIGTERM)
    try:
        node.wait(20)
    except subprocess.TimeoutExpired:
        node.kill()
    for child in children:
        if child.is_running():
            child.kill()


def read(url: str) -> Any:
    """JSON from the cluster's dashboard, None while it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)
    except (OSError, ValueError):
        return None


@dataclass
class Cluster:
    """Where the cluster is spoken to."""

    dashboard: str
    address: str

    def submit(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of the command from this checkout, until it ends."""
        place = ("--address", self.dashboard, "--submission-id", name, "--working-dir", str(ROOT))
        entry = ("--", sys.executable, "-m", "cli.main", *arguments)
        command = [*RAY, "job", "submit", *place, *entry]
        return subprocess.run(
            command, cwd=RAY_FOLDER, env=job_environment(), text=True, capture_output=True, timeout=200
        )

    def exit_code(self, name: str) -> int:
        """With what the submitted command itself ended."""
        return int(read(f"{self.dashboard}/api/jobs/{name}")["driver_exit_code"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and one more node."""
    port, dashboard, client, *agents = free_ports(5)
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += [f"--ray-client-server-port={client}", f"--temp-dir={RAY_FOLDER}/ray"]
    where = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    nodes = [start_node(*head, f"--dashboard-agent-listen-port={agents[0]}")]
    try:
        wait_for_nodes(where, nodes, 1)
        own = [f"--temp-dir={RAY_FOLDER}/second", f"--dashboard-agent-listen-port={agents[1]}"]
        nodes.append(start_node(f"--address={where.address}", *own))
        wait_for_nodes(where, nodes, 2)
        yield where
    finally:
        for node in reversed(nodes):
            stop_node(node)


def wait_for_nodes(where: Cluster, nodes: list["subprocess.Popen[bytes]"], count: int) -> None:
    """Until the cluster counts so many nodes."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert all(node.poll() is None for node in nodes), "a node did not start"
        told = read(f"{where.dashboard}/nodes?view=summary")
        if told and len(told["data"]["summary"]) == count:
            return
        time.sleep(0.5)
    raise AssertionError(f"the cluster does not come to {count} nodes")


def test_a_job_runs_the_recipe_on_the_cluster(
    world: World, reference: dict[str, str], cluster: Cluster, tmp_path: Any
) -> None:
    done = cluster.submit("good", "run", str(world.recipe), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert cluster.exit_code("good") == 0
    assert digests(str(tmp_path)) == reference
    lvd("verify", str(tmp_path), "--local", cwd=tmp_path)


def test_a_failing_job_hands_its_exit_code_through(world: World, cluster: Cluster, tmp_path: Any) -> None:
    wrong = ("--set", "dedup.treshold=0.9")
    done = cluster.submit("bad", "run", str(world.recipe), "--out", str(tmp_path / "run"), *wrong)
    assert done.returncode != 0
    assert "error: " in done.stdout
    assert "did you mean threshold" in done.stdout
    assert cluster.exit_code("bad") == 2


def test_without_an_address_the_command_stays_off_a_running_cluster(
    world: World, reference: dict[str, str], cluster: Cluster, tmp_path: Any
) -> None:
    done = lvd("verify", str(world.place / "reference"), "--workers", "1", cwd=tmp_path)
    assert "all sets are whole" in done.stdout


def test_a_job_trains_on_both_nodes(world: World, cluster: Cluster, tmp_path: Path) -> None:
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump({**TRAINING, "data": {"workers": 0}}))
    images = ("--images", str(world.place / "birds.parquet"))
    net = str(tmp_path / "net")
    steps = ("--set", "schedule.steps=3")
    done = cluster.submit("train", "train", str(settings), *images, "--out", net, *steps, "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cluster.exit_code("train") == 0
    assert "3 steps, 24 images" in done.stdout
    assert (tmp_path / "net/model.safetensors").is_file()
    done = cluster.submit("crowded", "train", str(settings), *images, "--out", net + "2", "--workers", "3")
    assert "3 ranks need a core each, but the cluster has 2; lower --workers" in done.stdout
    assert cluster.exit_code("crowded") == 2
