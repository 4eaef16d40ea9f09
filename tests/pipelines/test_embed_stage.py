"""The embed stage with a model of our own: the kept images in order, in batches of one shape."""

import hashlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import schemas
from curation.errors import ConfigError, PartialError
from curation.shards import ShardSet
from embedders.base import EmbedderError, Runtime
from embedders.images import UndecodableImage
from pipelines import embed
from pipelines.embed import EmbedUnit, open_embedder
from pipelines.executor import Needs
from pipelines.recipe import EmbedderSettings
from tests.builders import cut, execute, fingerprints, image_table, rejects_of, rows_of, table, write_set


class HashModel:
    """A vector of 4 numbers from the hash of an image's bytes; images that begin with `bad` cannot be decoded."""

    name, dim, fingerprint, fixed_shape = "hash", 4, "print", True
    copy_thresholds = SimpleNamespace(self_dedup=0.9, reference=0.8)
    details: dict[str, object] = {"weights": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.scale = 1.0

    def preprocess(self, data: bytes) -> np.ndarray:
        if data.startswith(b"bad"):
            raise UndecodableImage("will not do")
        return np.frombuffer(hashlib.sha256(data).digest()[:4], np.uint8).astype(np.float32)

    def upload(self, batch: np.ndarray) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        return batch

    def embed(self, batch: np.ndarray) -> np.ndarray:
        self.shapes.append(batch.shape)
        return (batch * self.scale).astype(np.float16)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HashModel:
    model = HashModel()
    monkeypatch.setattr(embed, "load_embedder", lambda spec, runtime: model)
    monkeypatch.setattr(embed, "resolve_runtime", lambda *args: Runtime())
    return model


def write_inputs(tmp_path: Path, seed: int) -> tuple[list[list[bytes]], list[list[bool]]]:
    rng = np.random.default_rng(seed)
    data = [(b"bad " if i % 7 == 3 else b"good ") + str(i).encode() for i in range(50)]
    parts = cut(data, sorted(rng.integers(0, 50, 4).tolist()))
    kept = [[bool(rng.random() < 0.7) for _ in part] for part in parts]
    tables = [image_table(part) for part in parts]
    write_set(tmp_path / "images/web", "images", tables, source="web", role="pool")
    verdicts = [
        table(schemas.FILTERED, row=t["row"].to_pylist(), image_id=t["image_id"].to_pylist(), kept=k)
        for t, k in zip(tables, kept, strict=True)
    ]
    write_set(tmp_path / "filtered/web", "filtered", verdicts, source="web", role="pool")
    return parts, kept


def embed_unit(tmp_path: Path, batch_size: int | None = 8, out: str = "out", **settings: Any) -> EmbedUnit:
    settings = {"model": "hash", "batch_size": batch_size, "device": "cpu", "precision": "float32", **settings}
    places = [str(tmp_path / place) for place in ("images/web", "filtered/web", out)]
    return EmbedUnit("copies", EmbedderSettings(**settings), *places)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("batch_size", "vector_rows"), [(1, 4096), (8, 4096), (64, 4096), (4, 10), (5, 5)])
def test_every_kept_image_has_its_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: HashModel, seed: int, batch_size: int, vector_rows: int
) -> None:
    monkeypatch.setattr(embed, "VECTOR_ROWS", vector_rows)
    monkeypatch.setattr(embed, "IMAGE_GROUP_ROWS", 6)
    parts, kept = write_inputs(tmp_path, seed)
    execute(embed_unit(tmp_path, batch_size))
    made, images = ShardSet(str(tmp_path / "out")), ShardSet(str(tmp_path / "images/web"))
    assert made.num_parts == len(parts)
    for part, (data, keep) in enumerate(zip(parts, kept, strict=True)):
        names = images.read(part, ["image_id"])["image_id"].to_pylist()
        good = [(n, d) for n, d, k in zip(names, data, keep, strict=True) if k and d.startswith(b"good")]
        bad = [n for n, d, k in zip(names, data, keep, strict=True) if k and d.startswith(b"bad")]
        rows = made.read(part).to_pylist()
        assert [row["image_id"] for row in rows] == [name for name, _ in good]
        assert [row["embedding"] for row in rows] == [model.preprocess(d).tolist() for _, d in good]
        rejects = rejects_of(made.uri, part) if bad else []
        assert [(r["image_id"], r["reason"], r["detail"]) for r in rejects] == [
            (name, "undecodable", "will not do") for name in bad
        ]
    assert set(model.shapes) == {(batch_size, 4)}
    metadata = [pq.ParquetFile(made.part_uri(part)).metadata for part in range(made.num_parts)]
    sizes = [m.row_group(g).num_rows for m in metadata for g in range(m.num_row_groups)]
    assert max(sizes) < vector_rows + batch_size


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_decode_change_nothing(tmp_path: Path, model: HashModel, seed: int) -> None:
    write_inputs(tmp_path, seed)
    used: set[str] = set()
    plain = model.preprocess

    def slow(data: bytes) -> np.ndarray:
        used.add(threading.current_thread().name)
        time.sleep(0.02 * (1 + data[-1] % 3))  # long enough that no thread is idle while images are handed out
        return plain(data)

    model.preprocess = slow  # type: ignore[method-assign]
    execute(embed_unit(tmp_path, out="one", decode_threads=1))
    assert used == {"ordered_map_0"}
    execute(embed_unit(tmp_path, out="five", decode_threads=5))
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "five")
    assert "ordered_map_4" in used and threading.main_thread().name not in used


