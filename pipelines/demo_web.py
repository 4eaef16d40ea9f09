"""The small web that the demo curates: a few thousand drawn photographs, their copies, and what else crawlers meet.

`build` plans the web from the seed alone, then draws it into a directory, once. `serve` answers for it on loopback and
writes the URL lists, which hold the server's port; the port is kept, so that the same demo run again finds its URLs.
"""

import io
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation import storage
from curation.hashing import image_id
from pipelines.demo_images import CONCEPTS, COPY_KINDS, draw, jpeg, make_copy
from pipelines.loopback import PortInUseError, Reply, serve_blobs, write_blobs
from pipelines.progress import Progress, quiet

VERSION = 1
"""Raised when the same seed gives another web."""

MAX_BYTES = 2_000_000
"""The largest image that the demo fetches; the web's oversize images are larger."""

MIN_SIDE = 64
"""The shortest side that the demo keeps; the web's small images have a shorter one."""

FOLDER_CONCEPT, PARQUET_CONCEPT = "balloons", "flower"
"""The rare concepts of the two query sets; one comes as a folder, one as a Parquet file."""

NUM_QUERIES, NUM_REFERENCES, NUM_LEAKS = 40, 60, 30

COPY_SHARES = {"byte_copy": 0.06, "recompressed": 0.045, "cropped": 0.045, "resized": 0.03}
"""Copies in the pool, as shares of the number of photographs."""

FAULT_SHARES = {"dead": 0.02, "html": 0.01, "truncated": 0.01, "oversize": 0.005, "small": 0.01}
"""What is not an image to keep, as shares of the number of photographs."""

PORTS = range(18421, 18441)
"""Tried in this order: where the first is free, demos of one seed have equal URLs, and so equal results to the byte."""

_QUERY_INDEX, _REFERENCE_INDEX, _FAULT_INDEX = 1_000_000, 2_000_000, 3_000_000
"""Where the pictures for each use begin, so that none is drawn for two."""

_TRUTH = ("url", "kind", "original_url", "reference", "concept", "image_id")

_HTML = b"<!doctype html><title>Log in</title><p>Please log in to see this photograph.</p>\n"


@dataclass(frozen=True)
class DemoWeb:
    """The absolute paths of a web; `reference_urls`, `pool_urls` and `truth` are there once it was served.

    Attributes:
        directory: where all of it lies.
        query_folder: folder of images of FOLDER_CONCEPT.
        query_images: Parquet of images of PARQUET_CONCEPT; columns image, label.
        reference_urls: text file of the URLs of the reference set.
        pool_urls: Parquet of the pool; columns url, alt, page_url, label (the concept).
        truth: Parquet of what the pool's URLs are, in the same order; columns url, kind (`original`, `leak`, a key of
            COPY_SHARES or of FAULT_SHARES), original_url (of a copy), reference (of a leak: the URL of the reference
            image), concept, image_id (where an image is served whole and small enough to fetch).
    """

    directory: str
    query_folder: str
    query_images: str
    reference_urls: str
    pool_urls: str
    truth: str


@dataclass(frozen=True)
class _Item:
    """One image, or what stands in its place. A copy has the concept and index of what it copies, and its path."""

    path: str
    kind: str
    concept: str
    index: int
    copied_path: str | None = None


def build(directory: str, num_images: int = 3000, seed: int = 0, progress: Progress | None = None) -> DemoWeb:
    """Draw a web of `num_images` photographs and a fourth as many other URLs, unless `directory` holds it already.

    Draws in one process for each core, up to 8: about 6 ms of one core and 11 kB of disk a picture. Memory: the drawn
    pictures not yet written, at most all of them. The bytes are the same for any number of processes.
    """
    web = _paths(directory)
    settings = {"version": VERSION, "num_images": num_images, "seed": seed}
    done = _inside(web, "web.json")
    if storage.exists(done) and json.loads(storage.read_bytes(done)) == settings:
        return web
    storage.remove_file(done)
    storage.remove_file(_inside(web, "port"))
    pool, references, queries = _pool(num_images, seed), _references(), _queries()
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as processes:
        items = [*queries, *references, *pool]
        drawn = _watched(processes.map(partial(_draw, seed), items, chunksize=16), len(items), progress or quiet())
        _write_queries(web, [(item, next(drawn)) for item in queries])
        ids: dict[str, str] = {}
        write_blobs(_inside(web, "site"), _replies([*references, *pool], drawn, ids))
    _write_table(
        _inside(web, "plan.parquet"), [{**_columns(item), "image_id": ids.get(item.path)} for item in pool], _TRUTH
    )
    storage.write_bytes(done, json.dumps(settings).encode())
    return web


