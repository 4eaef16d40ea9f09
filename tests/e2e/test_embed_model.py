"""The embed stage with a vision transformer, by the real command: compiled, killed, resumed, and hostile images."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from world import commits, digests, draw, lvd, start, write_images

from tests.builders import rows_of

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
EMBED = ("embed", "work/images/web", "--filtered", "work/filtered/web", "--batch-size", "4")
HOSTILE = [
    b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'></svg>",
    b"<!doctype html><title>not an image</title>",
    draw(0, 0)[:400],
]


def odd(kind: str, image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and images fetched and filtered: photographs, odd formats, and what is no image."""
    import torch

    from embedders.checkpoints import save_vit
    from embedders.dinov2 import standard_preprocessing
    from embedders.vit import VARIANTS, VisionTransformer

    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    save_vit(
        VisionTransformer(VARIANTS["test"], layer_scale=1.0), folder / "model.safetensors", standard_preprocessing(56)
    )
    grey = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    picture = Image.open(io.BytesIO(draw(1, 1)))
    images = [draw(n % 6, n) for n in range(80)]
    images += [odd("PNG", grey), odd("GIF", picture), odd("JPEG", picture.convert("CMYK")), odd("WEBP", picture)]
    write_images(folder / "web.parquet", [(data, 0) for data in images + HOSTILE])
    options = ("--images", "web.parquet", "--source", "web", "--rows-per-part", "9", "--out", "work", "--local")
    lvd("download", *options, cwd=folder)
    lvd("filter", "work/images/web", "--out", "work/filtered/web", "--index", "work/index/web", "--local", cwd=folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_by_two_workers_or_in_one_process_the_bytes_are_the_same(place: Path) -> None:
    model = ("--model", "vit:model.safetensors")
    lvd(*EMBED, *model, "--out", "two", "--workers", "2", cwd=place, timeout=300)
    lvd(*EMBED, *model, "--out", "one", "--local", cwd=place, timeout=300)
    assert digests(str(place / "two")) == digests(str(place / "one"))
    config = _manifest(place / "two")["config"]
    assert config["compiled"] and config["threads"] == 1
    lvd(*EMBED, *model, "--out", "plain", "--local", "--no-compile", "--precision", "float32", cwd=place)
    compiled, plain = (_vectors(place / name) for name in ("two", "plain"))
    assert compiled.shape == plain.shape == (84, 32)
    assert np.sum(compiled * plain, axis=1).min() > 0.999
    sets = ("one", "--images", "work/images/web", "--reference", "plain", "--threshold", "0.9")
    refused = lvd("dedup", *sets, "--reference-threshold", "0.9", "--out", "d", cwd=place, code=2)
    precision = "" if config["precision"] == "float32" else f", precision {config['precision']}"
    assert f"compiled True{precision}" in refused.stderr and "compiled False" in refused.stderr
    assert "were not made by one model in one way" in refused.stderr


def test_what_is_no_image_is_a_reject_with_a_reason(place: Path) -> None:
    sets = [place / "work" / kind / "web" for kind in ("images", "filtered")]
    reasons = {
        name: sum((_manifest(s)["reasons"].get(name, 0) for s in sets), 0) for name in _manifest(sets[0])["reasons"]
    }
    verdicts = [row["reason"] for row in rows_of(sets[1]) if not row["kept"]]
    assert sum(reasons.values()) + len(verdicts) == len(HOSTILE)


def _manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def _vectors(folder: Path) -> np.ndarray:
    return np.array([row["embedding"] for row in rows_of(folder)], dtype=np.float64)


@pytest.mark.timeout(300)
def test_a_killed_embedding_resumes_to_the_same_bytes(place: Path) -> None:
    command = (*EMBED, "--model", "vit:model.safetensors", "--no-compile", "--workers", "2", "--out")
    lvd(*command, "whole", cwd=place)
    process = start(*command, "killed", cwd=place)
    deadline = time.monotonic() + 60
    while len(commits(place / "killed")) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (place / "killed" / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in commits(place / "killed")}
    lvd(*command, "killed", cwd=place)
    after = {path.name: path.stat().st_mtime_ns for path in commits(place / "killed")}
    assert {name: after[name] for name in before} == before
    assert digests(str(place / "killed")) == digests(str(place / "whole"))