def test_images_of_several_shapes_go_one_at_a_time(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 0)
    execute(embed_unit(tmp_path, out="batches"))
    model.fixed_shape, model.shapes = False, []
    execute(embed_unit(tmp_path, out="single"))
    assert set(model.shapes) == {(1, 4)}
    assert rows_of(tmp_path / "single") == rows_of(tmp_path / "batches")


def test_a_model_that_fails_at_work_stops_the_stage_in_one_line(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 0)

    def full(batch: np.ndarray) -> np.ndarray:
        raise EmbedderError(f"cuda ran out of memory at batch_size {len(batch)}; set batch_size to 4")

    model.embed = full  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="batch_size 8; set batch_size to 4") as caught:
        execute(embed_unit(tmp_path))
    assert "\n" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "ordered_map"))]


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 1)
    execute(embed_unit(tmp_path, out="whole"))
    plain, calls = model.embed, len(model.shapes)

    def breaks(batch: np.ndarray) -> np.ndarray:
        if len(model.shapes) > calls + 3:
            raise RuntimeError("killed")
        return plain(batch)

    model.embed = breaks  # type: ignore[method-assign]
    with pytest.raises(PartialError, match="killed"):
        execute(embed_unit(tmp_path))
    model.embed = plain  # type: ignore[method-assign]
    execute(embed_unit(tmp_path))
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")


def test_batches_left_out_fit_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: HashModel) -> None:
    write_inputs(tmp_path, 0)
    for model_name, device, expected in (("hash", "cpu", 16), ("hash", "cuda", 128), ("dct", "cpu", 64)):
        monkeypatch.setattr(embed, "resolve_runtime", lambda *args, device=device: Runtime(device=device))
        unit = embed_unit(tmp_path, batch_size=None, model=model_name)
        assert unit.config()["batch_size"] == expected
        (step,) = unit.steps()
        assert step.needs == Needs(resident=True, cpus=1, gpus=int(device == "cuda"))


def test_what_made_the_vectors_is_told(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 0)
    execute(embed_unit(tmp_path))
    manifest = ShardSet(str(tmp_path / "out")).manifest
    assert manifest["labels"] == {"source": "web", "role": "pool", "embedder": "copies"}
    assert manifest["config"] == {
        "model": "print",
        "threads": 1,
        "device": "cpu",
        "precision": "float32",
        "compiled": False,
        "batch_size": 8,
    }
    assert manifest["info"] == {
        "model": "hash",
        "dim": 4,
        "copy_thresholds": {"self_dedup": 0.9, "reference": 0.8},
        "details": {"weights": "none"},
    }
    model.copy_thresholds = None  # type: ignore[assignment]
    execute(embed_unit(tmp_path, out="other"))
    assert ShardSet(str(tmp_path / "other")).manifest["info"]["copy_thresholds"] is None
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "other")


@pytest.mark.parametrize("change", ["weights", "batch"])
def test_other_weights_or_batches_are_another_origin(tmp_path: Path, model: HashModel, change: str) -> None:
    write_inputs(tmp_path, 0)
    execute(embed_unit(tmp_path))
    if change == "weights":
        model.fingerprint = "other"
    with pytest.raises(ConfigError, match="model: print -> other" if change == "weights" else "batch_size: 8 -> 9"):
        execute(embed_unit(tmp_path, 8 if change == "weights" else 9))


@pytest.mark.filterwarnings("ignore:overflow")
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 0)
    model.scale = 1e9
    with pytest.raises(ConfigError, match="vectors that are not finite"):
        execute(embed_unit(tmp_path))


def test_a_model_that_cannot_be_opened_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> None:
        raise EmbedderError("no weights at /x")

    monkeypatch.setattr(embed, "load_embedder", missing)
    with pytest.raises(ConfigError, match="no weights at /x"):
        open_embedder("torchscript:/x", Runtime())


def test_a_step_travels_without_its_model(tmp_path: Path, model: HashModel) -> None:
    write_inputs(tmp_path, 0)
    (step,) = embed_unit(tmp_path).steps()
    assert step.embedder is model  # type: ignore[attr-defined]
    assert "embedder" not in step.__getstate__()  # type: ignore[operator]


def test_images_that_are_all_dropped_leave_empty_parts(tmp_path: Path, model: HashModel) -> None:
    tables = [image_table([b"good 1"])]
    write_set(tmp_path / "images/web", "images", tables, source="web", role="pool")
    ids = tables[0]["image_id"].to_pylist()
    verdicts = table(schemas.FILTERED, row=[0], image_id=ids, kept=[False], reason=["too_small"])
    write_set(tmp_path / "filtered/web", "filtered", [verdicts], source="web", role="pool")
    execute(embed_unit(tmp_path))
    assert rows_of(tmp_path / "out") == []
    assert model.shapes == []
    assert ShardSet(str(tmp_path / "out")).num_parts == 1