def _watched(drawn: Iterator[bytes], count: int, progress: Progress) -> Iterator[bytes]:
    """The same pictures, shown as they come."""
    progress.begin("draw pictures", count, 0)
    try:
        for data in drawn:
            progress.advance(1)
            yield data
    finally:
        progress.end()


@contextmanager
def serve(web: DemoWeb) -> Iterator[str]:
    """Answer for a built web on loopback, from a process of its own; yields the base URL.

    The port is that of the last time where it is free. The URL lists are written when it is another.
    """
    port_file = _inside(web, "port")
    known = int(storage.read_bytes(port_file)) if storage.exists(port_file) else None
    with ExitStack() as stack:
        first = [known] if known else []
        url = _serve_on_first_free(stack, _inside(web, "site"), [*first, *(port for port in PORTS if port != known)])
        port = int(url.rpartition(":")[2])
        if port != known:
            storage.remove_file(port_file)
            _write_lists(web, url)
            storage.write_bytes(port_file, str(port).encode())
        yield url


def _serve_on_first_free(stack: ExitStack, site: str, ports: list[int]) -> str:
    for port in ports:
        try:
            return stack.enter_context(serve_blobs(site, port))
        except PortInUseError:
            continue
    return stack.enter_context(serve_blobs(site))


def _paths(directory: str) -> DemoWeb:
    root = os.path.abspath(directory)
    names = (f"queries/{FOLDER_CONCEPT}", f"queries/{PARQUET_CONCEPT}.parquet", "reference.txt", "pool.parquet")
    return DemoWeb(root, *(os.path.join(root, name) for name in (*names, "truth.parquet")))


def _inside(web: DemoWeb, name: str) -> str:
    """Path of one of the web's own files.

    `web.json` says what was built, and is written last; `plan.parquet` is the truth without a server's address;
    `site` is what is served; `port` is the one in the URL lists, and is written after them.
    """
    return os.path.join(web.directory, name)


def _queries() -> list[_Item]:
    """What the query sets show: fresh pictures, not on the web."""
    indices = range(_QUERY_INDEX, _QUERY_INDEX + NUM_QUERIES)
    return [_Item("", "original", concept, index) for concept in (FOLDER_CONCEPT, PARQUET_CONCEPT) for index in indices]


def _references() -> list[_Item]:
    """The reference set: fresh pictures of all concepts in turn."""
    numbers = range(NUM_REFERENCES)
    return [
        _Item(f"/reference/{n:05d}.jpg", "original", CONCEPTS[n % len(CONCEPTS)], _REFERENCE_INDEX + n) for n in numbers
    ]


def _pool(num_images: int, seed: int) -> list[_Item]:
    """The pool in the order of its list, a shuffled one in which every copy comes after its original."""
    rng = np.random.default_rng(seed)
    originals = [
        _Item(f"/{concept}/{index:05d}.jpg", "original", concept, index)
        for concept, count in zip(CONCEPTS, concept_counts(num_images), strict=True)
        for index in range(count)
    ]
    placed = list(zip(rng.random(len(originals)).tolist(), originals, strict=True))
    others: list[tuple[float, _Item]] = []
    for kind, share in COPY_SHARES.items():
        for n, source in enumerate(rng.integers(num_images, size=_share(share, num_images)).tolist()):
            place, item = placed[source]
            later = rng.uniform(place, 1)
            others.append((later, _Item(f"/{kind}/{n:05d}.jpg", kind, item.concept, item.index, item.path)))
    for n, item in enumerate(_references()[:NUM_LEAKS]):
        others.append((rng.random(), _Item(f"/leak/{n:05d}.jpg", "leak", item.concept, item.index, item.path)))
    for kind, share in FAULT_SHARES.items():
        for n in range(_share(share, num_images)):
            concept = CONCEPTS[rng.integers(len(CONCEPTS))]
            others.append((rng.random(), _Item(f"/{kind}/{n:05d}.jpg", kind, concept, _FAULT_INDEX + n)))
    return [item for _, item in sorted([*placed, *others], key=lambda pair: (pair[0], pair[1].path))]


