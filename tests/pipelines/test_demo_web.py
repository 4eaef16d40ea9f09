"""The demo's web: pictures that differ, copies that do not, and URLs that are what the truth says they are."""

import http.client
import io
import os
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.hashing import image_id
from pipelines import demo_web
from pipelines.demo_images import CONCEPTS, COPY_KINDS, draw, make_copy
from pipelines.demo_web import COPY_SHARES, FAULT_SHARES, MAX_BYTES, MIN_SIDE, DemoWeb, build, concept_counts, serve

NUM_IMAGES = 60


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def look(data: bytes) -> npt.NDArray[np.float64]:
    """A picture's coarse look, as a unit vector: cosines are correlations of 12 x 12 thumbnails."""
    pixels = np.asarray(opened(data).convert("RGB").resize((12, 12), Image.Resampling.BOX), np.float64).ravel()
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


@pytest.mark.parametrize("seed", [0, 1])
def test_pictures_are_no_copies_of_each_other_and_copies_are(seed: int) -> None:
    pictures = [draw(concept, index, seed) for concept in CONCEPTS for index in range(5)]
    looks = np.stack([look(data) for data in pictures])
    similarity = looks @ looks.T - 2 * np.eye(len(looks))
    assert similarity.max() < 0.93
    # Chance would be 4 in 99.
    nearest = similarity.argmax(axis=1) // 5
    assert (nearest == np.arange(len(looks)) // 5).mean() > 0.2
    rng = np.random.default_rng(seed)
    for kind in ("recompressed", "resized", "brightness"):
        copies = [look(make_copy(data, kind, rng)) for data in pictures[::5]]
        assert min(copy @ own for copy, own in zip(copies, looks[::5], strict=True)) > 0.93


def test_pictures_are_photographs_of_stated_size_and_the_same_each_time() -> None:
    drawn = {
        (concept, index, seed): draw(concept, index, seed) for concept in CONCEPTS for index, seed in ((0, 0), (7, 3))
    }
    for key, data in drawn.items():
        image = opened(data)
        assert image.format == "JPEG"
        assert image.mode == "RGB"
        assert min(image.size) >= 160
        assert max(image.size) <= 320
        assert draw(*key) == data
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_change_what_their_kind_says(seed: int) -> None:
    data = draw(CONCEPTS[seed], 0, seed)
    w, h = opened(data).size
    made = {kind: make_copy(data, kind, np.random.default_rng(seed)) for kind in COPY_KINDS}
    assert made == {kind: make_copy(data, kind, np.random.default_rng(seed)) for kind in COPY_KINDS}
    sizes = {kind: opened(copy).size for kind, copy in made.items()}
    assert sizes["recompressed"] == sizes["brightness"] == (w, h)
    assert made["recompressed"] != data
    area = sizes["cropped"][0] * sizes["cropped"][1] / (w * h)
    assert 0.78 < area < 0.96
    scale = sizes["resized"][0] / w
    assert 0.48 < scale < 0.87 or 1.18 < scale < 1.62
    assert abs(sizes["resized"][1] / h - scale) < 0.02
    before, after = (float(np.asarray(opened(d)).mean()) for d in (data, made["brightness"]))
    assert not 0.9 < after / before < 1.1
    with pytest.raises(ValueError, match="rotated"):
        make_copy(data, "rotated", np.random.default_rng(0))


@pytest.mark.parametrize("num_images", [1, 60, 3000])
def test_concepts_have_a_long_tail(num_images: int) -> None:
    counts = concept_counts(num_images)
    assert len(counts) == len(CONCEPTS)
    assert sum(counts) == num_images
    if num_images == 3000:
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > 15 * counts[-1] > 0
        assert {demo_web.FOLDER_CONCEPT, demo_web.PARQUET_CONCEPT} <= set(CONCEPTS[-3:])


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> DemoWeb:
    return build(str(tmp_path_factory.mktemp("web")), NUM_IMAGES, seed=5)


@pytest.fixture(scope="module")
def served(web: DemoWeb) -> Iterator[dict[str, dict[str, Any]]]:
    """The truth by URL, while the web is served; `body` is what was fetched, or the error."""
    with serve(web):
        truth = {row["url"]: row for row in pq.read_table(web.truth).to_pylist()}
        references = Path(web.reference_urls).read_text().splitlines()
        for row in [*truth.values(), *({"url": url, "kind": "reference"} for url in references)]:
            try:
                with urllib.request.urlopen(row["url"], timeout=10) as response:
                    row["type"], row["body"] = response.headers["Content-Type"], response.read()
            except (urllib.error.HTTPError, http.client.IncompleteRead) as error:
                row["body"] = error
            truth[row["url"]] = row
        yield truth


def of_kind(served: dict[str, dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    rows = [row for row in served.values() if row["kind"] in kinds]
    assert rows
    return rows


def test_kinds_have_their_shares(served: dict[str, dict[str, Any]]) -> None:
    counts = Counter(row["kind"] for row in served.values())
    shares = {**COPY_SHARES, **FAULT_SHARES}
    assert counts == {
        **{kind: max(1, round(share * NUM_IMAGES)) for kind, share in shares.items()},
        "original": NUM_IMAGES,
        "leak": 30,
        "reference": 60,
    }


def test_originals_are_the_pictures_drawn(served: dict[str, dict[str, Any]]) -> None:
    rows = of_kind(served, "original")
    assert len({row["body"] for row in rows}) == NUM_IMAGES
    for row in rows:
        index = int(row["url"].rpartition("/")[2].removesuffix(".jpg"))
        assert row["body"] == draw(row["concept"], index, 5)
        assert row["original_url"] is None
        assert row["reference"] is None


def test_copies_are_of_what_the_truth_names(served: dict[str, dict[str, Any]]) -> None:
    looks = {row["url"]: look(row["body"]) for row in of_kind(served, "original", "reference")}
    for row in of_kind(served, *COPY_SHARES, "leak"):
        source = served[row["reference"] if row["kind"] == "leak" else row["original_url"]]
        assert source["kind"] == ("reference" if row["kind"] == "leak" else "original")
        assert (row["body"] == source["body"]) == (row["kind"] == "byte_copy")
        assert row["kind"] == "leak" or row["concept"] == source["concept"]
        nearest = max(looks, key=lambda url: float(looks[url] @ look(row["body"])))
        assert nearest == source["url"]


def test_faults_are_what_they_are_called(served: dict[str, dict[str, Any]]) -> None:
    assert all(row["body"].code == 404 for row in of_kind(served, "dead"))
    assert all(isinstance(row["body"], http.client.IncompleteRead) for row in of_kind(served, "truncated"))
    for row in of_kind(served, "html"):
        assert row["type"].startswith("text/html")
        assert row["body"].startswith(b"<!doctype html>")
    for row in of_kind(served, "oversize"):
        assert len(row["body"]) > MAX_BYTES
        assert opened(row["body"]).format == "JPEG"
    assert all(min(opened(row["body"]).size) < MIN_SIDE for row in of_kind(served, "small"))
    whole = of_kind(served, "original", "leak", *COPY_SHARES)
    assert all(min(opened(row["body"]).size) > MIN_SIDE and len(row["body"]) < MAX_BYTES for row in whole)


def test_ids_are_of_the_bytes_served_where_an_image_is(served: dict[str, dict[str, Any]]) -> None:
    for row in of_kind(served, "original", "leak", "small", *COPY_SHARES):
        assert row["image_id"] == image_id(row["body"])
    assert all(row["image_id"] is None for row in of_kind(served, "dead", "html", "truncated", "oversize"))


def test_the_pool_lists_the_truth_in_order_with_copies_after_originals(
    web: DemoWeb, served: dict[str, dict[str, Any]]
) -> None:
    pool = pq.read_table(web.pool_urls)
    urls = pool["url"].to_pylist()
    assert pool.column_names == ["url", "alt", "page_url", "label"]
    assert urls == pq.read_table(web.truth)["url"].to_pylist()
    assert len(set(urls)) == len(urls)
    assert pool["label"].to_pylist() == [served[url]["concept"] for url in urls]
    place = {url: number for number, url in enumerate(urls)}
    copies = of_kind(served, *COPY_SHARES)
    assert all(place[row["original_url"]] < place[row["url"]] for row in copies)
    labels = [served[url]["concept"] for url in urls if served[url]["kind"] == "original"]
    assert labels != sorted(labels, key=CONCEPTS.index)


def test_query_sets_are_fresh_pictures_of_their_concepts(web: DemoWeb, served: dict[str, dict[str, Any]]) -> None:
    folder = [path.read_bytes() for path in Path(web.query_folder).iterdir()]
    table = pq.read_table(web.query_images)
    assert set(table["label"].to_pylist()) == {demo_web.PARQUET_CONCEPT}
    images = [*folder, *table["image"].to_pylist()]
    assert len(folder) == table.num_rows == demo_web.NUM_QUERIES
    assert all(min(opened(data).size) >= 160 for data in images)
    assert len(set(images) | {row["body"] for row in of_kind(served, "original")}) == len(images) + NUM_IMAGES


def stamps(directory: str) -> dict[str, int]:
    found = Path(directory).rglob("*")
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in found if path.is_file()}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query and reference sets of very few images."""
    for name, number in (("NUM_QUERIES", 2), ("NUM_REFERENCES", 3), ("NUM_LEAKS", 2)):
        monkeypatch.setattr(demo_web, name, number)


@pytest.mark.usefixtures("few")
def test_a_web_is_drawn_once(tmp_path: Path) -> None:
    web = build(str(tmp_path), 1, seed=1)
    before = stamps(web.directory)
    assert build(str(tmp_path), 1, seed=1) == web
    assert stamps(web.directory) == before
    bodies = (tmp_path / "site" / "blobs.bin").read_bytes()
    os.unlink(tmp_path / "web.json")
    build(str(tmp_path), 1, seed=1)
    assert (tmp_path / "site" / "blobs.bin").read_bytes() == bodies
    build(str(tmp_path), 1, seed=2)
    assert (tmp_path / "site" / "blobs.bin").read_bytes() != bodies


@pytest.mark.usefixtures("few")
def test_the_port_is_kept_while_it_is_free(tmp_path: Path) -> None:
    web = build(str(tmp_path), 1)
    with serve(web) as first:
        before = stamps(web.directory)
    with serve(web) as again:
        assert again == first
        assert stamps(web.directory) == before
    with socket.create_server(("127.0.0.1", int(first.rpartition(":")[2]))), serve(web) as other:
        assert other != first
        lists = [pq.read_table(web.pool_urls)["url"].to_pylist(), Path(web.reference_urls).read_text().split()]
        for urls in (*lists, pq.read_table(web.truth)["url"].to_pylist()):
            assert urls
            assert all(url.startswith(f"{other}/") for url in urls)
    with serve(web) as later:
        assert later == other
