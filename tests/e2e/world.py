"""What the end-to-end tests use: the real command, a small world of generated images, and looking at runs."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from curation import storage

ROOT = Path(__file__).resolve().parents[2]
LVD = (sys.executable, "-m", "cli.main")
RAY_FOLDER = tempfile.mkdtemp(prefix="lvd-e2e-")
"""Ray's sessions of these tests, apart from those of anyone else; short, since paths of sockets must be."""
REPLY_SECONDS = 0.02
"""How long the loopback server takes to answer, so that a run lasts long enough to be interrupted."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of the command: this checkout importable, Ray on this machine only and without tokens."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    own = {"PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
    own["RAY_TMPDIR"] = RAY_FOLDER
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "LVD_DEBUG")}
    return {**kept, **own, **extra}


def start(*arguments: str, cwd: Path, **extra: str) -> "subprocess.Popen[str]":
    """The command, begun in a process group of its own."""
    return subprocess.Popen(
        [*LVD, *arguments],
        cwd=cwd,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def lvd(
    *arguments: str, cwd: Path, code: int | None = 0, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """The command, run to its end, which must be with that exit code."""
    done = subprocess.run(
        [*LVD, *arguments], cwd=cwd, env=environment(**extra), text=True, capture_output=True, timeout=timeout
    )
    told = f"lvd {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    assert code is None or done.returncode == code, f"exit code {done.returncode}, not {code}: {told}"
    return done


def draw(concept: int, number: int, quality: int = 85, side: int = 64) -> bytes:
    """A JPEG: a smooth pattern of its concept, bent and coloured by its number. The same for the same numbers."""
    rng = np.random.default_rng([concept, number])
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.random.default_rng(concept).uniform(2, 9, (3, 2)) + rng.uniform(-0.8, 0.8, (3, 2))
    phases = rng.uniform(0, 6, 3)
    planes = [np.sin(w[0] * x + w[1] * y + p) for w, p in zip(waves, phases, strict=True)]
    pixels = np.stack(planes, axis=2) * 90 + 128 + rng.normal(0, 6, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_images(path: Path, images: list[tuple[bytes, int]]) -> None:
    """A Parquet file with the columns image and label."""
    pq.write_table(pa.table({"image": [i for i, _ in images], "label": [label for _, label in images]}), path)


def write_folder(folder: Path, images: list[tuple[bytes, int]]) -> None:
    """A folder with one directory a label."""
    for number, (data, label) in enumerate(images):
        place = folder / f"concept-{label}" / f"{number:03}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


class ImageHandler(BaseHTTPRequestHandler):
    """Answers /NUMBER.jpg from the server's images, slowly; every 13th is not there, every 17th a page."""

    server: Any

    def do_GET(self) -> None:
        time.sleep(REPLY_SECONDS)
        number = int(self.path.strip("/").removesuffix(".jpg"))
        self.server.asked.append(number)
        status, body = 200, self.server.images[number]
        if number % 13 == 5:
            status, body = 404, b""
        elif number % 17 == 3:
            body = b"<html>no image</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


def web_images(count: int) -> list[tuple[bytes, int]]:
    """Images of six concepts with a long tail; among them byte copies and recompressed copies."""
    made: list[tuple[bytes, int]] = []
    for number in range(count):
        concept = int(6 * (number * 0.618 % 1) ** 2)
        if number % 11 == 10:
            made.append(made[number - 3])
        elif number % 7 == 6:
            made.append((draw(made[number - 5][1], number - 5, quality=60), made[number - 5][1]))
        else:
            made.append((draw(concept, number), concept))
    return made


RECIPE: dict[str, Any] = {
    "seed": 7,
    "rows_per_part": 8,
    "sources": {
        "web": {"role": "pool", "urls": "urls.csv", "label_column": "label"},
        "extra": {"role": "pool", "folder": "extra"},
        "birds": {"role": "query", "images": "birds.parquet", "label_column": "label"},
        "bench": {"role": "reference", "images": "bench.parquet"},
    },
    "download": {"allow_private": True, "retries": 0, "threads": 4},
    "filter": {"min_side": 32},
    "dedup": {"threshold": 0.97, "reference_threshold": 0.98},
    "cluster": {"num_clusters": 6, "iterations": 5},
    "parts": [
        {"as_is": "birds"},
        {"retrieved": "birds", "mode": "sample", "k": 3},
        {"retrieved": "birds", "mode": "cluster", "images_per_cluster": 4, "min_hits": 2, "cap": 20},
        {"balanced": "pool", "target": 140, "max_copies": 2},
    ],
    "shard": {"shard_bytes": 20_000, "max_fan_out": 4},
}
"""Every kind of source and of part; so many shards that shuffling takes two levels."""


TRAINING: dict[str, Any] = {
    "model": {"variant": "test"},
    "crops": {"global_size": 56, "local_size": 28, "local_crops": 2},
    "heads": {"prototypes": 24, "hidden": 16, "bottleneck": 8},
    "loss": {"teacher_temperature_warmup": 0.3},
    "schedule": {"steps": 30, "warmup": 0.1, "freeze_last_layer": 1},
    "precision": "float32",
    "batch_size": 4,
    "data": {"workers": 1},
    "log_every": 1,
}
"""Settings of a tiny network, trained in seconds."""


@dataclass
class World:
    """Inputs in a directory, and the server that the URLs lead to."""

    place: Path
    server: Any

    @property
    def recipe(self) -> Path:
        return self.place / "recipe.yaml"

    def write_recipe(self, name: str, **changes: Any) -> Path:
        """The recipe with some keys changed, under another name beside it."""
        path = self.place / name
        path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
        return path


def digests(run: str) -> dict[str, str]:
    """SHA-256 of every part and rejects file of a run, by its place in the run."""
    fs, path = storage.filesystem(run)
    fs.invalidate_cache()
    parts = [name for name in fs.find(path) if name.endswith(".parquet")]
    return {name.removeprefix(path): hashlib.sha256(fs.cat_file(name)).hexdigest() for name in sorted(parts)}


def contents(run: Path) -> dict[str, str]:
    """`content` of every complete set of a local run, by name."""
    manifests = {str(p.parent.relative_to(run)): json.loads(p.read_text()) for p in run.rglob("manifest.json")}
    return {name: manifest["content"] for name, manifest in manifests.items()}


Finished = dict[str, tuple[int, int, bytes]]


def commits(run: Path) -> list[Path]:
    """The commits below a local run. os.walk, unlike rglob, bears with directories that are deleted meanwhile."""
    places = [Path(place) for place, _, _ in os.walk(run) if place.endswith("_commits")]
    return [place / name for place in places for _, _, names in os.walk(place) for name in names if name[0] != "."]


def finished(run: Path) -> Finished:
    """Finished parts of a local run: inode, time and bytes of each commit; any repetition changes the first two."""
    found: Finished = {}
    for commit in commits(run):
        try:
            stat = commit.stat()
            found[str(commit.relative_to(run))] = (stat.st_ino, stat.st_mtime_ns, commit.read_bytes())
        except FileNotFoundError:  # a working set that is being deleted
            continue
    return found


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit code, run in this process, for tests that need many and look at what they leave."""
    from cli.main import main

    monkeypatch.setattr(sys, "argv", ["lvd", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