def _share(share: float, num_images: int) -> int:
    return max(1, round(share * num_images))


def concept_counts(num_images: int) -> list[int]:
    """Photographs of each concept, by Zipf's law over CONCEPTS; they sum to `num_images`."""
    weights = 1 / np.arange(1, len(CONCEPTS) + 1)
    edges = np.rint(np.cumsum(weights) / weights.sum() * num_images).astype(int)
    return np.diff(edges, prepend=0).tolist()  # type: ignore[no-any-return]


def _draw(seed: int, item: _Item) -> bytes:
    """The whole image of an item; empty where there is none."""
    if item.kind in ("dead", "html"):
        return b""
    if item.kind == "oversize":
        # One picture for all of them, made too large by what follows its end, so that it is stored once.
        return draw(CONCEPTS[0], _FAULT_INDEX, seed) + bytes(MAX_BYTES)
    data = draw(item.concept, item.index, seed)
    rng = np.random.default_rng([seed, zlib.crc32(item.path.encode())])
    if item.kind == "leak":
        return make_copy(data, COPY_KINDS[item.index % len(COPY_KINDS)], rng)
    if item.kind == "small":
        with Image.open(io.BytesIO(data)) as image:
            side = int(rng.integers(24, MIN_SIDE))
            return jpeg(image.resize((side + 10, side)), 85)
    return make_copy(data, item.kind, rng) if item.kind in COPY_KINDS else data


def _replies(items: list[_Item], drawn: Iterator[bytes], ids: dict[str, str]) -> Iterator[tuple[str, Reply]]:
    """What is served, by path; dead links are not. Notes the ids of images that can be fetched, by path, in `ids`."""
    for item, data in zip(items, drawn, strict=True):
        if item.kind == "html":
            yield item.path, Reply(body=_HTML, content_type="text/html; charset=utf-8")
        elif item.kind == "truncated":
            yield item.path, Reply(body=data[: len(data) * 3 // 5], declared_length=len(data))
        elif item.kind != "dead":
            if item.kind != "oversize":
                ids[item.path] = image_id(data)
            yield item.path, Reply(body=data)


def _columns(item: _Item) -> dict[str, str | None]:
    leak = item.kind == "leak"
    return {
        "url": item.path,
        "kind": item.kind,
        "original_url": None if leak else item.copied_path,
        "reference": item.copied_path if leak else None,
        "concept": item.concept,
    }


def _write_queries(web: DemoWeb, images: list[tuple[_Item, bytes]]) -> None:
    for number, (item, data) in enumerate(images):
        if item.concept == FOLDER_CONCEPT:
            storage.write_bytes(os.path.join(web.query_folder, f"{number:03d}.jpg"), data)
    rows = [{"image": data, "label": item.concept} for item, data in images if item.concept == PARQUET_CONCEPT]
    _write_table(web.query_images, rows, ("image", "label"))


def _write_table(path: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Write some columns as Parquet, all or nothing; `image` is binary, the others are strings."""
    schema = pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in columns])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    storage.write_bytes(path, sink.getvalue().to_pybytes())


def _write_lists(web: DemoWeb, url: str) -> None:
    """Write the lists of URLs and the truth for a server at `url`."""
    rows = pq.read_table(_inside(web, "plan.parquet")).to_pylist()
    for number, row in enumerate(rows):
        row.update({name: url + row[name] for name in ("url", "original_url", "reference") if row[name]})
        row["page_url"] = f"{url}/pages/{number // 5:04d}.html"
        row["alt"] = f"a photograph: {row['concept'].replace('_', ' ')}"
        row["label"] = row["concept"]
    _write_table(web.truth, rows, _TRUTH)
    _write_table(web.pool_urls, rows, ("url", "alt", "page_url", "label"))
    storage.write_bytes(web.reference_urls, "".join(f"{url}{item.path}\n" for item in _references()).encode())
